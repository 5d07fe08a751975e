# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call. An explicit choice fails loudly; the automatic one falls back with one warning."""

from __future__ import annotations

import warnings

import torch

from rapid3rt import envs
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import native

BACKENDS = ("native", "flex", "reference")

_chosen: dict[tuple[str | None, str], str] = {}


def _missing_reason(backend: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device, None when it can."""
    if backend == "native":
        return native.missing_reason(device_type)
    if backend == "flex":
        return "this version has no FlexAttention backend"
    return None


def _explicit(name: str, value: str, device_type: str) -> str:
    if value not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}, got {value!r}")
    reason = _missing_reason(value, device_type)
    if reason is not None:
        raise UnsupportedError(f"{name} {value!r} on device {device_type!r}: {reason}")
    return value


def _resolve(backend: str | None, device_type: str) -> str:
    name, value = (
        ("backend", backend) if backend is not None else ("RAPID3RT_BACKEND", envs.backend())
    )
    if value is not None:
        return _explicit(name, value, device_type)
    reason = _missing_reason("native", device_type)
    if reason is None:
        return "native"
    message = f"rapid3rt runs its PyTorch reference ops on device {device_type!r}, slowly: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=5)
    return "reference"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(backend: str | None, device_type: str) -> str:
    """Name the backend that serves a device: 'native' or 'reference'.

    Parameters
    ----------
    backend: an explicit choice, or None for RAPID3RT_BACKEND and then the best there is. device_type: "cpu", "cuda".

    Raises
    ------
    ValueError: no such backend, or RAPID3RT_CPU_ISA is wrong. UnsupportedError: chosen explicitly, but not there.
    """
    key = (backend, device_type)
    if key not in _chosen:
        _chosen[key] = _resolve(backend, device_type)
    return _chosen[key]


def describe_backend() -> str:
    """One line: which backend serves the CPU, or why the native one does not, or why none does."""
    chosen = envs.backend()
    try:
        if chosen is not None:
            return f"{_explicit('RAPID3RT_BACKEND', chosen, 'cpu')} (RAPID3RT_BACKEND)"
        missing = native.missing_reason("cpu")
    except (ValueError, UnsupportedError) as error:
        return f"none: {error}"
    if missing is not None:
        return f"reference ({missing})"
    built = native.info()
    threads = "OpenMP" if built["openmp"] else "one thread, no OpenMP"
    return f"native on CPU ({built['isa']}; {threads}), reference elsewhere"

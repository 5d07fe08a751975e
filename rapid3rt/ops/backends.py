# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call. An explicit choice fails loudly; the automatic one falls back with one warning.

Attention: `native` on the CPU; on a CUDA GPU `native` where `rapid3rt.ops.proven` names the GPU and the dtype, else
`flex`; else `reference`. The other ops know `native` and `reference`: under `flex` they are chosen as if nothing had
been asked for, which on a GPU without proof means plain PyTorch, without a warning: they move bytes, as PyTorch does.

What is chosen depends on what a compiled graph holds fixed (device, dtype, sizes), never on values, and is kept.
"""

from __future__ import annotations

import warnings

import torch

from rapid3rt import envs
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import flex, native, proven

BACKENDS = ("native", "flex", "reference")
# What the CUDA kernels of attention know.
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
_CUDA_HEAD_DIMS = (64, 128)
_CUDA_BLOCKS = (64, 128)

_chosen: dict[tuple[object, ...], str] = {}
_warned: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name the backend of the ops that are not attention: 'native' or 'reference'.

    Parameters
    ----------
    backend: an explicit choice, or None for RAPID3RT_BACKEND and then the best there is. device, dtype: of the tensors.

    Raises
    ------
    ValueError: no such backend, or RAPID3RT_CPU_ISA is wrong. UnsupportedError: chosen explicitly, but not there.
    """
    try:
        return _chosen[backend, device, dtype]
    except KeyError:
        chosen = _chosen[backend, device, dtype] = _resolve(backend, device, dtype)
        return chosen


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose_attention(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block: int,
    lse: bool,
) -> str:
    """Name the backend of `block_sparse_attention`: 'native', 'flex' or 'reference'. Raises as `choose`.

    Parameters
    ----------
    backend, device, dtype: as in `choose`. head_dim, block: K and tokens per block. lse: whether it is asked for.
    """
    try:
        return _chosen[backend, device, dtype, head_dim, block, lse]
    except KeyError:
        chosen = _resolve_attention(backend, device, dtype, head_dim, block, lse)
        _chosen[backend, device, dtype, head_dim, block, lse] = chosen
        return chosen


def require(backend: str | None, device: torch.device) -> None:
    """Raise where an explicit choice can serve no call at all on a device; warn where the automatic one is slow there.

    Raises
    ------
    ValueError: no such backend, or RAPID3RT_CPU_ISA is wrong. UnsupportedError: chosen explicitly, but not there.
    """
    asked = _asked(backend, device)
    if asked is None:
        _automatic_attention(device, *_usual(device), lse=False)


def describe_backend(device_type: str = "cpu") -> str:
    """One line: which backend serves a device and why not a better one, or why none does.

    Parameters
    ----------
    device_type: "cpu", or "cuda": of the current GPU, for bfloat16 and the sizes of real models.
    """
    device = torch.device(device_type)
    try:
        asked = _asked(None, device)
        if asked is not None:
            return f"{asked} (RAPID3RT_BACKEND)"
        if device_type == "cuda" and flex.capability(device) is None:
            return "none: there is no CUDA GPU"
        if device_type != "cpu":
            chosen, reason = _best_attention(device, *_usual(device), lse=False)
            what = "flex for attention, reference for the other ops" if chosen == "flex" else chosen
            return what if reason is None else f"{what} ({reason})"
        missing = native.missing_reason(device_type)
    except (ValueError, UnsupportedError) as error:
        return f"none: {error}"
    if missing is not None:
        return f"reference ({missing})"
    built = native.info()
    threads = "OpenMP" if built["openmp"] else "one thread, no OpenMP"
    return f"native on CPU ({built['isa']}; {threads})"


def _asked(backend: str | None, device: torch.device) -> str | None:
    """What is chosen explicitly, by argument or environment, checked for the device; None where nothing is."""
    name, value = (
        ("backend", backend) if backend is not None else ("RAPID3RT_BACKEND", envs.backend())
    )
    if value is None:
        return None
    if value not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}, got {value!r}")
    reason = None
    if value == "native":
        reason = native.missing_reason(device.type)
    elif value == "flex":
        reason = flex.missing_reason(device.type, flex.capability(device))
    if reason is not None:
        raise UnsupportedError(f"{name} {value!r} on device {device.type!r}: {reason}")
    return value


def _resolve(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    asked = _asked(backend, device)
    if asked is not None and asked != "flex":
        return asked
    reason = _unusable_native(device, dtype)
    if reason is None:
        return "native"
    if device.type != "cuda":
        _warn(device, reason)
    return "reference"


def _resolve_attention(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block: int,
    lse: bool,
) -> str:
    asked = _asked(backend, device)
    if asked is None:
        return _automatic_attention(device, dtype, head_dim, block, lse=lse)
    reason = None
    if asked == "native":
        reason = _native_refusal(device, dtype, head_dim, block)
    elif asked == "flex":
        reason = flex.refusal(device.type, head_dim, block, lse)
    if reason is not None:
        raise UnsupportedError(f"backend {asked!r} on device {device.type!r}: {reason}")
    return asked


def _automatic_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int, *, lse: bool
) -> str:
    chosen, reason = _best_attention(device, dtype, head_dim, block, lse=lse)
    if chosen == "reference" and reason is not None:
        _warn(device, reason)
    return chosen


def _best_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int, *, lse: bool
) -> tuple[str, str | None]:
    """The best backend of an attention call, and why it is none of the better ones."""
    no_native = _unusable_native(device, dtype)
    no_native = no_native or _native_refusal(device, dtype, head_dim, block)
    if no_native is None:
        return "native", None
    if device.type != "cuda":  # compiling pays on a GPU alone
        return "reference", no_native
    no_flex = flex.missing_reason(device.type, flex.capability(device))
    no_flex = no_flex or flex.refusal(device.type, head_dim, block, lse)
    if no_flex is None:
        return "flex", no_native
    return "reference", f"{no_native}; {no_flex}"


def _unusable_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the automatic choice does not take the native kernels, None where it does."""
    reason = native.missing_reason(device.type)
    if reason is not None or device.type != "cuda":
        return reason
    capability = flex.capability(device)
    if capability is None:
        return "there is no CUDA GPU"
    if not proven.is_proven(capability, dtype):
        gpu = "compute capability {}.{}".format(*capability)
        return f"native kernels are not proven on {gpu} in {_name(dtype)}: run make gpu-check"
    return None


def _native_refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, block: int
) -> str | None:
    """Why the native attention cannot serve a call on a device that it serves, None when it can."""
    if device.type != "cuda":
        return None
    if dtype not in _CUDA_DTYPES:
        return f"native attention takes bfloat16 and float16, got {_name(dtype)}"
    if head_dim not in _CUDA_HEAD_DIMS:
        return f"native attention takes a head dim of 64 or 128, got {head_dim}"
    if block not in _CUDA_BLOCKS:
        return f"native attention takes blocks of 64 or 128 tokens, got {block}"
    return None


def _usual(device: torch.device) -> tuple[torch.dtype, int, int]:
    """Dtype, head dim and block of real models."""
    return (torch.bfloat16, 128, 128) if device.type == "cuda" else (torch.float32, 64, 32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _warn(device: torch.device, reason: str) -> None:
    """Say once per reason that the reference ops run."""
    message = f"rapid3rt runs its PyTorch reference ops on device {device.type!r}, slowly: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)

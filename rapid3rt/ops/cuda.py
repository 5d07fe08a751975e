# SPDX-License-Identifier: Apache-2.0
"""The native backend on GPUs: which kernels were built, which GPU they serve, and how a call reaches them.

The module `_cuda` is imported when the first CUDA tensor arrives, never before; it knows no torch. A call runs on the
tensor's own device and on that device's current stream, allocates from torch's allocator alone and waits for nothing,
so that it may stand in a CUDA graph. Why the kernels cannot serve a GPU is told in one line with what would help.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

import torch

from rapid3rt.errors import UnsupportedError

# The oldest driver of a CUDA major version, as NVIDIA numbers them.
_OLDEST_DRIVER = {12: "525", 13: "580"}
_HAVE_WORKSPACE = frozenset(("block_sparse_attention", "build_block_lists", "cache_store"))
_BUILD = "build with RAPID3RT_CUDA=on (docs/cuda.md)"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The module, or None and why not."""
    try:
        return importlib.import_module("rapid3rt._cuda"), None
    except ModuleNotFoundError:
        return None, f"this installation has no CUDA kernels: {_BUILD}"
    except ImportError as error:
        return None, f"module rapid3rt._cuda cannot be loaded: {error}"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def image_reason(
    architectures: str, capability: tuple[int, int], driver: int, runtime: int
) -> str | None:
    """Why kernels built for some architectures cannot run on a GPU, None when they can.

    Machine code runs on its own capability and on higher minor numbers of the same major one, code for `90a` on 9.0
    alone; PTX is compiled by the driver for everything above it.

    Parameters
    ----------
    architectures: of the build, as CMake names them: "80-real,90a-real,80-virtual"; a bare number is both.
    capability: of the GPU. driver, runtime: CUDA versions, 1000 major + 10 minor.
    """
    if driver // 1000 < runtime // 1000:
        oldest = _OLDEST_DRIVER.get(runtime // 1000)
        newer = f"driver {oldest} or newer" if oldest else "a newer driver"
        has = f"goes up to CUDA {_dotted(driver)}" if driver else "is missing"
        return (
            f"the NVIDIA driver {has}, this build needs {_dotted(runtime)}: install {newer}, "
            f"or build with an older CUDA toolkit (12.8 at least)"
        )
    found = re.findall(r"(\d+)(\d)([a-z]?)(-real|-virtual|)", architectures)
    built = [((int(a), int(b)), specific, kind) for a, b, specific, kind in found]
    major, minor = capability
    for (a, b), specific, kind in built:
        serves = (a, b) == (major, minor) if specific else a == major and b <= minor
        if kind != "-virtual" and serves:
            return None
    if any(k != "-real" and not s and known <= capability for known, s, k in built):
        if driver >= runtime:
            return None
        return (
            f"compute capability {major}.{minor} needs the PTX of this build compiled, which a driver for CUDA "
            f"{_dotted(driver)} cannot do: install one for {_dotted(runtime)} or newer"
        )
    if major < 8:
        return f"compute capability {major}.{minor} has no kernels, they begin at 8.0"
    return f"this build has no kernels for compute capability {major}.{minor}, only {architectures}: {_BUILD}"


def missing_reason(device: torch.device | int | None = None) -> str | None:
    """Why the kernels cannot serve a GPU, None when they can.

    Parameters
    ----------
    device: a CUDA device or its index, None for the current one.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU"
    module, missing = _load()
    if module is None:
        return missing
    return image_reason(
        module.architectures,
        torch.cuda.get_device_capability(device),
        module.driver_version(),
        module.runtime_version,
    )


def info() -> dict[str, Any]:
    """Tell what was built, and what the current GPU is.

    Returns
    -------
    available: bool, whether the kernels serve the current GPU, with reason where not. built: bool; where it is True,
    architectures (as CMake names them), runtime (CUDA version that is linked in) and driver (the CUDA version it goes
    up to, None without one). device (name) and capability where torch sees a GPU.
    """
    reason = missing_reason()
    module, _ = _load()
    facts: dict[str, Any] = {"available": reason is None, "built": module is not None}
    if reason is not None:
        facts["reason"] = reason
    if module is not None:
        driver = module.driver_version()
        facts |= {
            "architectures": module.architectures,
            "runtime": _dotted(module.runtime_version),
            "driver": _dotted(driver) if driver else None,
        }
    if torch.version.cuda is not None and torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["capability"] = torch.cuda.get_device_capability()
    return facts


@functools.cache
def _serving(index: int) -> Any:
    """The module, where it serves this device."""
    reason = missing_reason(index)
    if reason is not None:
        raise UnsupportedError(f"backend 'native' is not available on cuda:{index}: {reason}")
    return _load()[0]


def run(name: str, device: torch.device, arguments: tuple[Any, ...]) -> None:
    """Launch a kernel on a device's current stream; nothing is waited for.

    Parameters
    ----------
    name: of the op. arguments: what `csrc/include/rapid3rt/binding.h` lists for it; every address is on this device.
    """
    index = device.index
    module = _serving(index)
    stream = torch.cuda.current_stream(device).cuda_stream
    if name in _HAVE_WORKSPACE:
        size = getattr(module, f"{name}_workspace_bytes")(*arguments)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        arguments = (*arguments, workspace.data_ptr())
    getattr(module, name)(*arguments, index, stream)

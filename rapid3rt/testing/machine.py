# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on, for the records. No paths: where things lie is nobody's business."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine() -> dict[str, Any]:
    """Processor with the features that matter, threads, versions.

    `model` is `family-model-stepping` as the processor numbers them: rented ones often have no name, and two
    generations of one maker differ by a factor of two.
    """
    cpu = _first_core()
    numbers = (cpu.get(field, "") for field in ("cpu family", "model", "stepping"))
    return {
        "processor": cpu.get("model name") or platform.processor(),
        "model": "-".join(numbers).strip("-"),
        "features": [name for name in _FEATURES if name in cpu.get("flags", "").split()],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _first_core() -> dict[str, str]:
    """What the kernel tells of it, by field; nothing where it does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {}
    lines = info.read_text().partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}

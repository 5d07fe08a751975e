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
    return {
        "processor": _cpu("model name") or platform.processor(),
        "model": "-".join(_cpu(field) for field in ("cpu family", "model", "stepping")).strip("-"),
        "features": [name for name in _FEATURES if name in _cpu("flags").split()],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu(field: str) -> str:
    """Of the first core; empty where the kernel does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return ""
    for line in info.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""

# SPDX-License-Identifier: Apache-2.0
"""Where numbers come from: processor, threads, versions, commit. No paths: where things lie is nobody's business."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def set_threads(number: int) -> None:
    """Of torch; 0: as it chooses. Raises `ValueError` below that."""
    if number < 0:
        raise ValueError(f"threads must be at least 0, got {number}")
    if number:
        torch.set_num_threads(number)


def machine() -> dict[str, Any]:
    """Processor with the features that matter, threads, versions, and the commit where git knows one."""
    return {
        "processor": _cpu("model name") or platform.processor(),
        "features": [name for name in _FEATURES if name in _cpu("flags").split()],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": _commit(),
    }


def _cpu(field: str) -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return ""
    lines = (line for line in info.read_text().splitlines() if line.startswith(field))
    return next(lines, ":").partition(":")[2].strip()


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return None
    return answer.stdout.strip() or None

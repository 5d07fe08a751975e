# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of a run come from."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch

from rapid3rt.testing.machine import machine as measured_on


def set_threads(number: int) -> None:
    """Of torch; 0: as it chooses. Raises `ValueError` below that."""
    if number < 0:
        raise ValueError(f"threads must be at least 0, got {number}")
    if number:
        torch.set_num_threads(number)


def machine() -> dict[str, Any]:
    """Processor, threads, versions, and the commit where git knows one."""
    return {**measured_on(), "diffusers": diffusers.__version__, "commit": _commit()}


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

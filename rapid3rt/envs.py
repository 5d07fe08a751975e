# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that this package reads. They serve building and debugging; options are arguments.

A test compares this table with the sources. Each is read once, when first needed.
"""

from __future__ import annotations

import os

VARIABLES = {
    "RAPID3RT_BACKEND": "Backend of every op that is called without backend=: native, flex or reference.",
    "RAPID3RT_CPU_ISA": "Instruction set of the CPU kernels: scalar, avx2, avx512, avx512_bf16 or amx; default: best.",
}


def backend() -> str | None:
    """Value of RAPID3RT_BACKEND, None when unset or empty."""
    return os.environ.get("RAPID3RT_BACKEND") or None


def cpu_isa() -> str | None:
    """Value of RAPID3RT_CPU_ISA, None when unset or empty."""
    return os.environ.get("RAPID3RT_CPU_ISA") or None

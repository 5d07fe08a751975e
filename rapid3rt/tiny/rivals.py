# SPDX-License-Identifier: Apache-2.0
"""The multistep solvers that every diffusers user can switch on, set up for flow matching at a pipeline's own shift."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

SOLVERS = {
    "DPM++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "DEIS": DEISMultistepScheduler,
}


def find_solver(name: str) -> Any:
    """The class of one of `SOLVERS`. ValueError: there is none of that name; the known ones are listed."""
    if name not in SOLVERS:
        raise ValueError(f"rival must be one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name]


@contextmanager
def solver(pipe: Any, name: str) -> Iterator[None]:
    """Run the (plain) pipeline under one of `SOLVERS` while the context is open."""
    plain = pipe.scheduler
    dynamic = plain.config.use_dynamic_shifting
    rival = find_solver(name)(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=float(plain.shift),
        use_dynamic_shifting=dynamic,
    )
    if dynamic:  # FLUX pipelines make mu of what they find in the scheduler's configuration
        rival.register_to_config(**{k: plain.config[k] for k in ("base_shift", "max_shift")})
    pipe.scheduler = rival
    try:
        yield
    finally:
        pipe.scheduler = plain

# SPDX-License-Identifier: Apache-2.0
"""`threshold:x`: an image reuses its residual until its embedded latents drift by more than x."""

from __future__ import annotations

import torch

from rapid3rt.errors import check_number
from rapid3rt.policies.base import (
    check_order,
    device_list,
    next_from_list,
    order_suffix,
    planned_evaluations,
    step_to,
)
from rapid3rt.types import (
    COMPUTE,
    EULER,
    REUSE,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)


class Threshold:
    """Compute where `state.drift` exceeds `x`, else reuse; every image walks the run's own grid.

    The drift is each image's own, so neighbours do not matter. An image that has spent its budget
    reuses to the end of the grid. Euler unless told otherwise: then `x = 0`, where any change
    computes, is the plain pipeline.
    """

    leaves_grid = False

    def __init__(
        self, x: float, *, order: int = EULER, budget: int | None = None, speed: float | None = None
    ) -> None:
        self.x = check_number("threshold", x, lambda v: v >= 0, "a finite number of at least 0")
        self.order, self.budget, self.speed = check_order(order), budget, speed
        self.name = f"threshold:{x:g}" + order_suffix(order)
        self._sigmas: torch.Tensor | None = None
        self._evaluations = 0

    def begin(self, run: Run) -> None:
        self._sigmas = device_list(run.sigmas, run)
        self._evaluations = planned_evaluations(run, self.budget, self.speed)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        # Without a reference there is nothing to reuse, whatever the drift says.
        wanted = (state.drift > self.x) | ~state.has_reference
        computes = wanted & (state.nfe < self._evaluations)
        action = torch.full_like(state.nfe, REUSE, dtype=torch.int8).masked_fill(computes, COMPUTE)
        return ComputeDecision(
            action=action, sparsity=torch.zeros_like(state.nfe, dtype=torch.int32)
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert self._sigmas is not None
        return step_to(next_from_list(self._sigmas, state.step), self.order)

# SPDX-License-Identifier: Apache-2.0
"""Policies that decide nothing: `dense`, the plain pipeline, and `steps:K`, fewer steps for all."""

from __future__ import annotations

import torch

from rapid3rt.errors import check_count
from rapid3rt.policies.base import (
    check_order,
    compute_all,
    device_list,
    next_from_list,
    order_suffix,
    step_to,
    trimmed_sigmas,
)
from rapid3rt.types import EULER, ComputeDecision, DenoiseState, Run, StepDecision


class Dense:
    """Compute every tick, walk the run's own grid with Euler: the identity of the package."""

    name = "dense"
    leaves_grid = False
    reuses = False

    def __init__(self) -> None:
        self._sigmas: torch.Tensor | None = None

    def begin(self, run: Run) -> None:
        self._sigmas = device_list(run.sigmas, run)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return compute_all(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert self._sigmas is not None
        return step_to(next_from_list(self._sigmas, state.step), EULER)


class Steps:
    """`steps:K[/trim][/ab2|/auto]`: every image takes the same k computed steps.

    Without `trim` the scheduler itself is set to k steps and the images equal the plain k-step
    pipeline bit for bit (order 1). `trim` walks `trimmed_sigmas(k)` instead. Order 2 is Adams-
    Bashforth, 0 the highest that is stable for the image.
    """

    reuses = False

    def __init__(self, k: int, *, trim: bool = False, order: int = EULER) -> None:
        self.k, self.trim, self.order = check_count("steps", k), trim, check_order(order)
        self.name = f"steps:{k}" + ("/trim" if trim else "") + order_suffix(order)
        self.grid_steps = None if trim else k
        self.leaves_grid = trim
        self._sigmas: torch.Tensor | None = None

    def begin(self, run: Run) -> None:
        """Build the grid. Raises `ValueError` if the run has fewer ticks than it needs."""
        steps = self.k if self.trim else len(run.sigmas) - 1
        if steps > run.ticks:
            msg = f"{self.name} must fit the run: steps must be at most {run.ticks}, got {steps}"
            raise ValueError(msg)
        self._sigmas = device_list(trimmed_sigmas(steps, run) if self.trim else run.sigmas, run)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return compute_all(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert self._sigmas is not None
        return step_to(next_from_list(self._sigmas, state.step), self.order)

# SPDX-License-Identifier: Apache-2.0
"""A policy that does what a benchmark says, and the clock of a pipeline's ticks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import rapid3rt
from rapid3rt.types import COMPUTE, REUSE, ComputeDecision, DenoiseState, Run, StepDecision


@dataclass
class Script:
    """Does what `level(image, tick)` says: computes at a sparsity level, reuses where it is None. Stays on the grid.

    ends: tick after which the first half of the images goes to sigma 0, None for no such tick. run: the latest.
    """

    level: Callable[[int, int], int | None]
    ends: int | None = None
    name: str = "script"
    leaves_grid: bool = False
    run: Run | None = None

    def begin(self, run: Run) -> None:
        self.run, self._grid = run, torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        levels = [self.level(image, state.tick) for image in range(len(state.sigma))]
        action = [REUSE if level is None else COMPUTE for level in levels]
        return ComputeDecision(
            action=torch.tensor(action, dtype=torch.int8),
            sparsity=torch.tensor([level or 0 for level in levels], dtype=torch.int32),
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        target = self._grid[state.tick + 1].expand(len(state.sigma)).clone()
        if self.ends is not None and state.tick >= self.ends:
            target[: len(target) // 2] = 0
        return StepDecision(next_sigma=target)


def time_ticks(pipe: Any, policy: Any, call: dict[str, Any], **options: Any) -> list[float]:
    """Milliseconds of every tick of a call but the first.

    policy: None for the plain pipeline. options: of `rapid3rt.accelerate`. Raises `ArithmeticError` for latents that
    are not finite: such times mean nothing.
    """
    stamps: list[float] = []

    def stamp(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        stamps.append(time.perf_counter())
        return kwargs

    if policy is not None:
        rapid3rt.accelerate(pipe, policy, **options)
    try:
        latents = pipe(**call, output_type="latent", callback_on_step_end=stamp).images
    finally:
        if policy is not None:
            rapid3rt.restore(pipe)
    if not latents.isfinite().all():
        raise ArithmeticError(f"latents must be finite under {policy}")
    return [1000 * (b - a) for a, b in itertools.pairwise(stamps)]

# SPDX-License-Identifier: Apache-2.0
"""What a learned policy does before it has learned anything: walk the searched grid, with the searched allocation.

The heads add to it, so what they are worth is what they change (METHOD.md, section 2). Shape letter: B images.
"""

from __future__ import annotations

import torch

from rapid3rt.policies.allocation import Allocator, even
from rapid3rt.policies.base import (
    Warp,
    WarpedTime,
    check_family,
    planned_evaluations,
    unshift_sigma,
)
from rapid3rt.policies.fitted import FittedSteps
from rapid3rt.policies.schedule import WarpFamily, fitted_steps
from rapid3rt.types import DenoiseState, Run

SPREAD = 0.15
"""Relative spread of a sampled step. Noise far above the effects that are sought drowns them: at a constant
concentration of 40 the sampled error was 1.3 to 2.3 times that of the mode."""
_RATIOS = (1e-3, 1 - 1e-3)
_CONCENTRATION = (20.0, 4000.0)


class Prior:
    """Plan and next step of every image in one run.

    budget: every image gets so many evaluations, counted. dial: the mean of what images get, by the family's allocation
    where it has one, else what every image gets, rounded. Neither, or a run that has a cap of its own: the run's ticks
    or that cap. stretches: a head stretches the plans of a dial, in place of the family's allocation.
    """

    def __init__(
        self,
        family: WarpFamily,
        *,
        budget: int | None = None,
        dial: float | None = None,
        stretches: bool = False,
    ) -> None:
        self.family, self.budget, self.dial, self.stretches = family, budget, dial, stretches
        self.mean = 0.0
        """Evaluations of an image in the mean, as asked for; of the run that has begun."""
        self._time: WarpedTime | None = None
        self._allocator: Allocator | None = None
        self.fitted: FittedSteps | None = None
        """Of the run that has begun: the family's, None where it has none that suits."""

    def begin(self, run: Run) -> None:
        """Raises `ValueError` if the run is of another model family."""
        check_family(self.family.family, run, "the policy")
        self.fitted = fitted_steps(self.family, run)
        warp = Warp(self.family.knots)
        self._time = WarpedTime(run, warp)
        start = warp.inverse(unshift_sigma(run.sigmas[0], run.shift))
        self._allocator = None
        if self.dial is None or self.budget is not None or run.budget is not None:
            self.mean = float(planned_evaluations(run, self.budget))
        elif self.family.allocation is None and not self.stretches:
            self.mean = float(min(max(1, round(self.dial)), run.ticks))
        else:
            self.mean = min(self.dial, float(run.ticks))
            searched = None if self.stretches else self.family.allocation
            self._allocator = Allocator(
                searched or even(run.ticks), self.mean, run, start, self.stretches
            )

    @property
    def allocates(self) -> bool:
        """Whether images have numbers of their own in the run that has begun."""
        return self._allocator is not None

    @property
    def is_elsewhere(self) -> bool:
        """Whether the family has fitted steps that do not suit the run that has begun.

        What an image gains by more of them was learned with those steps: at another guidance scale, where steps take
        the family's order, a trained allocation had 1.5 to 2.2 times the error of the same number for all (tiny SD3 at
        7 instead of 3.5).
        """
        return self.family.fit is not None and self.fitted is None

    def left(
        self, state: DenoiseState, velocity: torch.Tensor, stretch: torch.Tensor
    ) -> torch.Tensor:
        """Evaluations that are left to every image, this tick's included: float32 `[B]` of whole numbers.

        stretch: float32 `[B]`, what an allocation head multiplies the plan by; 1 adds nothing.
        """
        assert self._time is not None
        if self._allocator is None:
            return (self.mean - state.nfe).clamp(min=1)
        u = self._time.u(state.sigma)
        return self._allocator.left(state, velocity, u, stretch)

    def ratio(self, sigma: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """m: the sigma that is next over the present one, float32 `[B]` within 0.001 to 0.999."""
        assert self._time is not None
        following = self._time.sigma(self._time.u(sigma) * (1 - 1 / left))
        return (following / sigma.clamp(min=1e-6)).clamp(*_RATIOS)


def step_logits(ratio: torch.Tensor) -> torch.Tensor:
    """What a step head adds to: `[B, 2]`, ln(kappa m) and ln(kappa (1 - m)).

    Beta(1 + exp(first), 1 + exp(second)) is densest at m and spreads about `SPREAD` of it: kappa = m / (spread^2 (1 -
    m)), within 20 to 4,000.
    """
    kappa = (ratio / (SPREAD**2 * (1 - ratio))).clamp(*_CONCENTRATION)
    return torch.stack([(kappa * ratio).log(), (kappa * (1 - ratio)).log()], 1)

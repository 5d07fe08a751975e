# SPDX-License-Identifier: Apache-2.0
"""How many evaluations each image gets: more where the image that is coming shows more detail.

The error of an image after k evaluations is about c / k^p, and how log c differs between images can be read early from
one number: the energy of the gradient of the image predicted so far, x - sigma v (tiny SD3: it explains half of the
variance of log error after the second evaluation, two thirds after the third). At a given mean of k the least total
error has k in proportion to c^(1 / (p + 1)). `calibrate` fits offset and exponent over u; nothing is trained.

Guidance makes all images more contrasty, not more different: the mean of the detail is linear in log guidance (tiny
SD3, 1.75 to 10: within 0.2 at early u, where it decides), so the offset follows it.

Shape letters: B images, C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from rapid3rt.policies.base import device_list, interpolate
from rapid3rt.types import DenoiseState, Run

MOST, LEAST = 2.0, 0.8
"""An image gets at most twice and at least 0.8 of b: below that, errors rise faster than detail can tell."""
LEAST_LEARNED, FEWEST_LEARNED = 0.5, 3.0
"""The same where a trained head tells images apart; but with two evaluations no image is one (tiny FLUX: 30 times the
error of three)."""
SLACK = 0.25
"""Of an even step: what may be left over at the end without an evaluation of its own."""
_TINY = 1e-12


def detail(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Log of the mean squared difference of neighbours in x - sigma v, the image predicted from here.

    latents, velocity: `[B, C, h, w]`, any float dtype. sigma: float32 `[B]`. Returns float32 `[B]`.
    """
    predicted = latents.float() - sigma[:, None, None, None] * velocity.float()
    down, across = (predicted.diff(dim=axis).square().sum((1, 2, 3)) for axis in (2, 3))
    return ((down + across) / predicted[0].numel() + _TINY).log()


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """An image of detail g at u gets b exp(e(u) (g - o(u))) evaluations of a mean of b.

    table: (u, o, e, t), u rising. guidance: the scale that o was measured at, None where there is none; at another one
    G, t(u) ln(G / guidance) is added to o(u). dial: (b, mean of the evaluations that were then taken), both rising.
    """

    table: tuple[tuple[float, float, float, float], ...]
    dial: tuple[tuple[float, float], ...]
    guidance: float | None = None

    def setting(self, evaluations: float) -> float:
        """The b whose mean is nearest to a wanted number of evaluations; proportional beyond the dial's ends."""
        (first, fewest), (last, most) = self.dial[0], self.dial[-1]
        if evaluations <= fewest:
            return first * evaluations / fewest
        for (b0, m0), (b1, m1) in pairwise(self.dial):
            if evaluations <= m1:
                return b0 + (b1 - b0) * (evaluations - m0) / (m1 - m0)
        return last * evaluations / most


class Allocator:
    """An allocation in one run.

    mean: wanted mean of the evaluations of an image. start: u where the run begins. is_learned: a head stretches plans.
    """

    def __init__(
        self,
        allocation: Allocation,
        mean: float,
        run: Run,
        start: float = 1.0,
        is_learned: bool = False,
    ) -> None:
        self._setting, self._start, self._ticks = allocation.setting(mean), start, run.ticks
        self._limits = limits(self._setting, self._ticks, is_learned)
        stronger = log_ratio(run.guidance, allocation.guidance)
        rows = [(u, o + t * stronger, e) for u, o, e, t in allocation.table]
        self._u, self._offset, self._exponent = (
            device_list(column, run) for column in zip(*rows, strict=True)
        )

    def left(
        self,
        state: DenoiseState,
        velocity: torch.Tensor,
        u: torch.Tensor,
        stretch: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """Even steps in u that are left to every image, this tick's included: float32 `[B]` of whole numbers.

        stretch: multiplies the plan, within its limits.
        What an image has spent does not count: were it made up for, a number that is corrected late would end in one
        long step (measured: an image went from sigma 0.79 to 0 when its five evaluations became four).
        """
        offset, exponent = (interpolate(u, self._u, y) for y in (self._offset, self._exponent))
        factor = (exponent * (detail(state.latents, velocity, state.sigma) - offset)).exp()
        planned = (self._setting * factor * stretch).clamp(*self._limits)
        return whole(u / self._start * planned).clamp(max=self._ticks - state.tick)


def whole(steps: torch.Tensor) -> torch.Tensor:
    """Evaluations that so many even steps take, of any shape: at least one, and what is left over may be `SLACK`."""
    return (steps - SLACK).ceil().clamp(min=1)


def log_ratio(guidance: float | None, reference: float | None) -> float:
    """How much stronger one guidance scale is than another, 0 where one of them is not known.

    Scales up to 1 are one: they switch classifier-free guidance off.
    """
    if guidance is None or reference is None:
        return 0.0
    return math.log(max(guidance, 1.0) / max(reference, 1.0))


def limits(setting: float, ticks: int, is_learned: bool = False) -> tuple[float, float]:
    """Fewest and most evaluations of an image at a setting b."""
    most = min(MOST * setting, float(ticks))
    least = LEAST * setting
    if is_learned:
        least = max(LEAST_LEARNED * setting, min(FEWEST_LEARNED, setting))
    return min(least, most), most


def even(ticks: int) -> Allocation:
    """The allocation that gives all images the same, for heads to stretch."""
    flat = ((0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))
    return Allocation(table=flat, dial=((1.0, 1.0), (float(ticks), float(ticks))))

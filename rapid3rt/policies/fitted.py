# SPDX-License-Identifier: Apache-2.0
"""Weights of fitted steps: what a family knows of the solver's mean error at every step of every k.

Weights of a step of `order` FITTED (`runtime.solver`) depend on how many
evaluations k an image gets and on which of them this is, j: they were fitted at a few k (`calibrate.fitting`) and are
interpolated between these, along the position of j within k. They belong to the runs that they were fitted on: under
another guidance scale, shift or start, or at another number of tokens the flow is another, and the family's order is
taken instead.

Shape letters: B images, T ticks of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from rapid3rt.types import FITTED, NUM_WEIGHTS, Run, StepDecision

START_UP = 2
"""First steps, which have no or one velocity before them: a row of their own at every k."""
_NEAR, _MOST_TOKENS = 0.02, 1.25
"""How far a run may differ: scales and start; number of tokens, as a factor."""

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """weights: k, rising, and k rows of `NUM_WEIGHTS`. tokens: of an image, guidance, extra_guidance: scales as `Run`
    has them, of the runs that they were fitted on.
    """

    weights: tuple[tuple[int, tuple[Row, ...]], ...]
    tokens: int
    guidance: float | None = None
    extra_guidance: float | None = None

    def rows(self, k: int) -> tuple[Row, ...] | None:
        """Weights of the k evaluations of an image; None below the k that were fitted.

        Above them those of the largest: weights settle as steps grow short (tiny SD3, fitted up to 17: at 22 and 28 the
        root error was halved as it was at 17).
        """
        tables = dict(self.weights)
        if k in tables:
            return tables[k]
        if k > max(tables):
            return tuple(stretched(tables[max(tables)], k))
        for low, high in pairwise(tables):
            if low < k < high:
                share = math.log(k / low) / math.log(high / low)
                ends = (stretched(tables[end], k) for end in (low, high))
                return tuple(_between(a, b, share) for a, b in zip(*ends, strict=True))
        return None

    def misfit(self, run: Run, shift: float) -> str | None:
        """In what a run differs from those that were fitted, None where it is like them. shift: of these."""
        tokens = run.resolution[0] * run.resolution[1]
        if not 1 / _MOST_TOKENS <= tokens / self.tokens <= _MOST_TOKENS:
            return f"{tokens} image tokens, not {self.tokens}"
        if run.sigmas[0] < 1 - _NEAR:
            return f"a start at sigma {run.sigmas[0]:.3g}, not 1"
        if not _is_near(run.shift, shift):
            return f"shift {run.shift:.4g}, not {shift:.4g}"
        for what in ("guidance", "extra_guidance"):
            scales = getattr(run, what), getattr(self, what)
            if not _is_near(*scales):
                given, known = ("none" if x is None else f"{x:g}" for x in scales)
                return f"{what.replace('_', ' ')} {given}, not {known}"
        return None


def _is_near(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return abs(a - b) <= _NEAR * max(abs(a), abs(b))


def stretched(rows: Sequence[Row], k: int) -> list[Row]:
    """The rows of another k at the places of k evaluations: start-up on start-up, the last on the last."""
    end, stretched = len(rows) - 1, []
    for j in range(k):
        place = float(min(j, end))
        if j >= START_UP and end > START_UP:
            place = START_UP + (j - START_UP) / max(k - 1 - START_UP, 1) * (end - START_UP)
        low = int(place)
        stretched.append(_between(rows[low], rows[min(low + 1, end)], place - low))
    return stretched


def _between(a: Row, b: Row, share: float) -> Row:
    return tuple(x + share * (y - x) for x, y in zip(a, b, strict=True))


class FittedSteps:
    """A fit in one run, looked up on the device. order: where no weights are known."""

    def __init__(self, fit: Fit, run: Run, order: int) -> None:
        table = torch.zeros(run.ticks + 1, run.ticks, NUM_WEIGHTS)
        orders = torch.full((run.ticks + 1, run.ticks), order, dtype=torch.int8)
        for k in range(1, run.ticks + 1):
            rows = fit.rows(k)
            if rows is not None:
                table[k, :k] = torch.tensor(rows)
                orders[k, :k] = FITTED
        self._table, self._orders = table.to(run.device), orders.to(run.device)

    def decision(
        self, next_sigma: torch.Tensor, planned: torch.Tensor, nfe: torch.Tensor
    ) -> StepDecision:
        """Send every image on. planned: k of each, nfe: how many it had before this one; `[B]`, whole numbers."""
        k = planned.long().clamp(0, self._orders.shape[0] - 1)
        j = nfe.long().clamp(max=self._orders.shape[1] - 1)
        return StepDecision(
            next_sigma=next_sigma, order=self._orders[k, j], weights=self._table[k, j]
        )

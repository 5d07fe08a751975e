# SPDX-License-Identifier: Apache-2.0
"""The last stage of a search: weights for the steps of what was found, and the best of what there is then.

The search itself steps at orders that need no weights. A schedule whose ticks all compute densely is fitted as
`calibrate` fits a family (`rapid3rt.calibrate.fitting`); one that reuses or is sparse stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from rapid3rt.calibrate.fitting import FIT_PAIRS, as_rows, fit_grid
from rapid3rt.calibrate.measure import Bench
from rapid3rt.policies import FixedPlan, FixedSchedule, WarpFamily
from rapid3rt.policies.fitted import Row
from rapid3rt.types import COMPUTE, FITTED

_START: Row = (0.0, 0.0, 0.3, 0.0)


def errors_of(bench: Bench, plan: FixedPlan, pairs: Sequence[int]) -> torch.Tensor:
    """Squared errors of a schedule, float64 `[n]`."""
    name = hashlib.sha256(repr(plan.ticks).encode()).hexdigest()[:16]
    computes = sum(tick.action == COMPUTE for tick in plan.ticks)
    return bench.errors(FixedSchedule(plan), computes, f"schedule {name}", pairs=pairs)


def finish(
    bench: Bench, plan: FixedPlan, even: FixedPlan, family: WarpFamily, seen: Sequence[int]
) -> FixedPlan:
    """The best on the pairs that decide: the plan, the plan with fitted weights, the family's grid with those it has.

    even: the family's grid at the same number of evaluations.
    """
    candidates = [plan]
    known = family.fit.rows(len(even.ticks)) if family.fit is not None else None
    if all(tick.action == COMPUTE and tick.level == 0 for tick in plan.ticks):
        start = known or (_START,) * len(plan.ticks)
        candidates.append(_fitted(bench, plan, start, seen[:FIT_PAIRS]))
    if known is not None:
        candidates.append(with_weights(even, known))
    return min(candidates, key=lambda p: float(errors_of(bench, p, seen).sqrt().mean()))


def _fitted(bench: Bench, plan: FixedPlan, start: Sequence[Row], pairs: Sequence[int]) -> FixedPlan:
    sigmas = [*(tick.sigma for tick in plan.ticks), 0.0]
    key = "fit of " + " ".join(f"{sigma:.6g}" for sigma in sigmas)
    make = partial(fit_grid, bench, lambda _: sigmas, pairs, start, 1)
    return with_weights(plan, as_rows(bench.remember(key, make)))


def with_weights(plan: FixedPlan, rows: Sequence[Row]) -> FixedPlan:
    """The plan, every tick stepping by weights."""
    ticks = (
        replace(tick, order=FITTED, weights=row) for tick, row in zip(plan.ticks, rows, strict=True)
    )
    return replace(plan, ticks=tuple(ticks))

# SPDX-License-Identifier: Apache-2.0
"""Order and warp of a family, by the errors of its schedules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from tqdm import tqdm

from rapid3rt.calibrate.measure import Bench
from rapid3rt.policies import WarpFamily
from rapid3rt.policies.base import Warp, shift_sigma
from rapid3rt.policies.schedule import SMALLEST_LAST_SIGMA
from rapid3rt.types import AUTO, EULER

NUM_KNOTS = 6
SEARCH_STEPS = (5, 6, 8, 12)
FEWEST_TICKS = 8
SEARCH_PROMPTS = 64
"""Pairs that decide the grid, at most: it has few numbers. The offsets of an allocation, which have to be right on
average over all that users ask for, are read from all pairs."""


def search(bench: Bench, evaluations: int) -> WarpFamily:
    """The best family found. First one number (a change of shift), then the knots by coordinate steps that shrink.

    What is lowered is the mean over images of the root of the error, on a log scale over k: the mean of the error
    itself hangs on the two or three images whose outcome flips, and does not say which grid is better for the others.
    """
    spent = 0
    bar = tqdm(total=evaluations, desc="grid search", disable=not bench.progress)
    ks = [k for k in SEARCH_STEPS if k <= bench.steps]
    pairs = range(min(SEARCH_PROMPTS, len(bench.prompts)))

    def objective(order: int, knots: Sequence[float]) -> float:
        nonlocal spent
        if not _is_valid(knots, bench):
            return math.inf
        spent += 1
        bar.update()
        family = _family(bench, order, knots)
        errors = (bench.family_errors(family, k, pairs=pairs) for k in ks)
        return sum(float(e.sqrt().mean().log()) for e in errors) / len(ks)

    bench.reference()
    # Adams-Bashforth everywhere is no candidate: where it wins here it may still explode at another guidance scale.
    scores: dict[tuple[int, float], float] = {}

    def try_shift(order: int, ratio: float) -> None:
        scores[order, ratio] = objective(order, _shifted(ratio))

    for ratio, order in itertools.product((1.0, 0.7, 1.4, 0.5, 2.0, 0.35, 2.8), (AUTO, EULER)):
        if spent < evaluations:
            try_shift(order, ratio)
    order, ratio = min(scores, key=lambda key: scores[key])
    for factor in (0.84, 1.19):
        try_shift(order, ratio * factor)
    order, ratio = min(scores, key=lambda key: scores[key])
    knots, best = _shifted(ratio), scores[order, ratio]
    width = 0.25
    while spent < evaluations and width > 0.02:
        moved: set[int] = set()
        for i, sign in itertools.product(range(NUM_KNOTS), (1, -1)):
            if i in moved or spent >= evaluations:
                continue
            trial = _moved(knots, i, sign * width)
            score = objective(order, trial)
            if score < best:
                knots, best = trial, score
                moved.add(i)
        width *= 1.0 if moved else 0.5
        bar.set_postfix(error=f"{math.exp(best):.4f}")
    bar.close()
    return _family(bench, order, knots)


def _shifted(ratio: float) -> list[float]:
    """Knots of the warp that multiplies the scheduler's shift by a ratio."""
    return [shift_sigma((i + 1) / (NUM_KNOTS + 1), ratio) for i in range(NUM_KNOTS)]


def _moved(knots: Sequence[float], i: int, share: float) -> list[float]:
    """Knot i moved by a share of the distance to its neighbour on that side."""
    padded = [0.0, *knots, 1.0]
    neighbour = padded[i + 2] if share > 0 else padded[i]
    out = list(knots)
    out[i] = padded[i + 1] + abs(share) * (neighbour - padded[i + 1])
    return out


def _is_valid(knots: Sequence[float], bench: Bench) -> bool:
    """Strictly rising, and the grid of all steps ends no lower than what a schedule file allows."""
    rising = all(b - a > 1e-3 for a, b in zip([0.0, *knots], [*knots, 1.0], strict=True))
    if not rising:
        return False
    u = [(i + 1) / (NUM_KNOTS + 1) for i in range(NUM_KNOTS)]
    last = shift_sigma(Warp(tuple(zip(u, knots, strict=True)))(1 / bench.steps), bench.shift)
    return last >= SMALLEST_LAST_SIGMA


def _family(bench: Bench, order: int, knots: Sequence[float]) -> WarpFamily:
    """The family of some knot values at even u."""
    u = [(i + 1) / (NUM_KNOTS + 1) for i in range(NUM_KNOTS)]
    return WarpFamily(
        family=bench.family_name,
        num_ticks=bench.steps,
        shift=bench.shift,
        order=order,
        knots=tuple(zip(u, knots, strict=True)),
    )

# SPDX-License-Identifier: Apache-2.0
"""Made-up studies whose answers are known: error c / k^2, c log-normal over pairs, and ours with the best plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rapid3rt.tiny.scenes import sample
from training.comparison import Comparison
from training.study import Curve, Measured, Study

N = 60
DIALS = (5, 6, 8)
TABLES = (4, 6, 8, 11, 16)


def measured(
    error: np.ndarray, cost: np.ndarray | float, seeds: int = 1, **more: object
) -> Measured:
    """Of errors `[N]` or `[S, N]`; everything else is the same for all pairs."""
    error = np.broadcast_to(error, (seeds, error.shape[-1]))
    same = {name: np.ones_like(error) for name in ("score", "psnr", "ssim")}
    cost = np.broadcast_to(cost, error.shape)
    given = {"nfe": cost, **same, **more}
    return Measured(error=error, cost=cost, **given)  # type: ignore[arg-type]


def hardness(spread: float = 1.0) -> np.ndarray:
    """Errors at one evaluation, log-normal, by no order that scenes know."""
    return np.exp(spread * np.random.default_rng(3).normal(size=N))


def curve(c: np.ndarray, ks: tuple[float, ...], factor: float = 1.0, power: float = 2.0) -> Curve:
    return {k: measured(factor * c * k**-power, k) for k in ks}


def best_plan(c: np.ndarray, mean: float) -> np.ndarray:
    """Evaluations `[N]` in proportion to c^(1/3): the least mean error at a mean, where m = c / k^2."""
    plan: np.ndarray = c ** (1 / 3) / (c ** (1 / 3)).mean() * mean
    return plan


def study(**changes: object) -> Study:
    """Ours spends in proportion to c^(1/3); all others the same on every image."""
    c = hardness()
    ours = {}
    for k in (4, *DIALS, 12):
        plan = best_plan(c, k)
        ours[float(k)] = measured(c / plan**2, plan)
    made = Study(
        scenes=sample(N, 0),
        dials=DIALS,
        tables=TABLES,
        dense=1.0,
        full=measured(c / 100, 28.0),
        ours=ours,
        rivals={
            "plain": curve(c, DIALS, factor=4),
            "steps/trim": curve(c, DIALS, factor=3),
            "prior": curve(c, DIALS),
        },
        searched=curve(c, (4, 5, 6, 7, 8, 9, 11, 16)),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def comparison(**changes: object) -> Comparison:
    return Comparison(study(**changes), draws=200)

# SPDX-License-Identifier: Apache-2.0
"""The statistics of an evaluation (METHOD.md, section 6): pure functions of arrays.

Everything is measured on the same pairs of prompt and noise, so one draw of the bootstrap weighs the pairs of all ways
at once. Row 0 of the draws weighs them equally: a statistic of draws is its own value (entry 0) and its distribution
(the rest), and `estimate` makes a number with an interval of it.

Shape letters: D draws + 1, S training seeds, N pairs, K points of a curve. All arrays are float64.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
TAIL = 0.1
NEVER_WORSE = 0.02
"""Upper bound of the relative difference up to which a way is never worse than another."""
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval. Infinite where a draw has no answer (an accuracy that is never reached)."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON: what is not finite is null."""
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {name: part if math.isfinite(part) else None for name, part in parts.items()}


def estimate(draws: Array) -> Estimate:
    """Value and percentile interval of a statistic `[D]`. Raises `ValueError` for NaN or less than one redraw."""
    if draws.ndim != 1 or len(draws) < 2 or np.isnan(draws).any():
        raise ValueError(f"draws must be a value and redraws of it without NaN, got {draws}")
    # The nearest draw: between a finite draw and an infinite one there is nothing to interpolate.
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(draws[1:], ends, method="nearest")
    return Estimate(value=float(draws[0]), low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Weights of every draw. pairs: `[D, N]`; seeds: `[D, S]`; every row sums to 1 and row 0 is uniform.

    Weights of seeds may be negative: the mean over all trainings may well lie beyond a few that were made.
    """

    pairs: Array
    seeds: Array

    def mean(self, values: Array) -> Array:
        """Weighted mean of values `[S, N]` (or `[1, N]`, of what has no training seed), `[D]`."""
        return self._over_seeds(np.stack([self.pairs @ row for row in values], axis=1))

    def worst(self, values: Array, tail: float = TAIL) -> Array:
        """Mean of the largest values, a tenth of the weight, seed by seed, `[D]`. values: as for `mean`."""
        return self._over_seeds(np.stack([self._tail(row, tail) for row in values], axis=1))

    def within(self, chosen: NDArray[np.bool_]) -> Draws:
        """Of some pairs alone, `[N]` bool: weights `[D, n]`. A draw that has none of them weighs them equally."""
        weights = self.pairs[:, chosen]
        if weights.shape[1] == 0:
            raise ValueError("chosen must hold at least one pair, got none")
        total = weights.sum(1, keepdims=True)
        even = np.full_like(weights, 1 / weights.shape[1])
        weights = np.divide(weights, total, out=even, where=total > 0)
        return Draws(pairs=weights, seeds=self.seeds)

    def _tail(self, values: Array, tail: float) -> Array:
        order = np.argsort(-values, kind="stable")
        weights = self.pairs[:, order]
        taken = np.clip(tail - (weights.cumsum(1) - weights), 0, weights)
        return np.asarray(taken @ values[order] / taken.sum(1))

    def _over_seeds(self, by_seed: Array) -> Array:
        if by_seed.shape[1] == 1:
            return by_seed[:, 0]
        if by_seed.shape[1] != self.seeds.shape[1]:
            got = by_seed.shape[1]
            raise ValueError(f"values must have 1 or {self.seeds.shape[1]} seeds, got {got}")
        return np.asarray((by_seed * self.seeds).sum(1))


def bootstrap(groups: Sequence[Hashable], seeds: int, draws: int, seed: int = 0) -> Draws:
    """Redraw groups of pairs with replacement, and the mean over training seeds from its t distribution.

    Redraws of three seeds would never leave their hull: where nothing but the seeds differs, one claim in four would be
    false. So weights of seeds are 1 / S + e / sqrt(S (S - 1) q), e normal less its mean, q chi-square over its S - 1
    degrees of freedom: the weighted mean of any S numbers is then their mean + t s / sqrt(S).

    groups: what pair i belongs to, `[N]`: its prompt, so that pairs that share one are drawn together; each pair has
    its own noise. seeds: number S of trained policies. draws: redraws. The same arguments give the same draws.
    """
    if not len(groups) or seeds < 1 or draws < 1:
        got = f"{len(groups)} pairs, {seeds} seeds, {draws} draws"
        raise ValueError(f"pairs, seeds and draws must be at least 1, got {got}")
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([names[name] for name in groups])
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    pairs = np.concatenate([np.ones((1, len(member))), counts[:, member]])
    weights = np.full((1 + draws, seeds), 1 / seeds)
    if seeds > 1:
        normal = rng.normal(size=(draws, seeds))
        scale = rng.chisquare(seeds - 1, size=(draws, 1)) / (seeds - 1)
        weights[1:] += (normal - normal.mean(1, keepdims=True)) / np.sqrt(
            seeds * (seeds - 1) * scale
        )
    return Draws(pairs=pairs / pairs.sum(1, keepdims=True), seeds=weights)


def difference(ours: Array, theirs: Array) -> Array:
    """Relative difference of two statistics, ours / theirs - 1, draw by draw, at least -1: `[D]`.

    Less than a billionth is rounding, and 0: what is the same must not come out as surely better.
    """
    relative = np.maximum(ours, 0) / np.maximum(theirs, _TINY) - 1
    return np.where(np.abs(relative) < 1e-9, 0.0, relative)


def p_value(draws: Array) -> float:
    """Two-sided bootstrap p of `[D]` being 0: twice the smaller share of redraws beyond it; at least 2 / D."""
    redraws = draws[1:]
    beyond = min(int((redraws >= 0).sum()), int((redraws <= 0).sum()))
    return min(1.0, 2 * (1 + beyond) / (1 + len(redraws)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = floor
    return adjusted


def never_worse(difference: Estimate) -> bool:
    """Whether a relative difference is at most 2 % at its upper bound."""
    return difference.high <= NEVER_WORSE


def at_cost(cost: Array | float, costs: Array, errors: Array) -> Array:
    """Error of a curve at a mean cost, log-log interpolated, draw by draw.

    cost: `[D]` or a number. costs, errors: `[K, D]`, K >= 2, costs rising. Returns `[D]`. Beyond its ends a curve goes
    on as its last piece does. Raises `ValueError` for a curve that does not rise in cost.
    """
    x, y = _rising(costs), np.log(np.maximum(errors, _TINY))
    at = np.log(np.broadcast_to(np.maximum(cost, _TINY), x.shape[1:]))
    piece = np.clip((x <= at).sum(0), 1, len(x) - 1)
    draw = np.arange(x.shape[1])
    x0, x1, y0, y1 = x[piece - 1, draw], x[piece, draw], y[piece - 1, draw], y[piece, draw]
    return np.asarray(np.exp(y0 + (at - x0) / (x1 - x0) * (y1 - y0)))


def reaching(goal: Array | float, costs: Array, errors: Array) -> Array:
    """The least mean cost at which a curve comes down to an error, log-log interpolated, `[D]`; infinite if never.

    Arguments as `at_cost`. A curve that is below the goal at its first point answers that point's cost: a bound.
    """
    x, y = _rising(costs), np.log(np.maximum(errors, _TINY))
    target = np.log(np.broadcast_to(np.maximum(goal, _TINY), x.shape[1:]))
    answer = np.where(y[0] <= target, x[0], np.inf)
    for i in range(1, len(x)):
        down = (y[i] <= target) & np.isinf(answer)
        share = (y[i - 1] - target) / np.where(down, y[i - 1] - y[i], 1.0)
        answer = np.where(down, x[i - 1] + share * (x[i] - x[i - 1]), answer)
    return np.exp(answer)


def _rising(costs: Array) -> Array:
    logs = np.log(np.maximum(costs, _TINY))
    if len(logs) < 2 or not (np.diff(logs[:, 0]) > 0).all():
        got = [round(float(c), 3) for c in costs[:, 0]] if len(costs) else []
        raise ValueError(f"costs of a curve must be two or more that rise, got {got}")
    # A redraw may bring two points so near that they change places: they stay a thousandth apart.
    gap = 1e-3 * np.arange(len(logs))[:, None]
    return np.asarray(np.maximum.accumulate(logs - gap, axis=0) + gap)


def power_law(ks: Sequence[int], errors: Array) -> tuple[Array, Array]:
    """Least squares fits log m_i(k) = a_i - p_i log k.

    ks: two or more different numbers of evaluations. errors: `[K, N]`. Returns a and p, `[N]`.
    """
    x, y = np.log(np.asarray(ks, dtype=np.float64)), np.log(np.maximum(errors, _TINY))
    if len(set(ks)) < 2 or y.shape[:1] != x.shape:
        got = f"{list(ks)} and errors of shape {errors.shape}"
        raise ValueError(f"ks must be two or more different ones, one per row of errors, got {got}")
    centred = x - x.mean()
    p = -(centred @ y) / (centred @ centred)
    return y.mean(0) + p * x.mean(), p


def fitted_mean(a: Array, p: Array, k: Array, draws: Draws) -> Array:
    """Mean error of the fits when every image gets k evaluations, `[D]`. a, p: `[N]`; k: `[D]`, not only integers."""
    logs = a[None, :] - np.log(k)[:, None] * p[None, :]
    return np.asarray((draws.pairs * np.exp(logs)).sum(1))


def oracle(a: Array, p: Array, k: Array, draws: Draws, least: int, most: int) -> Array:
    """Mean error of the fits when every image gets the number that is best at a mean of at most k: `[D]`.

    a, p: fits of `power_law`, `[N]`. k: mean to spend, `[D]`, at least `least`. Each image takes an integer in `least`
    to `most`. The errors are convex in k, so the Lagrangian optimum takes single evaluations in the order of what they
    gain; the last one may be taken in part, which is a mixture of two optima.
    """
    if not 1 <= least <= most or (k < least).any():
        got = f"{least}, {most} and a mean of {float(k.min()):g}"
        raise ValueError(
            f"least and most must rise from 1 on, the mean be at least least, got {got}"
        )
    logs = np.log(np.arange(least, most + 1))
    errors = np.exp(a[:, None] - p[:, None] * logs)
    gains = (errors[:, :-1] - errors[:, 1:]).ravel()
    order = np.argsort(-gains, kind="stable")
    order = order[gains[order] > 0]
    image = order // max(1, most - least)
    best = np.empty(len(draws.pairs))
    for i, weights in enumerate(draws.pairs):
        spent = np.concatenate([[0.0], weights[image].cumsum()])
        gained = np.concatenate([[0.0], (weights[image] * gains[order]).cumsum()])
        best[i] = weights @ errors[:, 0] - np.interp(k[i] - least, spent, gained)
    return best


def lookup(ks: Sequence[int], errors: Array, spent: Array) -> Array:
    """Every image's error at its own number of evaluations, log-log interpolated in its row of a table: `[N]`.

    ks: rising, two or more. errors: `[K, N]`. spent: `[N]`. Beyond the table's ends as at its ends: the error of one
    image may rise over the last piece, and would rise without bound.
    """
    spent = np.clip(spent, ks[0], ks[-1])
    return at_cost(spent, np.repeat(np.asarray(ks, np.float64)[:, None], len(spent), 1), errors)


def derangement(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A uniformly drawn permutation `[n]` that leaves nothing in its place. Raises `ValueError` below 2."""
    if n < 2:
        raise ValueError(f"n must be at least 2 (nobody else's plan to take), got {n}")
    while True:  # succeeds with probability 1 / e
        drawn = rng.permutation(n)
        if not (drawn == np.arange(n)).any():
            return drawn


def thirds(difficulty: Array) -> NDArray[np.int64]:
    """0 for the easiest third, 1, 2 for the hardest, `[N]`; ties and remainders by position."""
    ranks = np.empty(len(difficulty), np.int64)
    ranks[np.argsort(difficulty, kind="stable")] = np.arange(len(difficulty))
    return ranks * 3 // len(difficulty)

# SPDX-License-Identifier: Apache-2.0
"""What was measured, and what it says: every way's error at its cost, ours against every rival at equal cost.

Everything that leaves here is plain data for JSON. Cost is in equivalent steps, mean over images. Ours is read at the
rival's cost off its own curve over dials; searched schedules, which take integers only, are read at ours, between the
integers below and above it (METHOD.md, section 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.statistics import (
    Array,
    Draws,
    at_cost,
    bootstrap,
    difference,
    estimate,
    holm,
    never_worse,
    p_value,
    reaching,
)
from training.study import Curve, Measured, Study
from training.ways import PLAIN

ALPHA = 0.05
SCORE_DROP = 0.01
"""Upper bound of the fall of the scene score up to which ours is not inferior to the full run."""
_SLACK = 1.05
"""How far beyond its ends a curve is read, as a factor of cost."""
_STEP = 1.001
"""From one point of a curve to the next, at least, as a factor of cost."""
OURS, SEARCHED = "ours", "searched"

Json = dict[str, Any]
Chosen = NDArray[np.bool_]


class Comparison:
    """A study and its bootstrap. draws: how many redraws."""

    def __init__(self, study: Study, draws: int, seed: int = 0) -> None:
        self.study, self._count, self._seed = study, draws, seed
        self._known: dict[int, Draws] = {}
        self._curves: dict[tuple[int, int], tuple[Array, Array, Array]] = {}

    def draws(self, pairs: int) -> Draws:
        """Of the first pairs: the same for every way, so that all comparisons are paired."""
        if pairs not in self._known:
            captions = [scene.caption for scene in self.study.scenes[:pairs]]
            seeds = next(iter(self.study.ours.values())).error.shape[0]
            self._known[pairs] = bootstrap(captions, seeds, self._count, self._seed)
        return self._known[pairs]

    def ways(self) -> Json:
        """Every way at every setting: cost, error, worst tenth, score and similarity to the full run."""
        study = self.study
        curves = {OURS: study.ours, SEARCHED: study.searched, **study.schedules, **study.rivals}
        return {"full": self._point(study.full)} | {
            name: {f"{k:g}": self._point(curve[k]) for k in sorted(curve)}
            for name, curve in curves.items()
        }

    def _point(self, way: Measured) -> Json:
        draws, full = self.draws(way.pairs), self.study.full.score[:, : way.pairs]
        point: Json = {"pairs": way.pairs, "nfe": float(way.nfe.mean())}
        for name in ("cost", "error", "score", "psnr", "ssim"):
            point[name] = estimate(draws.mean(getattr(way, name))).to_dict()
        point["worst_tenth"] = estimate(draws.worst(way.error)).to_dict()
        drop = estimate(draws.mean(full - way.score))
        point["score_drop"] = {**drop.to_dict(), "not_inferior": drop.high <= SCORE_DROP}
        if len(way.error) > 1:
            point["error_by_seed"] = way.error.mean(1).tolist()
        return point

    def against(self) -> Json:
        """Ours relative to every rival at equal cost, by dial; p-values Holm-corrected over dials."""
        study = self.study
        searched = {
            name: self._corrected({float(k): self.at_ours(study.ours[k], c) for k in study.dials})
            for name, c in {SEARCHED: study.searched, **study.schedules}.items()
        }
        return searched | {
            name: self._corrected({k: self._at_theirs(way) for k, way in curve.items()})
            for name, curve in study.rivals.items()
        }

    def _at_theirs(self, rival: Measured) -> Json:
        draws = self.draws(rival.pairs)
        cost = draws.mean(rival.cost)
        costs, errors, worst = self.curve(self.study.ours, rival.pairs)
        if not _covers(costs, cost):
            return _beyond("ours", costs, cost)
        theirs = draws.mean(rival.error), draws.worst(rival.error)
        ours = at_cost(cost, costs, errors), at_cost(cost, costs, worst)
        return _compared(cost, ours, theirs)

    def at_ours(self, ours: Measured, curve: Curve, chosen: Chosen | None = None) -> Json:
        """Ours relative to a curve at the cost that ours has. chosen: bool `[N]`, the pairs to look at, else all."""
        pairs = min(ours.pairs, *(way.pairs for way in curve.values()))
        draws, keep = self._some(pairs, chosen)
        cost = draws.mean(ours.cost[:, keep])
        costs, errors, worst = self.curve(curve, pairs, chosen)
        if not _covers(costs, cost):
            return _beyond("the schedules", costs, cost)
        theirs = at_cost(cost, costs, errors), at_cost(cost, costs, worst)
        mine = draws.mean(ours.error[:, keep]), draws.worst(ours.error[:, keep])
        return _compared(cost, mine, theirs)

    def curve(
        self, curve: Curve, pairs: int, chosen: Chosen | None = None
    ) -> tuple[Array, Array, Array]:
        """Mean cost, mean error and worst tenth of the error at every point, `[K, D]` each, on the first pairs.

        Points rise in cost. A rule at the end of its range costs the same at two settings: the first one stands.
        """
        key = (id(curve), pairs)  # curves live as long as the study
        if chosen is None and key in self._curves:
            return self._curves[key]
        draws, keep = self._some(pairs, chosen)
        points = _rising(curve.values(), keep)
        costs = np.stack([draws.mean(way.cost[:, keep]) for way in points])
        errors = np.stack([draws.mean(way.error[:, keep]) for way in points])
        found = costs, errors, np.stack([draws.worst(way.error[:, keep]) for way in points])
        if chosen is None:
            self._curves[key] = found
        return found

    def _some(self, pairs: int, chosen: Chosen | None) -> tuple[Draws, NDArray[np.intp]]:
        """Draws of the first pairs that were chosen, and which they are."""
        if chosen is None:
            return self.draws(pairs), np.arange(pairs)
        return self.draws(pairs).within(chosen[:pairs]), np.flatnonzero(chosen[:pairs])

    def _corrected(self, by_dial: Mapping[float, Json]) -> Json:
        """Adds to every comparison its corrected p-value and what may be said."""
        found = [answer for answer in by_dial.values() if "p" in answer]
        for answer, p in zip(found, holm([a["p"] for a in found]), strict=True):
            answer["p_holm"] = p
            answer["better"] = p < ALPHA and answer["difference"]["high"] < 0
            answer["worse"] = p < ALPHA and answer["difference"]["low"] > 0
        return {f"{k:g}": by_dial[k] for k in sorted(by_dial)}

    def iso(self) -> Json:
        """Cost at which every way has the error of the plain full run, and the speed-up that this is."""
        study = self.study
        curves = {OURS: study.ours, SEARCHED: study.searched, **study.rivals}
        found = {name: self._iso(curve) for name, curve in curves.items()}
        return {name: answer for name, answer in found.items() if answer is not None}

    def _iso(self, curve: Curve) -> Json | None:
        pairs = min(way.pairs for way in curve.values())
        costs, errors, _ = self.curve(curve, pairs)
        if len(costs) < 2:
            return None
        goal = self.draws(pairs).mean(self.study.full.error[:, :pairs])
        cost = reaching(goal, costs, errors)
        return {
            "cost": estimate(cost).to_dict(),
            "speedup": estimate(PLAIN / cost).to_dict(),
            "reached": float(np.isfinite(cost[1:]).mean()),
            "measured_to": float(costs[-1, 0]),
        }


def _compared(cost: Array, ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> Json:
    relative, worst = (difference(a, b) for a, b in zip(ours, theirs, strict=True))
    mean = estimate(relative)
    return {
        "cost": float(cost[0]),
        "ours": float(ours[0][0]),
        "theirs": float(theirs[0][0]),
        "difference": mean.to_dict(),
        "worst_tenth": estimate(worst).to_dict(),
        "never_worse": never_worse(mean),
        "p": p_value(relative),
    }


def _rising(points: Iterable[Measured], keep: NDArray[np.intp]) -> list[Measured]:
    """By mean cost, without those that cost no more than the one before."""
    found: list[tuple[float, Measured]] = []
    for cost, way in sorted(
        ((float(w.cost[:, keep].mean()), w) for w in points), key=lambda p: p[0]
    ):
        if not found or cost > _STEP * found[-1][0]:
            found.append((cost, way))
    return [way for _, way in found]


def _covers(costs: Array, cost: Array) -> bool:
    """Whether a curve was measured about where it is to be read."""
    if len(costs) < 2:
        return False
    return bool(costs[0, 0] <= cost[0] * _SLACK and cost[0] <= costs[-1, 0] * _SLACK)


def _beyond(whose: str, costs: Array, cost: Array) -> Json:
    found = ", ".join(f"{c:.2f}" for c in costs[:, 0])
    return {"cost": float(cost[0]), "note": f"{whose}: measured at {found} only"}


def verdicts(document: Mapping[str, Any], dials: Iterable[int]) -> Json:
    """What may be claimed at every dial. document: with `ways`, `against` and `shuffled`."""
    return {f"{k:g}": _verdict(document, f"{k:g}") for k in dials}


def _verdict(document: Mapping[str, Any], dial: str) -> Json:
    def against(name: str, what: str) -> bool | None:
        answer: bool | None = document["against"].get(name, {}).get(dial, {}).get(what)
        return answer

    plain = [against(name, "better") for name in ("plain", "steps/trim")]
    shuffled: Json = document["shuffled"].get(dial, {})
    wins, gains = against(SEARCHED, "better"), shuffled.get("gains")
    return {
        "better_than_plain": None if None in plain else all(plain),
        "better_than_searched": wins,
        "never_worse_than_searched": against(SEARCHED, "never_worse"),
        "better_than_shuffled": gains,
        "adaptive": None if wins is None or gains is None else wins and gains,
        "score_not_inferior": document["ways"][OURS][dial]["score_drop"]["not_inferior"],
    }

# SPDX-License-Identifier: Apache-2.0
"""Whether a policy adapts, and how much of what there is to win it wins (METHOD.md, section 6).

Share of head-room: against an oracle over the searched family. Shuffled control: every image with another one's plan.
Strata: a policy that only tells captions apart wins between kinds of scenes and not within them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapid3rt.tiny.scenes import Scene
from training.comparison import ALPHA, OURS, SEARCHED, Comparison, Json
from training.statistics import (
    Array,
    Draws,
    at_cost,
    derangement,
    difference,
    estimate,
    fitted_mean,
    holm,
    lookup,
    oracle,
    p_value,
    power_law,
    thirds,
)
from training.study import Measured
from training.subject import met_captions
from training.ways import PLAIN

LEAST_HEAD_ROOM = 0.05
"""Lower bound of the head-room from which a share of it means something."""
_LOOKUP_DRAWS = 20
_DIFFICULTY_AT = 6
FEWEST_PAIRS = 8
"""Of a stratum, below which nothing is said about it."""
_BINS = 8


def head_room(comparison: Comparison) -> Json:
    """By dial: what an oracle would save of the searched family's error at the policy's cost, and the policy's share.

    The oracle knows smooth fits of every image's errors, and picks integers between half and twice the mean. What it
    saves is the ratio of two means of the fits; the family's own error at that cost is measured.
    """
    study = comparison.study
    errors = np.stack([study.searched[k].error[0] for k in study.tables])
    a, p = power_law(study.tables, errors)
    return {f"{k:g}": _head_room(comparison, study.ours[k], k, a, p) for k in study.dials}


def _head_room(comparison: Comparison, ours: Measured, dial: int, a: Array, p: Array) -> Json:
    study, draws = comparison.study, comparison.draws(ours.pairs)
    cost, error = draws.mean(ours.cost), draws.mean(ours.error)
    costs, errors, _ = comparison.curve(study.searched, ours.pairs)
    fixed = at_cost(cost, costs, errors)
    least, most = max(2, round(dial / 2)), min(PLAIN, 2 * dial)
    k = np.maximum(cost / study.dense, least)
    room = 1 - oracle(a, p, k, draws, least, most) / fitted_mean(a, p, k, draws)
    found = estimate(room)
    counts = found.low > LEAST_HEAD_ROOM
    share = (1 - error / fixed) / np.maximum(room, 1e-9)
    return {
        "cost": float(cost[0]),
        "head_room": found.to_dict(),
        "counts": counts,
        "share": estimate(share).to_dict() if counts else None,
        "searched": float(fixed[0]),
        "oracle": float(fixed[0] * (1 - room[0])),
        "ours": float(error[0]),
    }


def shuffled(comparison: Comparison) -> Json:
    """By claimed dial: error with every image on another one's trace, less the error with its own."""
    study = comparison.study
    answers: dict[str, Json] = {}
    ps: list[float] = []
    for k, other in sorted(study.shuffled.items()):
        own, draws = study.ours[k].error[:, : other.pairs], comparison.draws(other.pairs)
        mean = draws.mean(other.error)
        relative = -difference(draws.mean(own), mean)
        ps.append(p_value(relative))
        answers[f"{k:g}"] = {
            "own": float(own.mean()),
            "shuffled": float(mean[0]),
            "gain": estimate(relative * mean).to_dict(),
            "relative_gain": estimate(relative).to_dict(),
            "p": ps[-1],
        }
    for answer, p in zip(answers.values(), holm(ps), strict=True):
        answer["p_holm"] = p
        answer["gains"] = bool(p < ALPHA and answer["gain"]["low"] > 0)
    return answers


def shuffled_allocation(comparison: Comparison, seed: int = 0) -> Json:
    """By dial: what shuffling the numbers of evaluations alone would cost, read off the searched family's tables.

    Both errors are looked up at the images' numbers, so that only the allocation differs; mean of 20 derangements.
    Nothing for a policy that does more than compute densely: its number of evaluations is not its plan.
    """
    study, rng = comparison.study, np.random.default_rng(seed)
    ks = [int(k) for k in sorted(study.searched)]
    errors = np.stack([study.searched[k].error[0] for k in ks])
    answers: Json = {}
    for dial in study.dials:
        ours = study.ours[dial]
        if not ours.dense:
            continue
        draws = comparison.draws(ours.pairs)
        own = np.stack([lookup(ks, errors, nfe) for nfe in ours.nfe])
        others = np.zeros_like(own)
        for _ in range(_LOOKUP_DRAWS):
            order = derangement(ours.pairs, rng)
            others += np.stack([lookup(ks, errors, nfe[order]) for nfe in ours.nfe])
        mean = draws.mean(others / _LOOKUP_DRAWS)
        relative = -difference(draws.mean(own), mean)
        answers[f"{dial:g}"] = {
            "own": float(own.mean()),
            "shuffled": float(mean[0]),
            "relative_gain": estimate(relative).to_dict(),
        }
    return answers


def strata(comparison: Comparison) -> list[Json]:
    """By ground, number of objects, both, and whether training may have met the caption, with other noises.

    Ours at every dial against the searched family at the same cost there.
    """
    study, met = comparison.study, met_captions()
    found = []
    for by, kind in (
        ("ground", _ground),
        ("objects", _objects),
        ("kind", kind_of),
        ("caption", lambda scene: "met before" if scene.caption in met else "new"),
    ):
        kinds = np.array([kind(scene) for scene in study.scenes])
        for name in sorted(set(kinds)):
            found.append({"by": by, "name": str(name), **_stratum(comparison, kinds == name)})
    return found


def _stratum(comparison: Comparison, chosen: NDArray[np.bool_]) -> Json:
    study, pairs = comparison.study, int(chosen.sum())
    if pairs < FEWEST_PAIRS:
        return {"pairs": pairs}
    dials = {
        f"{k:g}": comparison.at_ours(study.ours[k], study.searched, chosen) for k in study.dials
    }
    return {"pairs": pairs, "dials": dials, "curves": _curves(comparison, chosen)}


def _curves(comparison: Comparison, chosen: NDArray[np.bool_]) -> Json:
    """For the panels: [cost, error, low, high] along every curve that was run on all pairs."""
    study = comparison.study
    curves = {OURS: study.ours, SEARCHED: study.searched}
    full = len(study.scenes)
    curves |= {n: c for n, c in study.rivals.items() if min(w.pairs for w in c.values()) == full}
    found = {}
    for name, curve in curves.items():
        costs, errors, _ = comparison.curve(curve, full, chosen)
        spans = [estimate(row) for row in errors]
        rows = zip(costs[:, 0], spans, strict=True)
        found[name] = [[float(c), span.value, span.low, span.high] for c, span in rows]
    return found


def difficulty(comparison: Comparison) -> Json:
    """How the cost follows the difficulty, by dial. Difficulty: the searched family's error at about 6 evaluations.

    Errors of ours by difficulty are shown and not compared: pairs that were chosen for a large error of the family
    would flatter whatever is set against it.
    """
    study = comparison.study
    at = min(study.tables, key=lambda k: abs(k - _DIFFICULTY_AT))
    hardness = study.searched[at].error[0]
    third = thirds(hardness)
    return {
        "at": at,
        "thirds": [float(hardness[third == i].mean()) for i in range(3)],
        "dials": {f"{k:g}": _by_difficulty(comparison, k, hardness) for k in study.dials},
    }


def _by_difficulty(comparison: Comparison, dial: int, hardness: Array) -> Json:
    ours, third = comparison.study.ours[dial], thirds(hardness)
    draws = comparison.draws(ours.pairs)
    easiest, hardest = (_cost_within(draws, ours, third == i) for i in (0, 2))
    order = np.argsort(hardness, kind="stable")
    bins = np.array_split(order, min(_BINS, max(1, len(order) // 4)))
    return {
        "cost": [float(ours.cost[:, third == i].mean()) for i in range(3)],
        "error": [float(ours.error[:, third == i].mean()) for i in range(3)],
        "hardest_over_easiest": estimate(hardest / easiest).to_dict(),
        "bins": [_bin(ours, hardness, members) for members in bins],
    }


def _bin(ours: Measured, hardness: Array, members: NDArray[np.int64]) -> Json:
    cost = ours.cost[:, members]
    low, high = np.quantile(cost, [0.1, 0.9])
    return {
        "hardness": float(np.exp(np.log(np.maximum(hardness[members], 1e-12)).mean())),
        "cost": float(cost.mean()),
        "tenth": float(low),
        "ninth": float(high),
    }


def _cost_within(draws: Draws, ours: Measured, chosen: NDArray[np.bool_]) -> Array:
    return draws.within(chosen).mean(ours.cost[:, chosen])


def _ground(scene: Scene) -> str:
    return scene.texture


def _objects(scene: Scene) -> str:
    count = len(scene.objects)
    return "1" if count == 1 else "2-3" if count < 4 else "4-6"


def kind_of(scene: Scene) -> str:
    """Number of objects and whether the ground is plain."""
    return f"{_objects(scene)} on {'plain' if scene.texture == 'plain' else 'textured'}"


def everything(comparison: Comparison) -> dict[str, Any]:
    """All parts, by their names in the document."""
    return {
        "head_room": head_room(comparison),
        "shuffled": shuffled(comparison),
        "shuffled_allocation": shuffled_allocation(comparison),
        "strata": strata(comparison),
        "difficulty": difficulty(comparison),
    }

# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures: ways on pairs, against the converged solution and the plain full run.

Shape letters: N pairs, S training seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rapid3rt.tiny.scenes import Scene
from training import ways
from training.runs import Outcome, Runs
from training.similarity import psnr, squared_error, ssim
from training.statistics import Array
from training.ways import PLAIN, Way


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a way made of the first N pairs with S training seeds, float64 `[S, N]` each.

    error: m, squared error to the converged solution. cost: equivalent steps. nfe: evaluations. score: of the scene.
    psnr (dB), ssim: to the plain full run. dense: whether every tick of every image was a dense compute.
    """

    error: Array
    cost: Array
    nfe: Array
    score: Array
    psnr: Array
    ssim: Array
    dense: bool = True

    @property
    def pairs(self) -> int:
        """N."""
        return int(self.error.shape[1])


Curve = dict[float, Measured]
"""A way by what it was asked for: evaluations of every image, or their mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything that was measured on one split.

    scenes: of all pairs. dials: at which ours is compared. tables: numbers of evaluations that the oracle knows. dense:
    cost of a dense evaluation of the rivals. full: the plain full run. ours: by the mean that was asked for, dials and
    others. rivals: by dial. searched: the family by its number of evaluations, those of `tables` among them. schedules:
    further searched schedules. shuffled: by dial, mean over derangements.
    """

    scenes: list[Scene]
    dials: tuple[int, ...]
    tables: tuple[int, ...]
    dense: float
    full: Measured
    ours: Curve
    rivals: dict[str, Curve]
    searched: Curve
    schedules: dict[str, Curve] = field(default_factory=dict)
    shuffled: Curve = field(default_factory=dict)


class Meter:
    """Measures ways on the pairs of `runs`; a bar counts the evaluations of images.

    reference: steps of the converged solutions.
    """

    def __init__(self, runs: Runs, reference: int, bar: tqdm[Any]) -> None:
        self.runs, self._bar = runs, bar
        pairs = len(runs.scenes)
        self._converged = self._outcome(ways.converged(reference), pairs).images
        self._full = self._outcome(ways.plain(PLAIN), pairs).images

    def measure(self, seeds: Sequence[Way], pairs: int) -> Measured:
        """On the first pairs. seeds: one way for every training seed, or a single one."""
        rows = [self._row(way, pairs) for way in seeds]
        columns = {name: np.stack([row[name].numpy() for row in rows]) for name in rows[0]}
        dense = bool(columns.pop("dense").all())
        return Measured(**columns, dense=dense)

    def _row(self, way: Way, pairs: int) -> dict[str, torch.Tensor]:
        made = self._outcome(way, pairs)
        return {
            "error": squared_error(made.images, self._converged[:pairs]),
            "cost": made.cost,
            "nfe": made.nfe,
            "score": made.score,
            "psnr": psnr(made.images, self._full[:pairs]),
            "ssim": ssim(made.images, self._full[:pairs]),
            "dense": made.dense,
        }

    def _outcome(self, way: Way, pairs: int) -> Outcome:
        self._bar.set_postfix_str(way.key[:40], refresh=False)
        return self.runs.outcome(way, pairs, lambda size: self._advance(size * way.evaluations))

    def _advance(self, evaluations: float) -> None:
        """A bar that has more behind it than it expected has no end to show: it grows."""
        self._bar.total = max(self._bar.total, self._bar.n + evaluations)
        self._bar.update(evaluations)

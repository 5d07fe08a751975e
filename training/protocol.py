# SPDX-License-Identifier: Apache-2.0
"""What an evaluation runs, in which order and on how many pairs (METHOD.md, section 6).

First the rules that need a setting are calibrated on the validation split: the tolerance of `controller` and the
threshold of `threshold` that spend a dial's mean cost, and which multistep solver is the best one. Then everything runs
on the split that counts: the main ways on all pairs, the others on a prefix of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rapid3rt.errors import check_number
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.schedule import WarpFamily, load_schedule
from rapid3rt.tiny import GUIDANCE
from rapid3rt.tiny.rivals import SOLVERS
from rapid3rt.tiny.scenes import SPLITS
from rapid3rt.types import ActionCosts
from training import ways
from training.dialling import CLOSE, Dialling
from training.peers import Peer, Setting, find_peers
from training.runs import Runs
from training.statistics import derangement
from training.study import Curve, Measured, Meter, Study
from training.ways import PLAIN, Way

TABLES = (4, 6, 8, 11, 16)
"""Evaluations of the searched family that the oracle knows."""
_TRIES = 3
"""Of settings per dial and rule, expected: for the progress bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes and choices of an evaluation.

    policies: folders of one recipe, a training seed each. base: the calibrated folder that they started from; its
    family and its costs are the rivals'. schedules: files of further searched schedules. split, seed: of the pairs.
    pairs: for the main ways. others: a prefix of them for the rest and for the shuffled control. calibration: pairs of
    the validation split. dials: means that are compared. means: further ones, for ours alone. claimed: dials of the
    shuffled control. derangements: of each. reference: steps of the converged solutions. draws: of the bootstrap.
    guidance, tokens: of the call. peers: caches of others, None for all that are installed.
    """

    policies: tuple[Path, ...]
    base: Path
    schedules: tuple[Path, ...] = ()
    split: str = "test"
    seed: int = 0
    pairs: int = 1000
    others: int = 256
    calibration: int = 64
    dials: tuple[int, ...] = (5, 6, 8, 10, 14)
    means: tuple[float, ...] = (4.0, 12.0)
    claimed: tuple[int, ...] = (6, 8)
    derangements: int = 2
    reference: int = 120
    draws: int = 2000
    guidance: float = GUIDANCE
    tokens: int = 32
    peers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for what would fail or mean nothing hours later."""
        asked = (*self.dials, *self.means)
        _require("policies", bool(self.policies), "be at least one folder", "none")
        digests = [ways.folder_digest(folder) for folder in self.policies]
        differ = len(set(digests)) == len(digests)
        _require("policies", differ, "differ: seeds of one recipe", [f.name for f in self.policies])
        _require("split", self.split in SPLITS, f"be one of {', '.join(SPLITS)}", repr(self.split))
        _require("seed", self.seed >= 0, "be at least 0", self.seed)
        _require("pairs", self.pairs >= 3, "be at least 3", self.pairs)
        _require("others", 3 <= self.others <= self.pairs, f"be 3 to {self.pairs}", self.others)
        _require("calibration", self.calibration >= 1, "be at least 1", self.calibration)
        _require("dials", bool(self.dials), "be at least one number", "none")
        _require("dials", all(1 < k < PLAIN for k in asked), f"be 2 to {PLAIN - 1}", asked)
        _require("dials", len(set(asked)) == len(asked), "differ, those of means too", asked)
        _require("dials", len(asked) > 1, "be two or more, together with means", asked)
        # Below, no p-value of the bootstrap could stay under 5 % after Holm's correction.
        fewest = 40 * len(self.dials)
        _require("draws", self.draws >= fewest, f"be at least {fewest}, 40 a dial", self.draws)
        known = set(self.claimed) <= set(self.dials)
        _require("claimed", known, f"be some of the dials {self.dials}", self.claimed)
        _require("derangements", self.derangements >= 0, "be at least 0", self.derangements)
        check_number("guidance", self.guidance, lambda x: x >= 0, "a finite number, at least 0")
        _require("reference", self.reference > PLAIN, f"be above {PLAIN}", self.reference)

    @property
    def asked(self) -> list[float]:
        """Means that ours is asked for, rising."""
        return sorted((*self.dials, *self.means))


def _require(name: str, holds: bool, requirement: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must {requirement}, got {got}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A setting of a cache, and its mean cost and mean error there."""

    setting: Setting
    cost: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Found on the validation split.

    solver: the best of the multistep ones. errors: of each, geometric mean over dials of the mean error. tolerances,
    thresholds: dial to the setting and the mean cost there. peers: caches of others, by name and dial.
    """

    solver: str
    errors: dict[str, float]
    tolerances: dict[int, tuple[float, float]]
    thresholds: dict[int, tuple[float, float]]
    peers: dict[str, dict[int, Tuned]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Protocol:
    """The runs of an evaluation. store: folder where results are kept, one for all policies of a model."""

    def __init__(self, pipe: Any, settings: Settings, store: Path) -> None:
        self.settings, self._pipe, self._store = settings, pipe, store
        base = PolicyFolder.load(settings.base)
        if base.schedule is None:
            raise ValueError(
                f"base must hold a searched family, got heads alone in '{settings.base}'"
            )
        self.costs, self.family = base.costs, replace(base.schedule, allocation=None)
        self._prior = base.schedule
        self._families, self._fixed = _read_schedules(settings.schedules, self.costs)
        self._peers = _choose_peers(pipe, settings.peers)
        self.ours = {
            k: [ways.served(folder, k) for folder in settings.policies] for k in settings.asked
        }

    @property
    def runs(self) -> Runs:
        """Of the split that counts."""
        return self._runs(self.settings.split, self.settings.pairs)

    def try_out(self) -> None:
        """A batch of every policy at its ends and of every schedule: what is wrong shows before hours of rivals."""
        s, runs = self.settings, self.runs
        ours = [way for k in (s.asked[0], s.asked[-1]) for way in self.ours[k]]
        families = [ways.searched(f, s.dials[0], self.costs) for f in self._families.values()]
        for way in (*ours, *families, *self._fixed.values()):
            next(runs.batches(way, s.pairs))

    def calibrate(self) -> Calibration:
        """Settings of the rivals, on the validation split."""
        s = self.settings
        settings = [setting for peer in self._peers.values() for setting in peer.settings]
        each = s.reference + PLAIN + len(SOLVERS) * sum(s.dials) + 2 * _TRIES * sum(s.dials)
        each += sum(map(_guess, settings))
        with self._meter("validation", s.calibration, s.calibration * each) as meter:

            def error(name: str, k: int) -> float:
                way = ways.multistep(name, k)
                return float(meter.measure([way], s.calibration).error.mean())

            def cost(make: Callable[[float], Way]) -> Callable[[float], float]:
                return lambda x: float(meter.measure([make(x)], s.calibration).cost.mean())

            errors = {
                name: math.exp(sum(math.log(error(name, k)) for k in s.dials) / len(s.dials))
                for name in SOLVERS
            }
            middle = sum(s.dials) / len(s.dials)
            tolerance = Dialling(cost(lambda x: self._controller(x, middle)), 1 / middle, 1.0)
            drift = Dialling(cost(lambda x: self._threshold(x, middle)), 0.2)
            return Calibration(
                solver=min(errors, key=lambda name: errors[name]),
                errors=errors,
                tolerances={k: tolerance.find(k) for k in s.dials},
                thresholds={k: drift.find(k) for k in s.dials},
                peers={name: self._tune(meter, peer) for name, peer in self._peers.items()},
            )

    def _tune(self, meter: Meter, peer: Peer) -> dict[int, Tuned]:
        """For every dial the setting of least error that costs no more; the cheapest one where all cost more."""
        found = []
        for setting in peer.settings:
            way = ways.cached(peer, setting, _guess(setting))
            made = meter.measure([way], self.settings.calibration)
            found.append(
                Tuned(setting=setting, cost=float(made.cost.mean()), error=float(made.error.mean()))
            )
        cheapest = min(found, key=lambda tuned: tuned.cost)
        chosen = {}
        for k in self.settings.dials:
            affordable = [tuned for tuned in found if tuned.cost <= k * (1 + CLOSE)]
            chosen[k] = min(affordable, key=lambda tuned: tuned.error, default=cheapest)
        return chosen

    def study(self, calibration: Calibration) -> Study:
        """Run everything on the split that counts."""
        s, rivals = self.settings, self._rivals(calibration)
        with self._meter(s.split, s.pairs, self._expected(rivals)) as meter:
            ours: Curve = {k: meter.measure(seeds, s.pairs) for k, seeds in self.ours.items()}
            costs = [float(ours[k].cost.mean()) for k in s.dials]
            return Study(
                scenes=meter.runs.scenes,
                dials=s.dials,
                tables=TABLES,
                dense=self.costs.levels[0],
                full=meter.measure([ways.plain(PLAIN)], s.pairs),
                ours=ours,
                searched=self._searched(meter, self.family, costs, TABLES),
                schedules=self._schedules(meter, costs),
                shuffled={k: self._shuffled(meter, k) for k in s.claimed if s.derangements},
                rivals={
                    name: {k: meter.measure([way], pairs) for k, way in curve.items()}
                    for name, (pairs, curve) in rivals.items()
                },
            )

    def _runs(self, split: str, pairs: int) -> Runs:
        s = self.settings
        return Runs(
            self._pipe,
            pairs,
            split=split,
            seed=s.seed,
            guidance=s.guidance,
            tokens=s.tokens,
            store=self._store,
        )

    @contextmanager
    def _meter(self, split: str, pairs: int, evaluations: float) -> Iterator[Meter]:
        s = self.settings
        runs = self._runs(split, pairs)
        form = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} evaluations, {remaining} left{postfix}"
        with tqdm(total=evaluations, desc=split, bar_format=form, smoothing=0.05) as bar:
            yield Meter(runs, s.reference, bar)
            bar.total = bar.n  # what was expected of runs that were not yet known

    def _expected(self, rivals: dict[str, tuple[int, dict[float, Way]]]) -> float:
        """Evaluations of images in all that `study` runs."""
        s, seeds = self.settings, len(self.settings.policies)
        families = 1 + len(self._families)
        own = seeds * sum(s.asked)
        shuffled = seeds * s.derangements * sum(s.claimed)
        around = families * sum(2 * k + 1 for k in s.dials) + sum(TABLES)
        others = sum(n * way.evaluations for n, curve in rivals.values() for way in curve.values())
        main = s.reference + 2 * PLAIN + own + around + sum(self._fixed)
        return s.pairs * main + s.others * shuffled + others

    def _rivals(self, found: Calibration) -> dict[str, tuple[int, dict[float, Way]]]:
        """Name to pairs and the ways by dial."""
        s, costs = self.settings, self.costs
        makers: dict[str, tuple[int, Callable[[int], Way]]] = {
            "prior": (s.others, lambda k: ways.allocated(self._prior, k, costs)),
            "controller": (s.pairs, lambda k: self._controller(found.tolerances[k][0], k)),
            "threshold": (s.others, lambda k: self._threshold(found.thresholds[k][0], k)),
            "plain": (s.pairs, ways.plain),
            "steps/trim": (s.pairs, lambda k: ways.steps(k, "trim", costs)),
            "steps/trim/auto": (s.others, lambda k: ways.steps(k, "trim/auto", costs)),
            "steps/trim/ab2": (s.others, lambda k: ways.steps(k, "trim/ab2", costs)),
        }
        for name in SOLVERS:
            pairs = s.pairs if name == found.solver else s.others
            makers[name] = (pairs, partial(ways.multistep, name))
        for name, tuned in found.peers.items():
            makers[name] = (s.others, partial(self._cached, self._peers[name], tuned))
        return {
            name: (pairs, {float(k): make(k) for k in s.dials})
            for name, (pairs, make) in makers.items()
        }

    def _cached(self, peer: Peer, tuned: dict[int, Tuned], k: int) -> Way:
        return ways.cached(peer, tuned[k].setting, tuned[k].cost)

    def _controller(self, tolerance: float, k: float) -> Way:
        return ways.controller(tolerance, self.family, k, self.costs)

    def _threshold(self, x: float, k: float) -> Way:
        return ways.threshold(x, k, self.costs)

    def _searched(
        self, meter: Meter, family: WarpFamily, costs: Sequence[float], tables: Sequence[int] = ()
    ) -> Curve:
        """A family at the integers below and above every mean cost, and at those of tables."""
        means = [cost / self.costs.levels[0] for cost in costs]
        around = {f(mean) for mean in means for f in (math.floor, math.ceil)}
        ks = {min(max(k, 1), PLAIN) for k in around} | set(tables)
        made = {k: ways.searched(family, k, self.costs) for k in sorted(ks)}
        return {float(k): meter.measure([way], self.settings.pairs) for k, way in made.items()}

    def _schedules(self, meter: Meter, costs: Sequence[float]) -> dict[str, Curve]:
        """Further families by name; all fixed schedules together are one curve."""
        curves = {n: self._searched(meter, family, costs) for n, family in self._families.items()}
        fixed = {k: meter.measure([way], self.settings.pairs) for k, way in self._fixed.items()}
        return curves | ({"fixed schedules": fixed} if fixed else {})

    def _shuffled(self, meter: Meter, dial: int) -> Measured:
        """Ours with every image on another one's trace: mean over derangements."""
        s = self.settings
        traces = [meter.runs.traces(way, s.others) for way in self.ours[dial]]
        runs = []
        for i in range(s.derangements):
            order = derangement(s.others, np.random.default_rng((s.seed, i))).tolist()
            taken = [
                ways.shuffled(way, of_way, order, f"{i} of {s.others}, seed {s.seed}")
                for way, of_way in zip(self.ours[dial], traces, strict=True)
            ]
            runs.append(meter.measure(taken, s.others))
        names = ("error", "cost", "nfe", "score", "psnr", "ssim")
        return Measured(**{n: np.mean([getattr(r, n) for r in runs], axis=0) for n in names})


def _choose_peers(pipe: Any, names: Sequence[str] | None) -> dict[str, Peer]:
    """Those of these names. Raises `ValueError` for one that is not installed, or does not run with this model."""
    if names is not None and not names:
        return {}
    found = find_peers(pipe.transformer)
    unknown = [name for name in names or () if name not in found]
    if unknown:
        known = ", ".join(found) or "none, for no cache is installed that runs with this model"
        raise ValueError(f"peers must be some of {known}, got {', '.join(unknown)}")
    return {name: peer for name, peer in found.items() if names is None or name in names}


def _guess(setting: Setting) -> int:
    """What a setting may cost, for the progress bar."""
    return (setting.steps + setting.warm_up) // 2


def _read_schedules(
    paths: Sequence[Path], costs: ActionCosts
) -> tuple[dict[str, WarpFamily], dict[float, Way]]:
    """Families by name, fixed schedules by their evaluations. Raises `ValueError` for two of one name or number."""
    families: dict[str, WarpFamily] = {}
    fixed: dict[float, Way] = {}
    for path in paths:
        plan = load_schedule(path)
        if isinstance(plan, WarpFamily):
            name, known = f"family {path.stem}", len(families)
            families[name] = replace(plan, allocation=None)
            differs = len(families) > known
        else:
            way = ways.fixed(plan, costs, f"schedule:{path.name}")
            differs = way.evaluations not in fixed
            fixed[way.evaluations] = way
        _require(
            "schedules", differs, "differ in name, or in evaluations where they are fixed", path
        )
    return families, fixed

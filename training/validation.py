# SPDX-License-Identifier: Apache-2.0
"""Serve the heads as users are served, on pairs that training never sees: how good they are, and what a dial costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

import rapid3rt
from rapid3rt.policies.learned import Dial, Heads, LearnedPolicy
from rapid3rt.policies.schedule import WarpFamily
from rapid3rt.types import ActionCosts
from training.allocation import TABLE, even_steps
from training.bank import Bank, accelerated
from training.config import LEAST_PAIRS
from training.ranks import Ranks
from training.statistics import Array, at_cost, bootstrap, difference, holm

FURTHER_DIALS = (4.0, 12.0, 17.0, 20.0)
"""That a finished policy is calibrated at, beside those of training."""
_DRAWS = 1000
_SURE = 0.9
"""That nothing is used at any dial which gains nothing there; dials at which that is not so sure are left out."""


def no_excess(_: float) -> float:
    """Of pairs whose plans are the usual ones."""
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """bank: the pairs. family: searched, None for a model without one. order, costs: as in training."""

    bank: Bank
    family: WarpFamily | None
    order: int
    costs: ActionCosts
    ranks: Ranks

    def measure(self, heads: Heads, dials: Sequence[float | None]) -> list[Dial]:
        """Means over all pairs at every dial; None: heads without a prior, called 0."""
        return [_mean_of(dial, self.rows(heads, dial)) for dial in dials]

    def rows(self, heads: Heads, dial: float | None) -> torch.Tensor:
        """Error, equivalent steps, evaluations and whether the plan is its own, of every pair: float64 `[n, 4]`."""
        bank, family = self.bank, self.family if heads.config.has_prior else None
        policy = LearnedPolicy(heads, family, order=self.order, dial=dial, costs=self.costs)
        starts = tqdm(
            self.ranks.share(range(0, len(bank), bank.batch_size)),
            desc="serving" if dial is None else f"serving at dial {dial:g}",
            disable=not bank.progress,
            leave=False,
        )
        converged = bank.converged()  # by all ranks together, also by one that gets no pairs
        rows = torch.zeros(len(bank), 4, dtype=torch.float64)
        for start in starts:
            pairs = range(start, min(start + bank.batch_size, len(bank)))
            with accelerated(bank.pipe, policy):
                images = bank.images(pairs)
                report = rapid3rt.report(bank.pipe).images
            error = (images - converged[pairs.start : pairs.stop]).square().mean((1, 2, 3))
            for i, pair in enumerate(pairs):
                values = error[i], report[i].equivalent_steps, report[i].nfe, policy.plans_images
                rows[pair] = torch.tensor([float(x) for x in values], dtype=torch.float64)
        if self.ranks.count > 1:
            rows = rows.to(self.ranks.device)
            self.ranks.add(rows)
        return rows.cpu()

    def calibrate(
        self,
        heads: Heads,
        dials: Sequence[float],
        further: Sequence[float],
        excess: Callable[[float], float] = no_excess,
    ) -> tuple[tuple[Dial, ...], Gains]:
        """Leave out, in place, what gains nothing for sure at a dial, and measure all dials as they then are.

        First plans of images' own, against the same number for all, then what the sampled heads say, against these
        plans alone. excess: by how many steps these pairs' plans at a dial exceed the usual ones: their cost is
        lessened by as much where plans were taken. Also measured is where heads fall silent between dials. Returns the
        calibration, and what was gained at every dial before anything was left out there. Raises `ValueError` for an
        image that is not finite.
        """
        gains: Gains = {}
        heads.config = replace(heads.config, silent=tuple(dials) if heads.config.sampled else ())
        rows = {dial: self._finite_rows(heads, dial) for dial in dials}
        if heads.allocation is not None and any(map(_are_planned, rows.values())):
            even = {dial: self._even_rows(dial) for dial in dials}
            gains["allocation"] = measure_gains(even, rows, self.bank.prompts)
            unsure = _unsure(gains["allocation"])
            heads.allocation.level(unsure)
            rows |= {dial: even[dial] for dial in unsure}
        if heads.config.sampled:
            heads.config = replace(heads.config, silent=())
            spoken = {dial: self._finite_rows(heads, dial) for dial in dials}
            gains["sampled"] = measure_gains(rows, spoken, self.bank.prompts)
            silent = _unsure(gains["sampled"])
            heads.config = replace(heads.config, silent=silent)
            rows |= {dial: of_dial for dial, of_dial in spoken.items() if dial not in silent}
        between = [dial for dial in (*further, *heads.config.bends()) if dial not in rows]
        rows |= {dial: self._finite_rows(heads, dial) for dial in between}
        measured = [
            self._without(excess(dial) if _are_planned(of_dial) else 0.0, _mean_of(dial, of_dial))
            for dial, of_dial in rows.items()
        ]
        return rising(measured), gains

    def _even_rows(self, dial: float) -> torch.Tensor:
        """As `rows`, of the same number for all, from the bank's tables."""
        assert self.family is not None
        k = even_steps(dial, self.bank.steps)
        error = self.bank.searched(self.family, k).error.double()
        steps = torch.full_like(error, float(k))
        return torch.stack([error, steps * self.costs.levels[0], steps, torch.zeros_like(error)], 1)

    def _finite_rows(self, heads: Heads, dial: float) -> torch.Tensor:
        rows = self.rows(heads, dial)
        wrong = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"images at dial {dial:g} must be finite, got NaN or infinity for {len(wrong)} of {len(rows)} "
                f"calibration pairs, first for {wrong[0]}, {self.bank.prompts[wrong[0]]!r}; use another --dtype"
            )
        return rows

    def _without(self, steps: float, dial: Dial) -> Dial:
        return replace(
            dial,
            equivalent_steps=dial.equivalent_steps - steps * self.costs.levels[0],
            evaluations=dial.evaluations - steps,
        )

    def prior_error(self, equivalent_steps: float) -> float:
        """Error of the searched family, all images alike, at the same cost; NaN without a family, or in few steps."""
        ks = [k for k in TABLE if k <= self.bank.steps]
        if self.family is None or len(ks) < 2:
            return math.nan
        tables = [self.bank.searched(self.family, k) for k in ks]
        x = torch.tensor(ks, dtype=torch.float64).log() + math.log(self.costs.levels[0])
        y = torch.stack([table.error.mean() for table in tables]).double().log()
        i = int((x < math.log(equivalent_steps)).sum().clamp(1, len(ks) - 1))
        share = (math.log(equivalent_steps) - x[i - 1]) / (x[i] - x[i - 1])
        return float((y[i - 1] + share * (y[i] - y[i - 1])).exp())

    def judge(self, dials: Sequence[Dial]) -> tuple[dict[str, float], float]:
        """Metrics, and a score, larger is better: minus the mean log of the error over the family's at equal cost."""
        metrics: dict[str, float] = {}
        logs: list[float] = []
        for dial in dials:
            prior = self.prior_error(dial.equivalent_steps)
            at = f"@{dial.dial:g}" if dial.dial else ""
            metrics |= {
                f"quality/m{at}": dial.error,
                f"quality/m_prior{at}": prior,
                f"quality/E{at}": dial.equivalent_steps,
                f"quality/nfe{at}": dial.evaluations,
            }
            logs.append(math.log(dial.error / prior if prior == prior else dial.error))
        return metrics, -sum(logs) / len(logs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What was learned does at a dial. ratio: the error with it over the one at equal cost without it. surely: share of
    redraws of the pairs in which it is below 1. is_sure: whether it may be used, by Holm's correction over the dials.
    """

    ratio: float
    surely: float
    is_sure: bool


Gains = dict[str, dict[float, Gain]]
"""By dial, of `allocation` and of the `sampled` heads."""


def _unsure(gains: Mapping[float, Gain]) -> tuple[float, ...]:
    return tuple(dial for dial, gain in gains.items() if not gain.is_sure)


def _are_planned(rows: torch.Tensor) -> bool:
    return bool(rows[:, 3].all())


def measure_gains(
    alone: Mapping[float, torch.Tensor],
    spoken: Mapping[float, torch.Tensor],
    prompts: Sequence[str],
) -> dict[float, Gain]:
    """Of every dial. alone, spoken: rows of the dials without and with what was learned; the same pairs.

    Nothing is sure of what changes nothing, what costs more where there is but one cost to compare at, or by fewer than
    `LEAST_PAIRS` different prompts, which redraws repeat.
    """
    draws = bootstrap(prompts, 1, _DRAWS)

    def means(rows: torch.Tensor) -> tuple[Array, Array]:
        """Cost and error, draw by draw."""
        return draws.mean(rows[None, :, 1].numpy()), draws.mean(rows[None, :, 0].numpy())

    curve: list[tuple[Array, Array]] = []  # of those dials whose cost rises
    for rows in alone.values():
        cost, error = means(rows)
        if not curve or cost[0] > curve[-1][0][0]:
            curve.append((cost, error))
    costs, errors = (np.stack(column) for column in zip(*curve, strict=True))
    ratios, surely = [], []
    for dial, rows in spoken.items():
        cost, error = means(rows)
        rival = at_cost(cost, costs, errors) if len(curve) > 1 else means(alone[dial])[1]
        relative = difference(error, rival)
        is_fair = len(curve) > 1 or bool(cost[0] <= costs[0, 0])
        differs = not torch.equal(rows, alone[dial])
        is_better = is_fair and differs and len(set(prompts)) >= LEAST_PAIRS
        ratios.append(1 + float(relative[0]))
        surely.append(float((relative[1:] < 0).mean()) if is_better else 0.0)
    corrected = holm([1 - share for share in surely])
    return {
        dial: Gain(ratio=ratio, surely=share, is_sure=p <= 1 - _SURE)
        for dial, ratio, share, p in zip(spoken, ratios, surely, corrected, strict=True)
    }


def _mean_of(dial: float | None, rows: torch.Tensor) -> Dial:
    error, equivalent_steps, evaluations = rows[:, :3].mean(0).tolist()
    return Dial(
        dial=dial or 0.0,
        equivalent_steps=equivalent_steps,
        evaluations=evaluations,
        error=error,
    )


def rising(dials: Sequence[Dial]) -> tuple[Dial, ...]:
    """A calibration: dials whose cost does not rise are pooled with their neighbours (isotonic regression)."""
    blocks: list[list[Dial]] = []
    for dial in sorted(dials, key=lambda d: d.dial):
        blocks.append([dial])
        while len(blocks) > 1 and _cost(blocks[-2]) >= _cost(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    return tuple(
        Dial(
            dial=_mean(block, "dial"),
            equivalent_steps=_cost(block),
            evaluations=_mean(block, "evaluations"),
            error=_mean(block, "error"),
        )
        for block in blocks
    )


def _cost(block: Sequence[Dial]) -> float:
    return _mean(block, "equivalent_steps")


def _mean(block: Sequence[Dial], name: str) -> float:
    return sum(float(getattr(dial, name)) for dial in block) / len(block)

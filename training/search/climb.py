# SPDX-License-Identifier: Apache-2.0
"""Search on the real objective: proposals of a model and of random moves, measured on few pairs, then on all.

A proposal that does not lower the mean root error on the few goes no further (successive halving). On all pairs that
decide it must surely lower the mean squared error or, where that cannot be told, the mean root error: the squared one
hangs on the few images whose outcome flips (`rapid3rt.calibrate.search`). A bootstrap over pairs says what is sure, and
neither of the two may surely rise. Errors are compared at equal cost: one of a plan that costs E steps counts
(E / E_dense)^p times, p that of the family's own error k^-p, so that sparsity and reuse have to be worth more than
fewer evaluations would be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rapid3rt.calibrate.measure import Bench
from rapid3rt.policies import FixedSchedule
from rapid3rt.types import AUTO, ActionCosts
from training.search.error_model import ErrorModel, Sample
from training.search.lattice import (
    ORDERS,
    Lattice,
    Plan,
    bend,
    equivalent_steps,
    moves,
    neighbours,
)

SURE = 0.9
"""Share of the redraws in which a lower error counts as sure."""
DRAWS = 2000
PROPOSALS = 12
"""Random neighbours among which the model picks the one that is measured."""


def redraws(n: int, draws: int = DRAWS) -> torch.Tensor:
    """Pairs drawn with replacement, the same at every call: int64 `[draws, n]`."""
    return torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))


def is_better(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether errors `[n]` are lower than those of the same pairs before; see the module."""
    picks = redraws(len(new))
    wins = [
        float((a[picks].mean(1) < b[picks].mean(1)).double().mean())
        for a, b in ((new, old), (new.sqrt(), old.sqrt()))
    ]
    return max(wins) >= SURE and min(wins) > 1 - SURE


class Objective:
    """Errors of plans on pairs of a bench, and what they cost to measure.

    few: the pairs of the first rung; rest: the others that decide. exponent: p of the family's error k^-p.
    """

    def __init__(
        self,
        bench: Bench,
        lattice: Lattice,
        costs: ActionCosts,
        exponent: float,
        few: Sequence[int],
        rest: Sequence[int],
        spent: int = 0,
    ) -> None:
        self.bench, self.lattice, self.costs, self.exponent = bench, lattice, costs, exponent
        self.few, self.rest, self.spent = list(few), list(rest), spent

    def errors(self, plan: Plan, pairs: Sequence[int]) -> torch.Tensor:
        """Squared errors of the images, float64 `[n]`."""
        if not pairs:
            return torch.empty(0, dtype=torch.float64)
        schedule = self.lattice.schedule(plan, self.bench.family_name)
        budget, name = self.lattice.budget, self.lattice.name(plan)
        self.spent += budget * len(pairs)
        return self.bench.errors(FixedSchedule(schedule), budget, f"plan {name}", pairs=pairs)

    def factor(self, plan: Plan) -> float:
        """What errors of a plan are multiplied by to be compared at equal cost."""
        dense = self.lattice.budget * self.costs.levels[0]
        factor: float = (equivalent_steps(plan, self.costs) / dense) ** self.exponent
        return factor

    @property
    def next_cost(self) -> int:
        """Evaluations that one more proposal takes, at most."""
        return self.lattice.budget * (len(self.few) + len(self.rest))


@dataclass(slots=True)
class Climber:
    """The best plan so far and everything that was measured on the way.

    few, rest: its errors on the pairs of the two rungs. weights: of the few pairs in the model's error. limit:
    evaluations that may be spent. report: called after every proposal.
    """

    objective: Objective
    best: Plan
    few: torch.Tensor
    rest: torch.Tensor
    weights: torch.Tensor
    limit: int
    report: Callable[[Climber], None] = lambda _: None
    samples: list[Sample] = field(default_factory=list)
    accepted: int = 0

    def __post_init__(self) -> None:
        """The best plan is the first sample."""
        self._learn(self.best, self.few)

    @property
    def lattice(self) -> Lattice:
        """Of the objective."""
        return self.objective.lattice

    @property
    def may_go_on(self) -> bool:
        """Whether one more proposal can be paid for."""
        return self.objective.spent + self.objective.next_cost <= self.limit

    @property
    def tried(self) -> list[Plan]:
        """All plans measured so far."""
        return [sample.plan for sample in self.samples]

    @property
    def order(self) -> list[int]:
        """The pairs that decide, as `seen` has them."""
        return [*self.objective.few, *self.objective.rest]

    def seen(self) -> torch.Tensor:
        """Errors of the best plan on all pairs that decide."""
        return torch.cat([self.few, self.rest])

    def _learn(self, plan: Plan, few: torch.Tensor) -> None:
        self.samples.append(Sample(plan=plan, error=float((self.weights * few).mean())))

    def propose(self, plan: Plan) -> bool:
        """Measure a plan; it becomes the best where it is better."""
        few = self.objective.errors(plan, self.objective.few)
        self._learn(plan, few)
        better = self._beats(plan, few)
        self.report(self)
        return better

    def _beats(self, plan: Plan, few: torch.Tensor) -> bool:
        new, old = self.objective.factor(plan), self.objective.factor(self.best)
        if not (new * few).sqrt().mean() < (old * self.few).sqrt().mean():
            return False
        rest = self.objective.errors(plan, self.objective.rest)
        if not is_better(new * torch.cat([few, rest]), old * self.seen()):
            return False
        self.best, self.few, self.rest = plan, few, rest
        self.accepted += 1
        return True


def probe(climber: Climber, seed: int, count: int) -> None:
    """Measure random bends of the first plan on the few pairs, so that there is something to fit."""
    lattice, rng = climber.lattice, random.Random(f"{seed} probe")
    for plan in neighbours(climber.best, lattice, bend, rng, climber.tried, count):
        if climber.may_go_on:
            climber.propose(plan)


def descend(climber: Climber, model: ErrorModel) -> None:
    """Propose what dynamic programming finds best around the best plan, ever nearer; the model learns from each.

    First of AUTO alone, then of all orders, then of all actions. A choice that never helped is not offered again.
    """
    interval, lattice = model.lattice.end // model.lattice.budget, model.lattice
    choices = [((AUTO,), False), (ORDERS, False), (ORDERS, True)]
    choices = choices if lattice.levels or lattice.reuse else choices[:2]
    for part in (2, 4, 8):
        helped = [_descend(climber, model, interval // part, *choice) for choice in choices]
        choices = [x for x, again in zip(choices, helped, strict=True) if again or x == choices[0]]


def _descend(
    climber: Climber, model: ErrorModel, radius: int, orders: Sequence[int], all_actions: bool
) -> bool:
    """Until the model has nothing new to propose or fails twice in a row. Returns whether anything was better."""
    failures, before = 0, climber.accepted
    while failures < 2 and climber.may_go_on:
        model.fit(climber.samples)
        price = _price(climber) if all_actions else None
        plan = model.best_plan(climber.best, radius, orders, price)
        if plan in climber.tried:
            break
        failures = 0 if climber.propose(plan) else failures + 1
    return climber.accepted > before


def _price(climber: Climber) -> float:
    """Of one equivalent step, in the model's error: what it would gain the family (the derivative of `factor`)."""
    objective = climber.objective
    error = float((climber.weights * climber.few).mean())
    return error * objective.exponent / equivalent_steps(climber.best, objective.costs)


def climb(climber: Climber, model: ErrorModel, seed: int) -> None:
    """Random moves until the evaluations are spent; kinds that succeed come more often, of each the model picks one."""
    lattice, rng = model.lattice, random.Random(f"{seed} climb")
    kinds = moves(lattice)
    won, lost, barren = [1.0] * len(kinds), [1.0] * len(kinds), 0
    while climber.may_go_on and barren < 20 * len(kinds):
        chances = [w / (w + x) for w, x in zip(won, lost, strict=True)]
        kind = rng.choices(range(len(kinds)), chances)[0]
        near = neighbours(climber.best, lattice, kinds[kind], rng, climber.tried, PROPOSALS)
        if not near:
            barren += 1
            continue
        model.fit(climber.samples)
        plan = min(near, key=lambda p: model.predict(p) * climber.objective.factor(p))
        succeeded = climber.propose(plan)
        won[kind] += succeeded
        lost[kind] += not succeeded
        barren = 0

# SPDX-License-Identifier: Apache-2.0
"""Fixed schedules on a lattice of sigmas, and the moves that lead from one to the next.

The lattice divides every interval of the family's grid at the budget into equal parts of the family's own warped time,
so that the family is one of the plans and a step of one lattice point means about the same everywhere. On it a plan is
a list of small integers: it can be looked up in a measured table, compared, and named.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from rapid3rt.policies import FixedPlan, ScheduleTick
from rapid3rt.policies.schedule import SMALLEST_LAST_SIGMA
from rapid3rt.types import ADAMS_BASHFORTH, AUTO, COMPUTE, EULER, REUSE, ActionCosts

ORDERS = (AUTO, EULER, ADAMS_BASHFORTH)
FINENESS = 96
"""Intervals of a lattice, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One tick of a plan. at: lattice index where it starts; the others as in a schedule file."""

    at: int
    action: int = COMPUTE
    level: int = 0
    order: int = AUTO


Plan: TypeAlias = tuple[Tick, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Where ticks may stand and what they may do.

    sigmas: float32 values, falling, the last 0. budget: computing ticks of a plan. max_ticks: of all kinds. levels:
    sparsity levels that may be tried beside 0. reuse: whether ticks may reuse.
    """

    sigmas: tuple[float, ...]
    budget: int
    max_ticks: int
    levels: tuple[int, ...] = ()
    reuse: bool = False

    @property
    def end(self) -> int:
        """Index of sigma 0."""
        return len(self.sigmas) - 1

    @property
    def last(self) -> int:
        """Highest index at which a tick may start: a shorter last interval wastes its evaluation (METHOD.md, 1)."""
        return sum(sigma >= SMALLEST_LAST_SIGMA for sigma in self.sigmas) - 1

    def even(self) -> Plan:
        """The family's grid at the budget."""
        stride = self.end // self.budget
        return tuple(Tick(at=i * stride) for i in range(self.budget))

    def is_valid(self, plan: Plan) -> bool:
        """Whether a plan falls strictly from the first sigma, computes first and as often as the budget says."""
        at = [tick.at for tick in plan]
        return (
            0 < len(plan) <= self.max_ticks
            and at[0] == 0
            and at[-1] <= self.last
            and all(a < b for a, b in itertools.pairwise(at))
            and plan[0].action == COMPUTE
            and sum(tick.action == COMPUTE for tick in plan) == self.budget
        )

    def schedule(
        self, plan: Plan, family: str, provenance: Mapping[str, Any] | None = None
    ) -> FixedPlan:
        """What a schedule file holds. family: of the model."""
        ticks = tuple(
            ScheduleTick(
                sigma=self.sigmas[tick.at], action=tick.action, level=tick.level, order=tick.order
            )
            for tick in plan
        )
        return FixedPlan(family=family, ticks=ticks, provenance=provenance or {})

    def name(self, plan: Plan) -> str:
        """Sigma, action and order of every tick: `1:c0 0.9:c0 0.8:r1 0.5:c0/2`, /2 a sparsity level."""
        return " ".join(
            f"{self.sigmas[t.at]:.6g}:{'cr'[t.action]}{t.order}"
            + (f"/{t.level}" if t.level else "")
            for t in plan
        )


def equivalent_steps(plan: Plan, costs: ActionCosts) -> float:
    """Cost of a plan in steps of the plain pipeline."""
    return sum(costs.levels[t.level] if t.action == COMPUTE else costs.reuse for t in plan)


Move: TypeAlias = Callable[[Plan, Lattice, random.Random], Plan]
"""A neighbour of a plan, which may be invalid or the plan itself."""


def shift(plan: Plan, _: Lattice, rng: random.Random) -> Plan:
    """One tick earlier or later."""
    if len(plan) < 2:
        return plan
    t, by = rng.randrange(1, len(plan)), rng.choice((1, 2, 4, 8)) * rng.choice((-1, 1))
    return _replaced(plan, t, at=plan[t].at + by)


def bend(plan: Plan, lattice: Lattice, rng: random.Random) -> Plan:
    """The ticks around one place together, the less the farther they are from it: a knot of a warp moved."""
    centre, by = rng.uniform(0, lattice.end), rng.choice((2, 4, 8)) * rng.choice((-1, 1))
    reach = lattice.end / rng.choice((2, 3, 6))
    moved = (
        replace(t, at=t.at + round(by * max(0.0, 1 - abs(t.at - centre) / reach))) for t in plan[1:]
    )
    return (plan[0], *moved)


def toggle_reuse(plan: Plan, lattice: Lattice, rng: random.Random) -> Plan:
    """A reuse tick more or less.

    Of order 1, which follows the reused velocity: at order 2 a reused tick extrapolates the computed ones and ends
    where the step before it, taken whole, would have ended.
    """
    reuses = [t for t, tick in enumerate(plan) if tick.action == REUSE]
    if reuses and rng.random() < 0.5:
        t = rng.choice(reuses)
        return plan[:t] + plan[t + 1 :]
    t = rng.randrange(len(plan))
    after = plan[t + 1].at if t + 1 < len(plan) else lattice.end
    if after - plan[t].at < 2:
        return plan
    tick = Tick(at=rng.randrange(plan[t].at + 1, after), action=REUSE, order=EULER)
    return (*plan[: t + 1], tick, *plan[t + 1 :])


def change_level(plan: Plan, lattice: Lattice, rng: random.Random) -> Plan:
    """Another sparsity level for one computing tick, or for it and all that follow."""
    computes = [t for t, tick in enumerate(plan) if tick.action == COMPUTE]
    t = rng.choice(computes)
    level = rng.choice([x for x in (0, *lattice.levels) if x != plan[t].level])
    chosen = [t] if rng.random() < 0.5 else [x for x in computes if x >= t]
    for x in chosen:
        plan = _replaced(plan, x, level=level)
    return plan


def change_order(plan: Plan, _: Lattice, rng: random.Random) -> Plan:
    """Another order for one computing tick; the first has no past to use."""
    computes = [t for t, tick in enumerate(plan) if tick.action == COMPUTE and t > 0]
    if not computes:
        return plan
    t = rng.choice(computes)
    return _replaced(plan, t, order=rng.choice([x for x in ORDERS if x != plan[t].order]))


def moves(lattice: Lattice) -> tuple[Move, ...]:
    """The kinds of move that this lattice allows."""
    reuse = (toggle_reuse,) if lattice.reuse else ()
    levels = (change_level,) if lattice.levels else ()
    return (shift, bend, change_order, *reuse, *levels)


def neighbours(
    plan: Plan, lattice: Lattice, move: Move, rng: random.Random, tried: Sequence[Plan], count: int
) -> list[Plan]:
    """Up to `count` valid plans one move away, none of them twice, none of those already tried."""
    known = {plan, *tried}
    found: list[Plan] = []
    for _ in range(4 * count):
        near = move(plan, lattice, rng)
        if near not in known and lattice.is_valid(near):
            known.add(near)
            found.append(near)
        if len(found) == count:
            break
    return found


def _replaced(plan: Plan, t: int, **change: int) -> Plan:
    return (*plan[:t], replace(plan[t], **change), *plan[t + 1 :])

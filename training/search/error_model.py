# SPDX-License-Identifier: Apache-2.0
"""Predict the error of a fixed schedule from the local errors of its steps; find the schedule it says is best.

What a step leaves at x_j reaches the image times some amplification: a few numbers over the lattice, fitted on
schedules that were measured whole. It is not measured by disturbing a fine walk, because coarse steps amplify otherwise
than the flow does. On 34 warps of one order at one number of evaluations (tiny SD3 and FLUX, k = 5 to 12) errors
predicted with an amplification measured so had a rank correlation of 0.2 to 0.6 with measured ones, with a constant 0.5
to 0.7, fitted (on other warps) 0.7 to 0.95.

Shape letter: M intervals of the lattice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rapid3rt.types import AUTO, COMPUTE, EULER, REUSE, ActionCosts
from training.search.dynamic_program import cheapest_walk
from training.search.lattice import ORDERS, Lattice, Plan, Tick
from training.search.local_errors import LocalErrors

NUM_BENDS = 7
"""Numbers that describe the amplification over the lattice; two more are that of sparsity and of reuse."""
_PULL, _FLOOR = 0.01, 0.1
"""Weight of their distance from the common level, against the squared relative error of every measured schedule; and
the least they may be of it: where nothing was ever amplified, dynamic programming would put all its errors."""
_OUTLIER = 4.0
"""Times the best one's error, from which on a schedule counts less in the fit: explosions tell little of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A plan and its measured error: the weighted mean of the same pairs."""

    plan: Plan
    error: float


class ErrorModel:
    """Amplification times local error, summed over the steps of a plan. costs: of the actions.

    amplification: float64 `[NUM_BENDS + 2]`.
    """

    def __init__(self, local: LocalErrors, costs: ActionCosts) -> None:
        self.local, self.lattice, self.costs = local, local.lattice, costs
        self.amplification = torch.ones(NUM_BENDS + 2, dtype=torch.float64)
        self._first, self._tables = self._tabulate()
        self._known: dict[Plan, torch.Tensor] = {}

    def _tabulate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Local errors of the first step, `[M + 1]`, and of every other at every order, `[orders, M, M, M + 1]`."""
        end = self.lattice.end
        j = torch.arange(1, end + 1)
        none = torch.zeros_like(j)
        first = torch.full((end + 1,), math.inf, dtype=torch.float64)
        first[1:] = self.local.compute(none, none, j, EULER)
        table = torch.full((len(ORDERS), end, end, end + 1), math.inf, dtype=torch.float64)
        h, i, j = torch.combinations(torch.arange(end + 1), 3).unbind(1)
        for x, order in enumerate(ORDERS):
            table[x, h, i, j] = self.local.compute(h, i, j, order)
        return first, table

    def at(self, j: torch.Tensor) -> torch.Tensor:
        """Amplification of an error made in a step that ends at j, int64 `[N]`; float64 `[N]`."""
        return _hats(j, self.lattice.end) @ self.amplification[:NUM_BENDS]

    def features(self, plan: Plan) -> torch.Tensor:
        """What the amplification multiplies, float64 `[NUM_BENDS + 2]`.

        Local errors by where they end, then what sparsity and what reuse add to them.
        """
        if plan not in self._known:
            ends = [*(tick.at for tick in plan[1:]), self.lattice.end]
            last, rows = -1, []
            for tick, j in zip(plan, ends, strict=True):
                rows.append(self._of_tick(tick, last, j))
                last = tick.at if tick.action == COMPUTE else last
            table = torch.tensor(rows, dtype=torch.float64)
            hats = _hats(torch.tensor(ends), self.lattice.end)
            self._known[plan] = torch.cat([table[:, 0] @ hats, table[:, 1:].sum(0)])
        return self._known[plan]

    def _of_tick(self, tick: Tick, last: int, j: int) -> tuple[float, float, float]:
        """Local error, what sparsity and what reuse add."""
        h, i, end = (torch.tensor([x]) for x in (max(last, 0), tick.at, j))
        if tick.action == REUSE:
            euler = self.local.compute(i, i, end, EULER)
            return float(euler), 0.0, float(self.local.reuse(h, i, end))
        dense = self._first[j] if last < 0 else self._tables[ORDERS.index(tick.order), last, i, j]
        return float(dense), float(self.local.sparse(i, end, tick.level)), 0.0

    def predict(self, plan: Plan) -> float:
        """The weighted mean error of a plan."""
        return float(self.features(plan) @ self.amplification)

    def fit(self, samples: Sequence[Sample]) -> None:
        """Fit the amplification: least squares of the relative errors."""
        errors = torch.tensor([sample.error for sample in samples], dtype=torch.float64)
        rows = torch.stack([self.features(sample.plan) for sample in samples]) / errors[:, None]
        level = 1 / rows[:, :NUM_BENDS].sum(1).median()
        rows = rows * level
        weights = (_OUTLIER * errors.min() / errors).clamp(max=1)
        size = rows.shape[1]
        normal = rows.T @ (weights[:, None] * rows) + _PULL * torch.eye(size, dtype=torch.float64)
        x = _least_squares(normal.tolist(), (weights @ rows + _PULL).tolist())
        self.amplification = level * torch.tensor(x, dtype=torch.float64)

    def best_plan(
        self, centre: Plan, radius: int, orders: Sequence[int], price: float | None
    ) -> Plan:
        """The plan of least predicted error plus price times cost, by dynamic programming.

        Computes stand within `radius` of those of `centre`. orders: those allowed. price: of one equivalent step; None:
        dense computes alone.
        """
        end, at = self.lattice.end, self.at(torch.arange(self.lattice.end + 1))
        dense, order = self._tables[[ORDERS.index(order) for order in orders]].min(0)
        levels = (0, *self.lattice.levels) if price is not None else (0,)
        extra, level = self._extra(levels, price or 0.0)
        reuses = self.lattice.reuse and price is not None
        walk = cheapest_walk(
            _finite(at * self._first + extra[0]),
            self._last_checked(at * dense + extra),
            self._reuse_steps(at, price or 0.0) if reuses else None,
            _allowed(self.lattice, centre, radius),
            self.lattice.max_ticks,
        )
        plan, last = [], -1
        for (i, computes), (j, _) in zip(walk, [*walk[1:], (end, True)], strict=True):
            if not computes:
                plan.append(Tick(at=i, action=REUSE, order=EULER))
                continue
            chosen = orders[int(order[last, i, j])] if last >= 0 else AUTO
            plan.append(Tick(at=i, level=levels[int(level[i, j])], order=chosen))
            last = i
        return tuple(plan)

    def _extra(self, levels: Sequence[int], price: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What the best level adds to the error and the price of a step from i to j, `[M, M + 1]`, and its index."""
        end = self.lattice.end
        i, j = torch.meshgrid(torch.arange(end), torch.arange(end + 1), indexing="ij")
        per_level = [
            self.amplification[-2] * self.local.sparse(i.flatten(), j.flatten(), level).view_as(i)
            + price * self.costs.levels[level]
            for level in levels
        ]
        extra, level = torch.stack(per_level).min(0)
        return extra, level

    def _reuse_steps(self, at: torch.Tensor, price: float) -> torch.Tensor:
        end = self.lattice.end
        steps = torch.full((end, end, end + 1), math.inf, dtype=torch.float64)
        h, i, j = torch.combinations(torch.arange(end + 1), 3).unbind(1)
        added = self.amplification[-1] * self.local.reuse(h, i, j)
        euler = self.local.compute(i, i, j, EULER)
        steps[h, i, j] = at[j] * euler + added + price * self.costs.reuse
        return self._last_checked(steps)

    def _last_checked(self, steps: torch.Tensor) -> torch.Tensor:
        steps[:, self.lattice.last + 1 :, -1] = math.inf
        return _finite(steps)


def _finite(costs: torch.Tensor) -> torch.Tensor:
    """No amplification times an infinite error is no way either."""
    return costs.nan_to_num(math.inf, posinf=math.inf)


def _least_squares(normal: list[list[float]], wanted: list[float]) -> list[float]:
    """The x of least x' normal x / 2 - wanted' x, nowhere below the floor: cyclic coordinate descent."""
    x = [1.0] * len(wanted)
    for _ in range(500):
        change = 0.0
        for n, row in enumerate(normal):
            rest = wanted[n] - sum(a * b for a, b in zip(row, x, strict=True))
            new = max(x[n] + rest / row[n], _FLOOR)
            change, x[n] = max(change, abs(new - x[n])), new
        if change < 1e-9:
            break
    return x


def _hats(j: torch.Tensor, end: int) -> torch.Tensor:
    """Weights of linear interpolation between NUM_BENDS even points of the lattice, `[N, NUM_BENDS]`."""
    place = j.double() * (NUM_BENDS - 1) / end
    return (1 - (place[:, None] - torch.arange(NUM_BENDS)).abs()).clamp(min=0)


def _allowed(lattice: Lattice, centre: Plan, radius: int) -> torch.Tensor:
    """Where each compute may stand: bool `[budget, M]`."""
    at = torch.tensor([tick.at for tick in centre if tick.action == COMPUTE])
    return (torch.arange(lattice.end) - at[:, None]).abs() <= radius

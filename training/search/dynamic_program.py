# SPDX-License-Identifier: Apache-2.0
"""The cheapest walk over a lattice with an exact number of computes, by dynamic programming.

What a step costs depends on where it begins and ends and on where the last compute was, so the state is a pair of
points. Shape letter: M intervals of the lattice, points 0 to M.
"""

from __future__ import annotations

import math

import torch


def cheapest_walk(
    first: torch.Tensor,
    compute: torch.Tensor,
    reuse: torch.Tensor | None,
    allowed: torch.Tensor,
    max_ticks: int,
) -> list[tuple[int, bool]]:
    """The walk of least total cost from lattice point 0 to the end with exactly so many computes.

    Parameters
    ----------
    first: float64 `[M + 1]`, cost of computing at 0 and stepping to j. compute, reuse: `[M, M, M + 1]`, of doing so at
        i and stepping to j when the last compute was at h (index h, i, j); infinite where that cannot be. reuse None:
        no such ticks.
    allowed: bool `[budget, M]`, where each compute may stand. max_ticks: ticks of both kinds, at most.

    Returns
    -------
    The ticks in order: lattice point, and whether it computes.

    Raises
    ------
    ValueError: there is no such walk.
    """
    budget, size = allowed.shape
    table = _Table()
    start = torch.full((size, size + 1), math.inf, dtype=torch.float64)
    start[0] = first
    table.best[1, 1] = start
    for ticks in range(1, max_ticks):
        for computes in range(1, min(ticks, budget) + 1):
            if (computes, ticks) not in table.best:
                continue
            state = table.best[computes, ticks][:, :size]
            if computes < budget:
                here = torch.where(allowed[computes], state, math.inf)
                value, h = (here[:, :, None] + compute).min(0)
                table.offer((computes + 1, ticks + 1), value, -1 - h)
            if reuse is not None:
                value, i = (state[:, :, None] + reuse).min(1)
                table.offer((computes, ticks + 1), value, i)
    return table.trace(budget, size, max_ticks)


class _Table:
    """best[c, t][h, i]: least cost of standing at i after c computes, the last at h, and t ticks.

    came[c, t][h, i]: the point of the tick before, if it reused; -1 - (the compute before), if it computed, which it
    did at h.
    """

    def __init__(self) -> None:
        self.best: dict[tuple[int, int], torch.Tensor] = {}
        self.came: dict[tuple[int, int], torch.Tensor] = {}

    def offer(self, key: tuple[int, int], value: torch.Tensor, source: torch.Tensor) -> None:
        """Keep the cheaper of two ways to each state."""
        if key in self.best:
            source = torch.where(value < self.best[key], source, self.came[key])
            value = torch.minimum(value, self.best[key])
        self.best[key], self.came[key] = value, source

    def trace(self, budget: int, size: int, max_ticks: int) -> list[tuple[int, bool]]:
        """The cheapest way to the end, back to the start."""
        ends = {t: float(x[:, size].min()) for (c, t), x in self.best.items() if c == budget}
        if min(ends.values(), default=math.inf) == math.inf:
            raise ValueError(
                f"budget must leave a walk of at most {max_ticks} ticks, got {budget} computes, for which there is none"
            )
        computes, ticks = budget, min(ends, key=lambda t: ends[t])
        h, i = int(self.best[computes, ticks][:, size].argmin()), size
        walk = []
        while ticks > 1:
            source = int(self.came[computes, ticks][h, i])
            if source < 0:
                walk.append((h, True))
                h, i, computes = -1 - source, h, computes - 1
            else:
                walk.append((source, False))
                i = source
            ticks -= 1
        return [(0, True), *reversed(walk)]

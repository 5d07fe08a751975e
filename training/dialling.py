# SPDX-License-Identifier: Apache-2.0
"""The setting of a rule (a tolerance, a threshold) at which images take a wanted mean cost: found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable

CLOSE = 0.02
"""Relative distance to the wanted cost at which the search ends: what is compared is interpolated to equal cost."""
_TRIES = 8
_DIGITS = 3


class Dialling:
    """Settings that were tried and what they cost; every search begins with what the ones before it learned.

    measure: mean cost at a setting, falling as the setting rises. first: where to begin. limit: largest setting.
    """

    def __init__(
        self, measure: Callable[[float], float], first: float, limit: float = math.inf
    ) -> None:
        self.tried: dict[float, float] = {}
        self._measure, self._first, self._limit = measure, first, limit

    def find(self, target: float) -> tuple[float, float]:
        """The setting whose cost is nearest to a target above 0, and that cost, after at most 8 new tries.

        Settings are rounded to 3 digits. A cost that jumps over the target ends with the nearer side of the jump.
        """
        if not (math.isfinite(target) and target > 0):
            raise ValueError(f"target must be a finite cost above 0, got {target!r}")
        for attempt in range(_TRIES):
            if self.tried and self._distance(self._nearest(target), target) <= math.log1p(CLOSE):
                break
            setting = self._next(target, attempt)
            if setting in self.tried:
                break
            self.tried[setting] = self._measure(setting)
        best = self._nearest(target)
        return best, self.tried[best]

    def _nearest(self, target: float) -> float:
        return min(self.tried, key=lambda setting: self._distance(setting, target))

    def _distance(self, setting: float, target: float) -> float:
        return abs(math.log(self.tried[setting] / target))

    def _next(self, target: float, attempt: int) -> float:
        """Between the nearest settings on both sides, log-log; halving by turns, for curves with jumps."""
        dear = max((s for s, cost in self.tried.items() if cost >= target), default=None)
        cheap = min((s for s, cost in self.tried.items() if cost < target), default=None)
        if dear is None and cheap is None:
            setting = self._first
        elif cheap is None:
            assert dear is not None
            setting = dear * max(2.0, self.tried[dear] / target)
        elif dear is None:
            setting = cheap / max(2.0, target / self.tried[cheap])
        else:
            span = math.log(self.tried[dear] / self.tried[cheap])
            share = math.log(self.tried[dear] / target) / span if span > 0 else 0.5
            share = 0.5 if attempt % 3 == 2 else min(max(share, 0.1), 0.9)
            setting = dear * (cheap / dear) ** share
        return min(float(f"{setting:.{_DIGITS}g}"), self._limit)

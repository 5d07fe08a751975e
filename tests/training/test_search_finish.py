# SPDX-License-Identifier: Apache-2.0
"""The end of a schedule search: which plans get weights, and which of the candidates is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import training.search.finish as ending
from rapid3rt.policies import FixedPlan, ScheduleTick, WarpFamily
from rapid3rt.policies.fitted import Fit
from rapid3rt.types import AUTO, FITTED, REUSE

ROWS = ((0.0, 0.1, 0.2, 0.3), (1.0, 1.1, 1.2, 1.3), (2.0, 2.1, 2.2, 2.3))
OTHER = tuple(tuple(x + 5 for x in row) for row in ROWS)


def plan(*sigmas: float, **changes: Any) -> FixedPlan:
    ticks = tuple(ScheduleTick(sigma=s, order=AUTO) for s in sigmas)
    return FixedPlan(family="sd3", ticks=(*ticks[:-1], replace(ticks[-1], **changes)))


FOUND, EVEN = plan(1.0, 0.8, 0.3), plan(1.0, 0.7, 0.4)
FAMILY = WarpFamily(
    family="sd3",
    num_ticks=28,
    shift=3.0,
    order=AUTO,
    knots=(),
    fit=Fit(weights=((3, ROWS),), tokens=4),
)


class Bench:
    """Remembers what it is asked; every fit gives the other rows."""

    def __init__(self) -> None:
        self.fitted: list[str] = []

    def remember(self, key: str, make: Any) -> Any:
        self.fitted.append(key)
        return [list(row) for row in OTHER]


CANDIDATES = {
    "as it was": FOUND,
    "fitted": ending.with_weights(FOUND, OTHER),
    "family": ending.with_weights(EVEN, ROWS),
}


@pytest.mark.parametrize("best", CANDIDATES)
def test_the_best_on_the_pairs_that_decide_is_taken(
    best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def errors(_bench: Any, candidate: FixedPlan, pairs: Any) -> torch.Tensor:
        assert list(pairs) == [4, 2]
        # The root decides: one flipped image in ten thousand must not.
        if candidate == CANDIDATES[best]:
            return torch.tensor([1.0, 9.0], dtype=torch.float64)
        return torch.tensor([4.0, 5.0], dtype=torch.float64)

    monkeypatch.setattr(ending, "errors_of", errors)
    bench: Any = Bench()
    assert ending.finish(bench, FOUND, EVEN, FAMILY, [4, 2]) == CANDIDATES[best]
    assert bench.fitted == ["fit of 1 0.8 0.3 0"]


@pytest.mark.parametrize("changes", [{"action": REUSE}, {"level": 1}])
def test_reuse_and_sparsity_get_no_weights(
    changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "errors_of", lambda *_: torch.ones(2))
    bench, found = Bench(), plan(1.0, 0.8, 0.3, **changes)
    family = replace(FAMILY, fit=None)
    assert ending.finish(bench, found, EVEN, family, [0, 1]) == found  # type: ignore[arg-type]
    assert not bench.fitted


def test_weights_change_nothing_but_the_step() -> None:
    weighted = ending.with_weights(FOUND, ROWS)
    assert [tick.weights for tick in weighted.ticks] == list(ROWS)
    assert {tick.order for tick in weighted.ticks} == {FITTED}
    plain = [replace(tick, order=AUTO, weights=None) for tick in weighted.ticks]
    assert plain == list(FOUND.ticks)

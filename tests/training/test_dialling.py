# SPDX-License-Identifier: Apache-2.0
"""Settings are found on smooth curves, on stairs and at limits."""

from __future__ import annotations

import math

import pytest

from training.dialling import CLOSE, Dialling


def counted(curve: object) -> tuple[Dialling, list[float]]:
    asked: list[float] = []

    def measure(setting: float) -> float:
        asked.append(setting)
        return curve(setting)  # type: ignore[operator, no-any-return]

    return Dialling(measure, 0.1), asked


@pytest.mark.parametrize("target", [0.3, 5.0, 6.0, 14.0, 27.0])
def test_a_smooth_curve_is_met_in_few_tries(target: float) -> None:
    dialling, asked = counted(lambda x: 28 / (1 + 30 * x))
    setting, cost = dialling.find(target)
    assert abs(math.log(cost / target)) <= math.log1p(CLOSE)
    assert cost == 28 / (1 + 30 * setting)
    assert len(asked) <= 8


def test_later_targets_learn_from_earlier_ones() -> None:
    dialling, asked = counted(lambda x: 0.9 * x**-1.1)
    for target in (5, 6, 8, 10, 14):
        dialling.find(target)
    assert len(asked) <= 11
    before = len(asked)
    dialling.find(8)
    assert len(asked) == before


def test_a_jump_over_the_target_ends_at_the_nearer_side() -> None:
    dialling, asked = counted(lambda x: 9.0 if x < 0.2345 else 5.0)
    _, cost = dialling.find(8)
    assert cost == 9.0
    assert len(asked) <= 8
    assert dialling.find(5.5)[1] == 5.0


def test_a_setting_stays_below_its_limit() -> None:
    dialling = Dialling(lambda x: 20 / x, 0.5, limit=1.0)
    assert dialling.find(3.0) == (1.0, 20.0)


def test_settings_are_rounded() -> None:
    dialling, asked = counted(lambda x: 1 / x)
    dialling.find(math.pi)
    assert all(s == float(f"{s:.3g}") for s in asked)


@pytest.mark.parametrize("target", [0.0, -3.0, math.nan, math.inf])
def test_a_target_must_be_a_cost(target: float) -> None:
    with pytest.raises(ValueError, match="target must be a finite cost above 0"):
        Dialling(lambda x: x, 1.0).find(target)

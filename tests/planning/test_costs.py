# SPDX-License-Identifier: Apache-2.0
"""Estimates where nothing was measured."""

from __future__ import annotations

import pytest

from rapid3rt.planning.costs import with_estimates
from rapid3rt.types import ActionCosts


def test_a_level_saves_its_share_of_the_attention() -> None:
    costs = with_estimates(ActionCosts(), image_attention_share=0.4, image_blocks=8)
    assert costs.levels == pytest.approx((1.0, 1 - 0.4 / 4, 1 - 0.4 / 2, 1 - 0.4 * 3 / 4))
    assert not costs.measured


def test_blocks_are_whole() -> None:
    # One block: every level keeps it. Three: 3, 2 and 1 of them.
    assert with_estimates(ActionCosts(), 0.5, 1).levels == (1.0, 1.0, 1.0, 1.0)
    three = with_estimates(ActionCosts(), 0.3, 3).levels
    assert three == pytest.approx((1.0, 1.0, 1 - 0.3 / 3, 1 - 0.3 * 2 / 3))


def test_what_was_measured_stays() -> None:
    measured = ActionCosts(levels=(1.02, 0.9), reuse=0.03, measured=True)
    costs = with_estimates(measured, image_attention_share=0.4, image_blocks=8)
    assert costs.levels[:2] == measured.levels
    assert costs.levels[2:] == pytest.approx((1.02 * 0.8, 1.02 * 0.7))
    assert costs.reuse == 0.03

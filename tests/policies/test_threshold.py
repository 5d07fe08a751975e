# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from rapid3rt.policies import Dense, Threshold
from rapid3rt.types import COMPUTE, REUSE


def test_it_computes_as_soon_as_the_drift_exceeds_the_threshold(sim):
    world = sim.world(2)
    world.drift = torch.tensor([0.0625, 0.25])  # per tick, exact in float32
    walk = sim.drive(Threshold(0.125), sim.run(2, ticks=7), world)
    # Image 0 drifts .0625, .125, .1875 (above): every third tick. Image 1: every tick.
    assert walk.column("action", 0) == [COMPUTE, REUSE, REUSE, COMPUTE, REUSE, REUSE, COMPUTE]
    assert walk.column("action", 1) == [COMPUTE] * 7
    assert walk.nfe == [3, 7]
    assert [*walk.column("sigma", 0), 0.0] == list(sim.grid(7))


def test_threshold_zero_is_dense(sim):
    assert sim.drive(Threshold(0.0), sim.run(3), sim.world(3)) == sim.drive(
        Dense(), sim.run(3), sim.world(3)
    )


def test_a_huge_threshold_computes_once(sim):
    walk = sim.drive(Threshold(1e9), sim.run(2), sim.world(2))
    assert walk.nfe == [1, 1]


def test_an_image_does_not_see_its_neighbours(sim):
    world, order = sim.world(5), [3, 0, 4, 2, 1]
    together = sim.drive(Threshold(0.2), sim.run(5), world)
    shuffled = sim.drive(Threshold(0.2), sim.run(5), world.take(order))
    for place, image in enumerate(order):
        alone = sim.drive(Threshold(0.2), sim.run(1), world.take([image]))
        for name in ("sigma", "action", "next_sigma"):
            assert alone.column(name, 0) == together.column(name, image)
            assert shuffled.column(name, place) == together.column(name, image)


@pytest.mark.parametrize("x", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_the_threshold_must_be_a_finite_number(x):
    with pytest.raises(ValueError, match="threshold must be a finite number of at least 0"):
        Threshold(x)


def test_order_two_is_passed_on(sim):
    walk = sim.drive(Threshold(0.1, order=2), sim.run(1), sim.world(1))
    assert set(walk.column("order", 0)) == {2}
    assert Threshold(0.1, order=2).name == "threshold:0.1/ab2"

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rapid3rt.policies import Dense, Steps
from rapid3rt.policies.base import round_float32, trimmed_sigmas
from rapid3rt.types import COMPUTE, Policy


def test_dense_walks_every_grid_point_with_euler_and_computes(sim):
    walk = sim.drive(Dense(), sim.run(3), sim.world(3))
    grid = list(sim.grid(28))
    for image in range(3):
        assert [*walk.column("sigma", image), 0.0] == grid
        assert set(walk.column("action", image)) == {COMPUTE}
        assert set(walk.column("order", image)) == {1}
        assert set(walk.column("level", image)) == {0}
    assert walk.nfe == [28, 28, 28]
    assert Dense().leaves_grid is False
    assert isinstance(Dense(), Policy)


def test_steps_asks_for_its_own_grid_and_walks_it_exactly(sim):
    policy = Steps(9)
    assert (policy.grid_steps, policy.leaves_grid, policy.name) == (9, False, "steps:9")
    run = sim.run(2, sigmas=sim.grid(9))
    walk = sim.drive(policy, run, sim.world(2))
    assert [*walk.column("sigma", 1), 0.0] == list(sim.grid(9))
    assert walk.nfe == [9, 9]


def test_trimmed_steps_walk_even_steps_in_u(sim):
    policy = Steps(4, trim=True, order=2)
    assert (policy.grid_steps, policy.leaves_grid) == (None, True)
    assert policy.name == "steps:4/trim/ab2"
    walk = sim.drive(policy, sim.run(), sim.world(1))
    assert tuple(walk.column("next_sigma", 0)) == round_float32([0.9, 0.75, 0.5, 0.0])
    assert walk.column("order", 0) == [2, 2, 2, 2]


def test_one_step_goes_straight_to_zero(sim):
    walk = sim.drive(Steps(1, trim=True), sim.run(), sim.world(1))
    assert walk.column("next_sigma", 0) == [0.0]


def test_steps_must_fit_the_run(sim):
    with pytest.raises(ValueError, match=r"steps:29/trim .* at most 28, got 29"):
        Steps(29, trim=True).begin(sim.run())
    with pytest.raises(ValueError, match=r"steps:30 .* at most 28, got 30"):
        Steps(30).begin(sim.run(sigmas=sim.grid(30)))


@pytest.mark.parametrize("k", [0, -3, 2.0, True, "9"])
def test_steps_must_be_a_count(k):
    with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
        Steps(k)


def test_order_must_be_known():
    with pytest.raises(ValueError, match=r"order must be 0 \(auto\), 1 \(Euler\) or 2"):
        Steps(4, order=3)


def test_a_second_run_starts_clean(sim):
    policy = Steps(5, trim=True)
    first = sim.drive(policy, sim.run(1), sim.world(1))
    sim.drive(policy, sim.run(3, ticks=7), sim.world(3))
    assert sim.drive(policy, sim.run(1), sim.world(1)) == first
    assert tuple(first.column("next_sigma", 0)) == trimmed_sigmas(5, sim.run())[1:]

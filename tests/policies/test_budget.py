# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rapid3rt.planning.trace import Trace, TraceTick
from rapid3rt.policies import (
    Controller,
    Dense,
    FixedPlan,
    FixedSchedule,
    Replay,
    ScheduleFamily,
    ScheduleTick,
    Steps,
    Threshold,
    WarpFamily,
    with_budget,
    with_speed,
)
from rapid3rt.policies.base import trimmed_sigmas
from rapid3rt.types import COMPUTE, REUSE

FAMILY = WarpFamily(family="sd3", num_ticks=28, shift=3.0, order=2, knots=((0.5, 0.4),))
PLANNERS = [Dense(), Threshold(0.05), Controller(0.1), ScheduleFamily(FAMILY)]
FIXED = [
    Steps(9),
    Steps(9, trim=True),
    FixedSchedule(FixedPlan(family="sd3", ticks=(ScheduleTick(sigma=1.0),))),
    Replay(
        Trace(
            model="m",
            family="sd3",
            ticks=1,
            sigmas=(1.0, 0.0),
            images=((TraceTick(sigma=1.0, action=COMPUTE, next_sigma=0.0),),),
        )
    ),
]


@pytest.mark.parametrize("k", [1, 2, 7, 27, 28])
@pytest.mark.parametrize("policy", PLANNERS, ids=lambda p: p.name)
def test_no_image_spends_more_than_its_budget_and_all_end(sim, policy, k):
    # The cap of the session is off: the policies keep it by themselves.
    walk = sim.drive(with_budget(policy, k), sim.run(4), sim.world(4))
    assert max(walk.nfe) <= k


def test_dense_under_a_budget_walks_the_trimmed_grid(sim):
    policy = with_budget(Dense(), 6)
    assert policy.leaves_grid is True
    walk = sim.drive(policy, sim.run(2), sim.world(2))
    assert tuple(walk.column("next_sigma", 0)) == trimmed_sigmas(6, sim.run())[1:]
    assert set(walk.column("order", 0)) == {1}
    assert policy.leaves_grid is True


def test_dense_with_a_budget_of_all_ticks_is_dense(sim):
    policy = with_budget(Dense(), 28)
    assert sim.drive(policy, sim.run(2), sim.world(2)) == sim.drive(
        Dense(), sim.run(2), sim.world(2)
    )
    assert policy.leaves_grid is False


def test_a_run_shorter_than_the_budget_is_dense(sim):
    walk = sim.drive(with_budget(Dense(), 20), sim.run(ticks=14), sim.world(1))
    assert [*walk.column("sigma", 0), 0.0] == list(sim.grid(14))


def test_the_budget_of_the_run_counts_too(sim):
    assert sim.drive(with_budget(Dense(), 9), sim.run(budget=4), sim.world(1)).nfe == [4]


def test_threshold_reuses_to_the_end_of_its_grid_once_it_is_spent(sim):
    walk = sim.drive(with_budget(Threshold(0.0), 3), sim.run(2, ticks=7), sim.world(2))
    assert walk.column("action", 1) == [COMPUTE] * 3 + [REUSE] * 4
    assert [*walk.column("sigma", 1), 0.0] == list(sim.grid(7))


def test_speed_plans_with_the_floor_of_ticks_over_speed(sim):
    assert sim.drive(with_speed(Dense(), 2.5), sim.run(), sim.world(1)).nfe == [11]
    assert sim.drive(with_speed(ScheduleFamily(FAMILY), 3), sim.run(), sim.world(1)).nfe == [9]
    assert sim.drive(with_speed(Dense(), 999), sim.run(), sim.world(1)).nfe == [1]


@pytest.mark.parametrize("policy", PLANNERS, ids=lambda p: p.name)
def test_speed_one_is_dense(policy):
    assert isinstance(with_speed(policy, 1), Dense)


@pytest.mark.parametrize("policy", FIXED, ids=lambda p: p.name)
def test_policies_that_fix_their_evaluations_refuse_both(policy):
    with pytest.raises(ValueError, match=f"budget must not be given with '{policy.name}'"):
        with_budget(policy, 5)
    with pytest.raises(ValueError, match=f"speed must not be given with '{policy.name}'"):
        with_speed(policy, 1)


def test_the_original_policy_is_left_as_it_was(sim):
    policy = Controller(0.05)
    with_budget(policy, 3)
    assert policy.budget is None
    assert max(sim.drive(policy, sim.run(2), sim.world(2)).nfe) > 3


def test_a_users_own_policy_comes_back_unchanged():
    class Own:
        begin = decide_compute = decide_step = print

    own = Own()
    assert with_budget(own, 3) is own


@pytest.mark.parametrize("k", [0, -1, 2.5, True, None])
def test_a_budget_must_be_a_count(k):
    with pytest.raises(ValueError, match="budget must be an integer of at least 1"):
        with_budget(Dense(), k)


@pytest.mark.parametrize("speed", [0.5, 0, float("nan"), float("inf"), "2"])
def test_a_speed_must_be_at_least_one(speed):
    with pytest.raises(ValueError, match="speed must be a finite number of at least 1"):
        with_speed(Dense(), speed)

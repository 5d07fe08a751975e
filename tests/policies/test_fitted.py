# SPDX-License-Identifier: Apache-2.0
"""Weights of fitted steps: looked up by k and j, interpolated, and only where they belong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rapid3rt.policies import ScheduleFamily, WarpFamily, load_schedule, save_schedule
from rapid3rt.policies.fitted import Fit, FittedSteps, stretched
from rapid3rt.types import AUTO, EULER, FITTED


def rows(k, base=0.0):
    """Rows that say which they are."""
    return tuple((base + j, 10 * k + j, 0.5, -j / 4) for j in range(k))


FIT = Fit(weights=((4, rows(4)), (5, rows(5)), (8, rows(8, 100.0))), tokens=36, guidance=4.0)
FAMILY = WarpFamily(family="sd3", num_ticks=28, shift=3.0, order=AUTO, knots=((0.5, 0.4),), fit=FIT)


def test_rows_of_a_fitted_k_are_its_own():
    assert FIT.rows(4) == rows(4)
    assert FIT.rows(8) == rows(8, 100.0)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_below_what_was_fitted_there_are_none(k):
    assert FIT.rows(k) is None


@pytest.mark.parametrize("k", [9, 28])
def test_above_it_the_last_ones_go_on(k):
    assert FIT.rows(k) == tuple(stretched(rows(8, 100.0), k))


@pytest.mark.parametrize("k", [6, 7])
def test_between_two_k_rows_lie_between_theirs(k):
    share = math.log(k / 5) / math.log(8 / 5)
    found = FIT.rows(k)
    assert len(found) == k
    for j in (0, 1):  # start-up with start-up
        assert found[j][0] == pytest.approx(j + share * 100)
    assert found[-1][0] == pytest.approx(4 + share * (107 - 4))  # last with last
    assert [row[0] for row in found[2:]] == sorted(row[0] for row in found[2:])


@pytest.mark.parametrize("k", range(1, 12))
def test_stretching_keeps_ends_and_start_up(k):
    found = stretched(rows(5), k)
    assert len(found) == k
    assert found[:2] == list(rows(5)[: min(2, k)])
    if k > 3:
        assert found[-1] == pytest.approx(rows(5)[-1])
    assert stretched(rows(5), 5) == list(rows(5))


def test_every_image_gets_the_row_of_its_own_k_and_j(sim):
    steps = FittedSteps(FIT, sim.run(6), EULER)
    planned = torch.tensor([4.0, 5.0, 8.0, 3.0, 9.0, 28.0])
    nfe = torch.tensor([3, 0, 7, 1, 1, 27], dtype=torch.int32)
    decision = steps.decision(torch.zeros(6), planned, nfe)
    assert decision.order.tolist() == [FITTED, FITTED, FITTED, EULER, FITTED, FITTED]
    assert decision.weights[0].tolist() == list(rows(4)[3])
    assert decision.weights[1].tolist() == list(rows(5)[0])
    assert decision.weights[2].tolist() == list(rows(8, 100.0)[7])


def test_plans_beyond_the_run_are_no_error(sim):
    steps = FittedSteps(FIT, sim.run(1, ticks=6), AUTO)
    far = steps.decision(torch.zeros(1), torch.tensor([99.0]), torch.tensor([98]))
    assert far.weights[0].tolist() == torch.tensor(FIT.rows(6)[5]).tolist()  # the run's last


SUITS = {"resolution": (6, 6), "shift": 3.0, "guidance": 4.0}


@pytest.mark.parametrize(
    ("changes", "misfit"),
    [
        ({}, None),
        ({"resolution": (5, 7)}, None),
        ({"resolution": (12, 12)}, "144 image tokens, not 36"),
        ({"shift": 3.2}, "shift 3.2, not 3"),
        ({"guidance": 7.0}, "guidance 7, not 4"),
        ({"guidance": None}, "guidance none, not 4"),
        ({"sigmas": (0.7, 0.4, 0.0), "ticks": 2}, "a start at sigma 0.7, not 1"),
    ],
)
def test_a_fit_serves_runs_like_those_it_was_made_on(sim, changes, misfit):
    run = sim.run(1, **{**SUITS, **changes})
    assert FIT.misfit(run, 3.0) == misfit
    policy = ScheduleFamily(FAMILY, budget=4)
    policy.begin(run)
    assert len(policy.notes) == (misfit is not None)
    assert all(misfit in note for note in policy.notes)


@pytest.mark.parametrize(("guidance", "orders"), [(4.0, {FITTED}), (7.0, {AUTO})])
def test_a_family_takes_fitted_steps_where_they_suit(sim, guidance, orders):
    run = sim.run(2, guidance=guidance)
    for k in (4, 6, 8):
        walk = sim.drive(ScheduleFamily(FAMILY, budget=k), run, sim.world(2))
        assert set(walk.column("order", 0)) == orders
        assert walk.nfe == [k, k]
    walk = sim.drive(ScheduleFamily(FAMILY, budget=3), run, sim.world(2))
    assert set(walk.column("order", 1)) == {AUTO}


def test_a_fit_changes_nothing_but_the_steps(sim):
    run = sim.run(2, guidance=4.0)
    policies = ScheduleFamily(FAMILY, budget=6), ScheduleFamily(replace(FAMILY, fit=None), budget=6)
    ours, theirs = (sim.drive(policy, run, sim.world(2)) for policy in policies)
    assert ours.next_sigma == theirs.next_sigma
    assert ours.sigma == theirs.sigma


def test_a_file_comes_back_with_its_fit(tmp_path):
    save_schedule(FAMILY, tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json") == FAMILY
    save_schedule(replace(FAMILY, fit=replace(FIT, guidance=None)), tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json").fit.guidance is None


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (replace(FIT, weights=()), "fit.weights must be tables of rising k, at least one"),
        (
            replace(FIT, weights=((5, rows(5)), (4, rows(4)))),
            "fit.weights must be tables of rising",
        ),
        (replace(FIT, weights=((5, rows(4)),)), r"fit.weights\[0\].rows must be k = 5 rows, got 4"),
        (replace(FIT, weights=((1, ((0.0,),)),)), r"rows\[0\] must be 4 numbers"),
        (replace(FIT, weights=((1, ((math.nan,) * 4,)),)), r"rows\[0\]\[0\] must be"),
        (replace(FIT, tokens=0), "fit.tokens must be an integer of at least 1, got 0"),
        (replace(FIT, guidance=-1.0), "fit.guidance must be in 0"),
    ],
)
def test_a_wrong_fit_is_named_and_never_written(fit, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_schedule(replace(FAMILY, fit=fit), tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()

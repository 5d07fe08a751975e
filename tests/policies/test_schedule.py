# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt.policies import (
    FixedPlan,
    FixedSchedule,
    ScheduleFamily,
    ScheduleTick,
    WarpFamily,
    load_schedule,
    save_schedule,
    schedule_policy,
)
from rapid3rt.policies.base import Warp, round_float32, trimmed_sigmas
from rapid3rt.types import COMPUTE, REUSE

PLAN = FixedPlan(
    family="sd3",
    ticks=(
        ScheduleTick(sigma=1.0),
        ScheduleTick(sigma=0.9, level=2, order=2),
        ScheduleTick(sigma=0.5, action=REUSE, order=2),
        ScheduleTick(sigma=0.25, order=3, weights=(0.5, -0.25, 0.125, 0.0)),
    ),
    provenance={"by": "hand", "pairs": 12},
)
FAMILY = WarpFamily(
    family="sd3",
    num_ticks=28,
    shift=3.0,
    order=2,
    knots=((0.1, 0.05), (0.3, 0.25), (0.6, 0.5), (0.8, 0.75)),
    error_profile=((0.0, 0.5), (0.5, 2.0), (1.0, 1.0)),
    provenance={"searched_on": "calibration split"},
)


@pytest.mark.parametrize("schedule", [PLAN, FAMILY, replace(FAMILY, error_profile=None, knots=())])
def test_a_file_comes_back_as_it_was(schedule, tmp_path):
    save_schedule(schedule, tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json") == schedule
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]  # nothing temporary is left


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(2**-10, 1, width=32), min_size=1, max_size=9, unique=True))
def test_sigmas_come_back_bit_for_bit(tmp_path_factory, sigmas):
    path = tmp_path_factory.mktemp("s") / "s.json"
    ticks = tuple(ScheduleTick(sigma=s) for s in sorted(sigmas, reverse=True))
    save_schedule(FixedPlan(family="sd3", ticks=ticks), path)
    assert load_schedule(path).ticks == ticks


def test_the_fixed_schedule_does_what_the_file_says(sim):
    walk = sim.drive(FixedSchedule(PLAN), sim.run(2), sim.world(2))
    for image in range(2):
        assert walk.column("action", image) == [COMPUTE, COMPUTE, REUSE, COMPUTE]
        assert walk.column("level", image) == [0, 2, 0, 0]
        assert walk.column("order", image) == [1, 2, 2, 3]
        assert walk.column("next_sigma", image) == list(round_float32([0.9, 0.5, 0.25, 0.0]))
    assert walk.nfe == [3, 3]


def test_the_fixed_schedule_must_fit_the_run(sim):
    policy = FixedSchedule(PLAN, name="schedule:x.json")
    with pytest.raises(ValueError, match=r"family must be 'sd3'.*got 'flux'"):
        policy.begin(sim.run(family="flux"))
    with pytest.raises(
        ValueError, match=r"schedule:x\.json must have at most the run's 3 ticks, got 4"
    ):
        policy.begin(sim.run(ticks=3))
    with pytest.raises(ValueError, match=r"must start at the run's sigma 0\.75, got 1"):
        policy.begin(sim.run(ticks=4, sigmas=(0.75, 0.5, 0.25, 0.125, 0.0)))


@pytest.mark.parametrize(("limits", "k"), [({"budget": 6}, 6), ({"speed": 3.0}, 9), ({}, 28)])
def test_the_family_walks_its_own_grid_at_k(sim, limits, k):
    policy = ScheduleFamily(FAMILY, **limits)
    walk = sim.drive(policy, sim.run(2), sim.world(2))
    grid = trimmed_sigmas(k, sim.run(), Warp(FAMILY.knots))
    assert tuple(walk.column("next_sigma", 1)) == grid[1:]
    assert set(walk.column("order", 0)) == {2}
    assert walk.nfe == [k, k]


def test_the_family_follows_the_budget_of_the_run(sim):
    walk = sim.drive(ScheduleFamily(FAMILY), sim.run(2, budget=5), sim.world(2))
    assert walk.nfe == [5, 5]


def document(schedule, tmp_path):
    save_schedule(schedule, tmp_path / "s.json")
    return json.loads((tmp_path / "s.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "rapid3rt.trace"}, r"s\.json: format must be 'rapid3rt.schedule', got 'rapid3"),
        ({"version": 2}, r"version must be 1, got 2"),
        ({"kind": "spline"}, r"kind must be one of fixed, family, got 'spline'"),
        ({"num_ticks": 3}, r"ticks must have num_ticks = 3 entries, got 4"),
        ({"ticks": []}, r"ticks must have num_ticks = 4 entries, got 0"),
        ({"ticks": 5}, r"s\.json: ticks must be a list, got 5"),
        ({"provenance": None}, r"provenance must be an object, got None"),
    ],
)
def test_a_wrong_field_of_a_fixed_schedule_is_named(change, message, tmp_path):
    data = {**document(PLAN, tmp_path), **change}
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_schedule(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, {"sigma": 1.0}, r"ticks\[0\]\.sigma must be above the next one, 1, got 1.0"),
        (3, {"sigma": 0.0}, r"ticks\[3\]\.sigma must be above the next one, 0, got 0.0"),
        (2, {"sigma": "x"}, r"ticks\[2\]\.sigma must be a number, got 'x'"),
        (2, {"sigma": float(10**30)}, r"ticks\[2\]\.sigma must be in 0\.\.1"),
        (2, {"sigma": 1.5}, r"ticks\[2\]\.sigma must be in 0\.\.1, got 1.5"),
        (0, {"action": "reuse"}, r"ticks\[0\]\.action must be compute"),
        (2, {"action": "sleep"}, r"ticks\[2\]\.action must be one of compute, reuse"),
        (1, {"level": -1}, r"ticks\[1\]\.level must be an integer in 0\.\.3, got -1"),
        (1, {"order": 4}, r"ticks\[1\]\.order must be an integer in 0\.\.3, got 4"),
        (1, {"order": 3}, r"ticks\[1\]\.weights must be present"),
        (1, {"order": 3, "weights": [1, 2]}, r"ticks\[1\]\.weights must be 4 numbers"),
    ],
)
def test_a_wrong_tick_is_named(index, change, message, tmp_path):
    data = document(PLAN, tmp_path)
    data["ticks"][index].update(change)
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_schedule(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knots": [[0.5, 0.5], [0.4, 0.6]]}, "knots must rise strictly"),
        ({"knots": [[0.5, 0.5], [0.6, 0.5]]}, "knots must rise strictly"),
        ({"knots": [[0.5]]}, r"knots\[0\] must be a pair of numbers"),
        ({"knots": [[0.5, None]]}, r"knots\[0\]\[1\] must be a number"),
        ({"knots": [[0.2, 0.001]]}, r"knots must keep phi\*\(1 / num_ticks\) at 0.02 or above"),
        ({"shift": 0}, "shift must be above 0"),
        ({"order": -1}, r"order must be an integer in 0\.\.2"),
        ({"num_ticks": True}, "num_ticks must be an integer of at least 1, got True"),
        ({"error_profile": [[0.0, 1.0]]}, "error_profile must be null or at least two"),
        ({"error_profile": [[0.0, 1.0], [1.0, 0.0]]}, "error_profile must be null"),
    ],
)
def test_a_wrong_field_of_a_family_is_named(change, message, tmp_path):
    data = {**document(FAMILY, tmp_path), **change}
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        load_schedule(tmp_path / "s.json")


@pytest.mark.parametrize("field", ["format", "kind", "knots", "order", "family", "error_profile"])
def test_a_missing_field_is_named(field, tmp_path):
    data = document(FAMILY, tmp_path)
    del data[field]
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{field} must be present, got nothing"):
        load_schedule(tmp_path / "s.json")


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    save_schedule(PLAN, tmp_path / "s.json")
    whole = (tmp_path / "s.json").read_text().rstrip()
    for cut in range(0, len(whole), 7):
        (tmp_path / "s.json").write_text(whole[:cut])
        with pytest.raises(
            ValueError, match=r"s\.json: content must be one complete JSON document"
        ):
            load_schedule(tmp_path / "s.json")


def test_a_file_that_could_not_be_loaded_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="knots must rise"):
        save_schedule(replace(FAMILY, knots=((0.5, 0.5), (0.4, 0.4))), tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_the_policy_of_a_file_has_its_name(tmp_path):
    save_schedule(PLAN, tmp_path / "plan.json")
    save_schedule(FAMILY, tmp_path / "family.json")
    assert isinstance(schedule_policy(tmp_path / "plan.json"), FixedSchedule)
    policy = schedule_policy(tmp_path / "family.json")
    assert isinstance(policy, ScheduleFamily)
    assert policy.name == "schedule:family.json"

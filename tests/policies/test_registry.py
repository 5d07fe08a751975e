# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from rapid3rt.planning.trace import Trace, TraceTick
from rapid3rt.policies import (
    Controller,
    Dense,
    Replay,
    ScheduleFamily,
    Steps,
    Threshold,
    WarpFamily,
    known_names,
    parse,
    save_schedule,
)


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("dense", Dense, {}),
        ("steps:9", Steps, {"k": 9, "trim": False, "order": 1, "grid_steps": 9}),
        ("steps:9/trim", Steps, {"k": 9, "trim": True, "order": 1, "grid_steps": None}),
        ("steps:9/ab2", Steps, {"k": 9, "trim": False, "order": 2}),
        ("steps:9/auto", Steps, {"k": 9, "trim": False, "order": 0}),
        ("steps:9/trim/ab2", Steps, {"k": 9, "trim": True, "order": 2}),
        ("threshold:0.1", Threshold, {"x": 0.1, "order": 1}),
        ("threshold:0.25/ab2", Threshold, {"x": 0.25, "order": 2}),
        ("controller:0.1", Controller, {"tol": 0.1, "order": 0}),
    ],
)
def test_a_name_makes_its_policy_which_bears_it(name, kind, values):
    policy = parse(name)
    assert type(policy) is kind
    assert policy.name == name
    assert {key: getattr(policy, key) for key in values} == values


def test_options_may_come_in_either_order():
    assert parse("steps:4/ab2/trim").name == "steps:4/trim/ab2"


def test_files_make_their_policies(tmp_path):
    family = WarpFamily(family="sd3", num_ticks=28, shift=3.0, order=1, knots=())
    save_schedule(family, tmp_path / "f.json")
    assert type(parse(f"schedule:{tmp_path / 'f.json'}")) is ScheduleFamily
    tick = TraceTick(sigma=1.0, action=0, next_sigma=0.0)
    trace = Trace(model="m", family="sd3", ticks=1, sigmas=(1.0, 0.0), images=((tick,),))
    trace.save(tmp_path / "t.json")
    assert type(parse(f"replay:{tmp_path / 't.json'}")) is Replay


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("tresholt:0.1", "threshold:X"),
        ("step:9", "steps:K"),
        ("Dense", "dense"),
        ("control:0.1", "controller:TOL"),
        ("", "dense"),
    ],
)
def test_an_unknown_name_lists_all_known_ones_nearest_first(wrong, nearest):
    with pytest.raises(ValueError, match="policy must be one of") as error:
        parse(wrong)
    listed = str(error.value).removeprefix("policy must be one of ")
    assert listed.startswith(nearest)
    assert all(name in listed for name in known_names())
    assert f"got '{wrong}'" in listed


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("steps", r"steps:K\[/trim\]\[/ab2\|/auto\]"),
        ("steps:", r"steps:K\[/trim\]\[/ab2\|/auto\]"),
        ("steps:nine", "steps:K"),
        ("steps:9.5", "steps:K"),
        ("steps:-1", "steps:K"),
        ("steps:9/trim/trim", "steps:K"),
        ("steps:9/fast", "steps:K"),
        ("steps:9/ab2/auto", "steps:K"),
        ("threshold", r"threshold:X\[/ab2\|/auto\]"),
        ("threshold:lots", "threshold:X"),
        ("controller:0.1/ab2", "controller:TOL"),
        ("dense:3", "dense"),
        ("dense:", "dense"),
        ("replay", "replay:FILE"),
        ("schedule:", "schedule:FILE"),
    ],
)
def test_a_malformed_name_says_how_it_is_written(name, form):
    with pytest.raises(ValueError, match=f"must be written {form}.*, got '{name}'"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steps:0", "steps must be an integer of at least 1, got 0"),
        ("threshold:-1", "threshold must be a finite number of at least 0, got -1.0"),
        ("threshold:nan", "threshold must be a finite number"),
        ("controller:2", "tolerance must be a number above 0 and at most 1, got 2.0"),
    ],
)
def test_a_value_out_of_range_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_a_foreign_file_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"format": "other", "version": 1}')
    with pytest.raises(ValueError, match=r"x\.json: format must be 'rapid3rt.trace', got 'other'"):
        parse(f"replay:{tmp_path / 'x.json'}")
    with pytest.raises(FileNotFoundError):
        parse("schedule:/nowhere/at/all.json")

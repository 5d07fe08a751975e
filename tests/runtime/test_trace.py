# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt.runtime.trace import Trace, TraceTick
from rapid3rt.types import COMPUTE, REUSE, ActionCosts

THIRD = struct.unpack("f", struct.pack("f", 1 / 3))[0]  # no short decimal form


def tick(sigma, next_sigma, **changes):
    values = {"sigma": sigma, "next_sigma": next_sigma, "action": COMPUTE}
    return TraceTick(**{**values, **changes})


TRACE = Trace(
    model="tiny-sd3@1234",
    family="sd3",
    ticks=4,
    sigmas=(1.0, 0.75, 0.5, THIRD, 0.0),
    images=(
        (
            tick(1.0, 0.75),
            tick(0.75, THIRD, action=REUSE, density=0.0, cost=0.02, order=2),
            tick(
                THIRD,
                0.0,
                level=2,
                density=0.4,
                cost=0.8,
                order=3,
                weights=(0.1, -0.25, THIRD, 0.0),
            ),
        ),
        (tick(1.0, 0.0),),
    ),
    policy="controller:0.1",
    grid_steps=None,
    budget=3,
    block_q=32,
    block_kv=32,
    attention="exact",
    costs=ActionCosts(levels=(1.01, 0.9, 0.8), reuse=0.02, measured=True),
    tick_ms=(30.5, 16.25, 15.0, 0.25),
)


def test_a_trace_comes_back_as_it_was(tmp_path):
    TRACE.save(tmp_path / "t.json")
    assert Trace.load(tmp_path / "t.json") == TRACE
    assert Trace.from_json(TRACE.to_json()) == TRACE
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_the_file_is_readable_json_with_names(tmp_path):
    TRACE.save(tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    assert (data["format"], data["version"]) == ("rapid3rt.trace", 1)
    assert data["images"][0]["ticks"][1]["action"] == "reuse"
    assert data["costs"] == {"levels": [1.01, 0.9, 0.8], "reuse": 0.02, "measured": True}


sigmas = st.lists(
    st.floats(2**-20, 1, width=32, allow_subnormal=False), min_size=1, max_size=12, unique=True
)
nulls = st.one_of(st.none(), st.integers(1, 128))


@settings(max_examples=60, deadline=None)
@given(st.lists(sigmas, min_size=1, max_size=4), st.data())
def test_any_trace_comes_back_bit_for_bit(ways, data):
    start = max(ways[0])

    def walk(way):
        points = [start, *sorted((x for x in way if x < start), reverse=True), 0.0]
        return tuple(
            tick(
                a,
                b,
                action=data.draw(st.integers(0, 3)),
                level=data.draw(st.integers(0, 3)),
                order=data.draw(st.integers(1, 2)),
                density=data.draw(st.floats(0, 1)),
                cost=data.draw(st.floats(0, 2)),
            )
            for a, b in itertools.pairwise(points)
        )

    trace = replace(
        TRACE,
        ticks=13,
        sigmas=(*sorted(ways[0], reverse=True), 0.0),
        images=tuple(walk(way) for way in ways),
        policy=data.draw(st.text(max_size=20)),
        grid_steps=data.draw(nulls),
        budget=data.draw(nulls),
        block_q=data.draw(nulls),
        tick_ms=data.draw(st.one_of(st.none(), st.just((1.5, 0.1)))),
    )
    assert Trace.from_json(trace.to_json()) == trace


def test_a_trace_from_before_a_field_was_added_still_loads():
    data = TRACE.to_dict()
    del data["attention"], data["scheduler"]
    assert Trace.from_json(json.dumps(data)) == replace(TRACE, attention=None, scheduler=None)


def test_an_interrupted_trace_may_end_above_zero():
    cut = replace(TRACE, images=((tick(1.0, 0.75),), ()), interrupted=True)
    assert Trace.from_json(cut.to_json()) == cut


def broken(path, value):
    """TRACE as JSON with one place replaced (or removed: value `...`)."""
    data = TRACE.to_dict()
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "rapid3rt.schedule", "format must be 'rapid3rt.trace', got 'rapid3rt.sched"),
        (["format"], ..., "format must be present, got nothing"),
        (["version"], 2, "version must be 1, got 2"),
        (["version"], "1", "version must be an integer of at least 1, got '1'"),
        (["model"], None, "model must be a string, got None"),
        (["ticks"], 0, "ticks must be an integer of at least 1, got 0"),
        (["ticks"], 2, r"images\[0\]\.ticks must have at most 2 entries, got 3"),
        (["sigmas"], [1.0, 0.5, 0.7, 0.0], r"sigmas must never rise, got \[1.0, 0.5, 0.7, 0.0\]"),
        (["sigmas"], [1.0, 0.5], "sigmas must end at 0"),
        (["sigmas"], [0.9, 0.5, 0.0], r"images\[0\]\.ticks must start at sigma 0.9, got 1.0"),
        (["sigmas", 2], "x", r"sigmas\[2\] must be a number, got 'x'"),
        (["images"], [], "images must hold at least one image"),
        (["images", 1], [], r"images\[1\] must be an object, got \[\]"),
        (["images", 1, "ticks"], [], r"images\[1\]\.ticks must end at sigma 0"),
        (["images", 0, "ticks", 2, "sigma"], 0.7, r"images\[0\]\.ticks\[2\]\.sigma must be the"),
        (
            ["images", 0, "ticks", 1, "sigma"],
            ...,
            r"images\[0\]\.ticks\[1\]\.sigma must be present",
        ),
        (["images", 0, "ticks", 0, "next_sigma"], 1.5, r"next_sigma must be in 0\.\.1, got 1.5"),
        (["images", 0, "ticks", 0, "action"], "nap", "action must be one of compute, reuse"),
        (["images", 0, "ticks", 0, "order"], 4, r"order must be an integer in 0\.\.3, got 4"),
        (
            ["images", 0, "ticks", 0, "order"],
            3,
            r"images\[0\]\.ticks\[0\]\.weights must be present",
        ),
        (["images", 0, "ticks", 2, "weights"], [0.5, 1.0], "weights must be 4 numbers, got"),
        (["images", 0, "ticks", 2, "weights", 2], None, r"weights\[2\] must be a number, got None"),
        (["images", 0, "ticks", 0, "density"], 1.1, r"density must be in 0\.\.1, got 1.1"),
        (["images", 0, "ticks", 0, "cost"], True, "cost must be a number, got True"),
        (["costs", "measured"], 1, r"costs\.measured must be true or false, got 1"),
        (["costs", "levels"], [], r"costs\.levels must hold at least the dense cost"),
        (["costs"], 3, "costs must be an object, got 3"),
        (["tick_ms"], [1, 2, 3, 4, 5], "tick_ms must have at most 4 entries, got 5"),
        (["attention"], "slow", "attention must be one of exact, fast, got 'slow'"),
        (["budget"], 0, "budget must be an integer of at least 1, got 0"),
    ],
)
def test_a_wrong_field_is_named(path, value, message, tmp_path):
    (tmp_path / "t.json").write_text(broken(path, value))
    with pytest.raises(ValueError, match=rf"t\.json: .*{message}"):
        Trace.load(tmp_path / "t.json")


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    TRACE.save(tmp_path / "t.json")
    whole = (tmp_path / "t.json").read_text().rstrip()
    for cut in range(0, len(whole), 11):
        (tmp_path / "t.json").write_text(whole[:cut])
        with pytest.raises(
            ValueError, match=r"t\.json: content must be one complete JSON document"
        ):
            Trace.load(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\xff", "content must be UTF-8 text"),
        (b"[1, 2]", "content must be an object"),
        (b"hello", "content must be one complete JSON document"),
        (b'{"format": NaN}', "NaN is not a number that can be stored"),
        (b"[" * 100_000, "content must be"),
    ],
)
def test_a_foreign_file_is_refused(content, message, tmp_path):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Trace.load(tmp_path / "t.json")


@pytest.mark.parametrize("number", ["1e999", "9" * 400])
def test_a_number_beyond_float_is_refused(number, tmp_path):
    text = TRACE.to_json().replace('"reuse": 0.02', f'"reuse": {number}')
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"costs\.reuse must be finite"):
        Trace.load(tmp_path / "t.json")


def test_nan_is_never_written_and_the_old_file_survives(tmp_path):
    TRACE.save(tmp_path / "t.json")
    bad = replace(TRACE, tick_ms=(float("nan"),))
    with pytest.raises(ValueError, match="JSON"):
        bad.save(tmp_path / "t.json")
    assert Trace.load(tmp_path / "t.json") == TRACE
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none.json")

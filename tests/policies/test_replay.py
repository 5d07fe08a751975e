# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest

from rapid3rt.planning.trace import Trace, TraceTick
from rapid3rt.policies import Controller, Dense, Replay, Steps, Threshold


def trace_of(walk, run, **changes):
    """What a session writes down of a driven run."""
    images = []
    for image in range(run.images):
        columns = [
            walk.column(n, image) for n in ("sigma", "action", "next_sigma", "level", "order")
        ]
        images.append(
            tuple(
                TraceTick(sigma=s, action=a, next_sigma=n, level=lv, order=o)
                for s, a, n, lv, o in zip(*columns, strict=True)
            )
        )
    values = {"model": "tiny", "family": run.family, "ticks": run.ticks, "sigmas": run.sigmas}
    return Trace(images=tuple(images), **{**values, **changes})


@pytest.fixture
def traced(sim):
    run = sim.run(3)
    walk = sim.drive(Controller(0.1, order=2), run, sim.world(3))
    return run, walk, trace_of(walk, run)


@pytest.mark.parametrize(
    "policy", [Controller(0.1, order=2), Threshold(0.2), Dense()], ids=lambda p: p.name
)
def test_every_decision_is_taken_again_bit_for_bit(sim, policy, tmp_path):
    run = sim.run(4)
    walk = sim.drive(policy, run, sim.world(4))
    trace_of(walk, run).save(tmp_path / "t.json")
    replay = Replay(Trace.load(tmp_path / "t.json"))
    other = sim.world(4, seed=7)  # nothing of it may matter
    assert sim.drive(replay, run, other) == walk


def test_it_asks_for_the_grid_of_the_trace(sim):
    run = sim.run(sigmas=sim.grid(9))
    trace = trace_of(sim.drive(Steps(9), run, sim.world(1)), run, grid_steps=9)
    replay = Replay(trace)
    assert replay.grid_steps == 9
    assert replay.leaves_grid is False


def test_it_knows_whether_the_trace_left_the_grid(sim, traced):
    assert Replay(traced[2]).leaves_grid is True
    run = sim.run(2)
    assert Replay(trace_of(sim.drive(Dense(), run, sim.world(2)), run)).leaves_grid is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "flux"}, "family 'sd3' in the trace, 'flux' in the run"),
        ({"images": 2}, "images 3 in the trace, 2 in the run"),
        ({"ticks": 20}, "ticks 28 in the trace, 20 in the run"),
        ({"model": "big"}, "model 'tiny' in the trace, 'big' in the run"),
        ({"block_size": (64, 64)}, r"block size \(32, 32\) in the trace, \(64, 64\) in the run"),
        ({"sigmas": (1.0, 0.5, 0.0)}, "the grid of sigmas"),
        ({"images": 2, "ticks": 20}, "images 3 .*; ticks 28 "),
    ],
)
def test_another_run_is_refused_and_the_difference_named(traced, changes, message):
    run, _, trace = traced
    replay = Replay(replace(trace, block_q=32, block_kv=32), name="replay:t.json")
    with pytest.raises(ValueError, match=f"replay:t.json must be of the same run.*{message}"):
        replay.begin(replace(run, **changes))


def test_the_same_model_and_block_size_are_accepted(traced):
    run, _, trace = traced
    replay = Replay(replace(trace, block_q=32, block_kv=32))
    replay.begin(replace(run, model="tiny", block_size=(32, 32)))


def sparse_trace(trace, attention):
    first, *others = trace.images
    first = (replace(first[0], level=2), *first[1:])
    return replace(trace, images=(first, *others), attention=attention)


def test_another_attention_mode_is_refused_where_something_was_sparse(traced):
    run, _, trace = traced
    message = "attention 'fast' in the trace, 'exact' in the run"
    with pytest.raises(ValueError, match=message):
        Replay(sparse_trace(trace, "fast")).begin(replace(run, attention="exact"))
    Replay(sparse_trace(trace, "fast")).begin(replace(run, attention="fast"))
    Replay(replace(trace, attention="fast")).begin(replace(run, attention="exact"))


def test_a_trace_from_before_the_mode_was_kept_is_replayed_in_any(traced):
    run, _, trace = traced
    for attention in ("exact", "fast"):
        Replay(sparse_trace(trace, None)).begin(replace(run, attention=attention))


def test_an_interrupted_trace_has_no_end_to_replay(traced):
    with pytest.raises(ValueError, match="replay must be of a finished run"):
        Replay(replace(traced[2], interrupted=True))

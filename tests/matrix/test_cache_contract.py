# SPDX-License-Identifier: Apache-2.0
"""What diffusers asks of its own caches, asked of ours: on and off, close at few steps, nothing left after a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BATCH, TICKS
from check import distance
from makers import ALL, Arguments, basic, call, held, make

import rapid3rt

POLICY = "threshold:0.2"
kinds = pytest.mark.parametrize("kind", ALL)


def run(pipe: Any, kind: str, **more: Any) -> torch.Tensor:
    return call(pipe, {**basic(kind, BATCH), **more}, TICKS)


def cached(kind: str) -> Any:
    """A pipeline that reuses at least once."""
    return rapid3rt.accelerate(make(kind), POLICY, budget=TICKS - 1)


@kinds
def test_it_is_on_or_off_and_not_on_twice(kind: str) -> None:
    pipe = make(kind)
    with pytest.raises(rapid3rt.StateError):
        rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, POLICY)
    with pytest.raises(rapid3rt.StateError, match="must not be accelerated already"):
        rapid3rt.accelerate(pipe, POLICY)
    rapid3rt.restore(pipe)
    with pytest.raises(rapid3rt.StateError):
        rapid3rt.report(pipe)


@kinds
def test_no_hook_is_left_behind(kind: str) -> None:
    pipe, plain = cached(kind), make(kind)
    for each in (pipe, plain):
        run(each, kind)
    rapid3rt.restore(pipe)
    for (name, ours), (_, theirs) in zip(
        pipe.transformer.named_modules(), plain.transformer.named_modules(), strict=True
    ):
        assert ours.__dict__.keys() == theirs.__dict__.keys(), name
        hooks = getattr(ours, "_diffusers_hook", None)
        assert hooks is None or not hooks.hooks, name


@kinds
def test_the_result_is_close_at_few_steps_and_plain_when_off(kind: str) -> None:
    pipe = make(kind)
    plain = run(pipe, kind)
    rapid3rt.accelerate(pipe, POLICY, budget=TICKS - 1)
    reused = run(pipe, kind)
    assert "." in rapid3rt.report(pipe).images[0].timeline
    for part in (slice(8), slice(-8, None)):
        torch.testing.assert_close(reused.flatten()[part], plain.flatten()[part], atol=0.2, rtol=0)
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe, kind), plain)


@kinds
def test_a_second_input_is_not_answered_from_the_first(kind: str) -> None:
    """Two calls under one cache: the second is as if it were the first."""
    pipe, fresh = cached(kind), cached(kind)
    first = run(pipe, kind)
    other: Arguments = {"generator": [torch.Generator().manual_seed(90 + i) for i in BATCH]}
    second = run(pipe, kind, **other)
    other = {"generator": [torch.Generator().manual_seed(90 + i) for i in BATCH]}
    assert torch.equal(second, run(fresh, kind, **other))
    assert torch.isfinite(second).all()
    assert distance(second, first) > 1e-2


@pytest.mark.parametrize("end", ["whole", "interrupted"])
@kinds
def test_state_grows_inside_a_call_and_is_empty_after_it(kind: str, end: str) -> None:
    seen: list[int] = []

    def watch(caller: Any, step: int, _t: Any, _kwargs: Arguments) -> Arguments:
        seen.append(held(caller))
        caller._interrupt = end == "interrupted" and step == 1
        return {}

    pipe = cached(kind)
    run(pipe, kind, callback_on_step_end=watch)
    assert seen[0] > 0
    assert len(seen) == (TICKS if end == "whole" else 2)
    assert held(pipe) == 0

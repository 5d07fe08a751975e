# SPDX-License-Identifier: Apache-2.0
"""What diffusers asks of its own caches, asked of ours: on and off, close at few steps, nothing left after a call."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import BATCH, CONTROLNET, FLOW, TICKS, control
from check import distance
from diffusers import UniPCMultistepScheduler
from makers import ALL, Arguments, basic, call, held, make

import rapid3rt
from rapid3rt.policies import Threshold

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


# Exceptions ----------------------------------------------------------------------------------------------------------


class Failing(Threshold):
    """Computes always, as it may not say beforehand; calls `fail` in its second decision on the step."""

    fail: Any = None

    def decide_step(self, state: Any, velocity: Any) -> Any:
        if self.fail is not None and state.tick == 1:
            self.fail()
        return super().decide_step(state, velocity)


def failing_pipe(kind: str, where: str, fail: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline whose calls raise what `fail` raises in their second tick."""
    making = {
        "controlnet": partial(CONTROLNET, nets=1),
        "solver": partial(make, scheduler_class=UniPCMultistepScheduler, scheduler=FLOW),
    }
    pipe, policy = making.get(where, make)(kind), Failing(0.0)
    calls: list[int] = []

    def second(*_: object) -> None:
        calls.append(0)
        if len(calls) == 2:
            fail()

    if where == "policy":
        policy.fail = fail
    elif where == "solver":
        real = UniPCMultistepScheduler.multistep_uni_p_bh_update
        monkeypatch.setattr(
            UniPCMultistepScheduler,
            real.__name__,
            lambda *args, **kwargs: (second(), real(*args, **kwargs))[1],
        )
    else:
        module = pipe.controlnet if where == "controlnet" else pipe.transformer
        module = module.transformer_blocks[-1] if where == "block" else module
        module.register_forward_pre_hook(second)
    return rapid3rt.accelerate(pipe, policy)


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["policy", "block", "transformer", "controlnet", "solver"])
@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_nothing_is_held_after_an_exception_inside_a_call_of_ours(
    kind: str, where: str, error: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail() -> None:
        seen.append(held(pipe))
        raise error

    pipe = failing_pipe(kind, where, fail, monkeypatch)
    given = basic(kind, BATCH)
    if where == "controlnet":
        given |= control(1)(kind, BATCH)
    with pytest.raises(error) as caught:
        call(pipe, given, TICKS)
    assert seen[0] > 0
    assert held(pipe) == 0  # although `caught` holds the frames
    assert caught.tb is not None
    trace = rapid3rt.report(pipe).trace
    assert trace.interrupted
    # A scheduler of its own fails after the step was decided.
    ticks = 2 if where == "solver" else 1
    assert [len(of_image) for of_image in trace.images] == [ticks] * len(BATCH)


def test_after_an_exception_in_a_callback_state_stays_until_restore_or_the_next_call() -> None:
    def fail(_pipe: Any, step: int, _t: Any, _kwargs: Arguments) -> Arguments:
        if step == 1:
            raise LookupError
        return {}

    pipe = cached("sd3")
    expected = run(cached("sd3"), "sd3")
    with pytest.raises(LookupError):
        run(pipe, "sd3", callback_on_step_end=fail)
    assert held(pipe) > 0
    assert torch.equal(run(pipe, "sd3"), expected)
    assert held(pipe) == 0


def test_a_foreign_call_that_is_refused_does_not_end_the_run() -> None:
    pipe, refusals = cached("sd3"), []
    expected = run(cached("sd3"), "sd3")
    parts = {**pipe.components, "scheduler": make("sd3").scheduler}
    other = type(pipe)(**parts)
    other.set_progress_bar_config(disable=True)

    def call_another(_pipe: Any, step: int, _t: Any, _kwargs: Arguments) -> Arguments:
        if step == 1:
            with pytest.raises(rapid3rt.StateError, match="must be called by that pipeline's own"):
                run(other, "sd3")
            refusals.append(step)
        return {}

    assert torch.equal(run(pipe, "sd3", callback_on_step_end=call_another), expected)
    assert refusals == [1]

# SPDX-License-Identifier: Apache-2.0
"""Parts that others exchanged, calls inside calls, threads: the right image, or a refusal before a wrong one."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCH, TICKS
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from makers import ALL, Arguments, basic, call, drawn, make

import rapid3rt
from rapid3rt.adapters import ADAPTERS
from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.types import COMPUTE, REUSE, ComputeDecision, DenoiseState, Run, StepDecision

kinds = pytest.mark.parametrize("kind", ALL)


def run(pipe: Any, kind: str, images: Any = BATCH, **more: Any) -> torch.Tensor:
    return call(pipe, {**basic(kind, images), **more}, TICKS)


# Another forward, step or cache --------------------------------------------------------------------------------------


def of_a_subclass(transformer: Any) -> None:
    cls = type(transformer)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    transformer.__class__ = type("Mine", (cls,), {"forward": forward})


@kinds
def test_a_transformer_with_a_forward_of_its_own_is_refused(kind: str) -> None:
    pipe = make(kind)
    of_a_subclass(pipe.transformer)
    with pytest.raises(
        UnsupportedError, match=r"^the transformer's forward must be \w+'s own, whose blocks"
    ):
        rapid3rt.accelerate(pipe, "dense")
    assert not rapid3rt.check(pipe).supported


@kinds
def test_a_forward_that_was_patched_into_the_class(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make(kind)
    cls = type(pipe.transformer)
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: None)
    with pytest.raises(UnsupportedError, match=r"forward must be"):
        next(adapter for adapter in ADAPTERS if adapter.supports(pipe.transformer))


@kinds
def test_a_forward_of_another_library_is_refused_before_the_first_call(kind: str) -> None:
    pipe = make(kind)
    pipe.transformer.forward = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedError, match=r"forward has been replaced"):
        rapid3rt.accelerate(pipe, "dense")


class Half(FlowMatchEulerDiscreteScheduler):
    """Steps half as far."""

    def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        return super().step(model_output / 2, *args, **kwargs)


def test_a_scheduler_with_a_step_of_its_own_is_refused() -> None:
    pipe = make("sd3")
    pipe.scheduler = Half.from_config(pipe.scheduler.config)
    with pytest.raises(
        UnsupportedError, match=r"^the scheduler's step must be .* got another one in Half"
    ):
        rapid3rt.accelerate(pipe, "dense")
    pipe = make("sd3")
    pipe.scheduler.step = pipe.scheduler.step
    with pytest.raises(UnsupportedError, match=r"^the scheduler's step must be"):
        rapid3rt.accelerate(pipe, "dense")


def test_a_scheduler_whose_set_timesteps_takes_keywords() -> None:
    class Keywords(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, n: Any = None, device: Any = None, **more: Any) -> None:
            super().set_timesteps(n, device, **more)

    pipe = make("sd3")
    plain = run(pipe, "sd3")
    pipe.scheduler = Keywords.from_config(pipe.scheduler.config)
    assert torch.equal(run(rapid3rt.accelerate(pipe, "dense"), "sd3"), plain)


@pytest.mark.parametrize("cache", ["pyramid", "first block"])
@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_caches_that_functions_of_diffusers_enabled_are_refused(kind: str, cache: str) -> None:
    pipe = make(kind)
    if cache == "pyramid":
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
        apply_pyramid_attention_broadcast(pipe.transformer, config)
    else:
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedError, match=r"^the transformer's hook '\w+' would skip blocks"):
        rapid3rt.accelerate(pipe, "dense")
    assert not rapid3rt.check(pipe).supported


def test_a_cache_that_is_enabled_later_is_refused_at_the_next_call() -> None:
    pipe = rapid3rt.accelerate(make("sd3"), "dense")
    run(pipe, "sd3")
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedError, match=r"would skip blocks"):
        run(pipe, "sd3")


# Arguments of attention ----------------------------------------------------------------------------------------------


class Scripted:
    """Per image: what it does in every tick but the first, and its sparsity level."""

    leaves_grid = False

    def __init__(self, actions: tuple[int, ...], levels: tuple[int, ...] = (0, 0)) -> None:
        self.actions, self.levels = torch.tensor(actions), torch.tensor(levels)

    def begin(self, run: Run) -> None:
        self.sigmas, self.images = torch.tensor(run.sigmas), run.images

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        action = self.actions if state.tick else torch.full_like(self.actions, COMPUTE)
        return ComputeDecision(
            action=action[: self.images].to(torch.int8), sparsity=self.levels[: self.images].int()
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=self.sigmas[state.step.long() + 1])


def masked(kind: str, images: tuple[int, ...], tokens: int) -> Arguments:
    """A mask of each image's own over text and image tokens."""
    name = "joint_attention_kwargs" if kind == "dev" else "attention_kwargs"
    return {name: {"attention_mask": drawn(5, images, 1, 1, tokens) > -0.5}}


def num_tokens(kind: str) -> int:
    seen: list[int] = []
    pipe = make(kind)

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1])

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    run(pipe, kind)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["dev", "flux2", "klein"])
@pytest.mark.parametrize("levels", [(0, 0), (1, 0)])
def test_an_attention_mask_stays_with_its_image(kind: str, levels: tuple[int, int]) -> None:
    pipe, tokens = make(kind), num_tokens(kind)

    def image(
        which: tuple[int, ...], actions: tuple[int, ...], dense: tuple[int, ...]
    ) -> torch.Tensor:
        rapid3rt.accelerate(pipe, Scripted(actions, dense))
        try:
            return run(pipe, kind, which, **masked(kind, which, tokens))
        finally:
            notes.append(rapid3rt.report(pipe).notes)
            rapid3rt.restore(pipe)

    notes: list[tuple[str, ...]] = []
    both = image((0, 1), (COMPUTE, REUSE), levels)
    alone = image((0,), (COMPUTE,), (0,)), image((1,), (REUSE,), (0,))
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
    told = "sparse levels ran dense: an attention mask goes to every layer"
    assert (told in notes[0]) == any(levels)


# Calls inside calls, threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [rapid3rt.restore, rapid3rt.accelerate])
def test_a_callback_may_neither_accelerate_nor_restore(change: Any) -> None:
    pipe = make("sd3")
    if change is rapid3rt.restore:
        rapid3rt.accelerate(pipe, "dense")

    def callback(pipe: Any, _i: int, _t: Any, tensors: Arguments) -> Arguments:
        change(pipe)
        return tensors

    with pytest.raises(StateError, match=r"^pipe must not be running"):
        run(pipe, "sd3", callback_on_step_end=callback)


class Wrapper(torch.nn.Module):
    """As PEFT's."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, torch.float32


def test_a_wrapped_twin_cannot_be_restored() -> None:
    pipe = make("sd3")
    real = pipe.transformer
    twin = rapid3rt.accelerate(pipe, "dense").transformer
    pipe.transformer = Wrapper(twin)
    with pytest.raises(StateError, match=r"must not be wrapped, got Wrapper around it"):
        rapid3rt.restore(pipe)
    pipe.transformer = twin
    assert rapid3rt.restore(pipe).transformer is real


def test_a_policy_object_that_another_pipeline_begins_meanwhile_is_refused() -> None:
    policy = Scripted((COMPUTE, COMPUTE))
    pipe = rapid3rt.accelerate(make("sd3"), policy)
    other = rapid3rt.accelerate(make("dev"), policy)

    def callback(_pipe: Any, i: int, _t: Any, tensors: Arguments) -> Arguments:
        if i == 1:
            run(other, "dev")
        return tensors

    with pytest.raises(StateError, match=r"must serve one run at a time"):
        run(pipe, "sd3", callback_on_step_end=callback)
    run(pipe, "sd3")  # one after the other is well


def test_a_second_thread_in_the_same_pipeline_ends_the_first_ones_call() -> None:
    pipe = rapid3rt.accelerate(make("sd3"), "steps:3")

    def second() -> None:
        with pytest.raises(RuntimeError, match=r"leave"):
            run(pipe, "sd3", callback_on_step_end=leave)

    def leave(*_: Any) -> Arguments:
        raise RuntimeError("leave")  # its run stays, as after any exception in a callback

    def callback(_pipe: Any, i: int, _t: Any, tensors: Arguments) -> Arguments:
        if i == 0:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return tensors

    with pytest.raises(StateError, match=r"^pipe must be called by one thread at a time"):
        run(pipe, "sd3", callback_on_step_end=callback)
    thread = threading.Thread(target=run, args=(pipe, "sd3"))
    thread.start()
    thread.join()
    assert rapid3rt.report(pipe).images[0].nfe == 3


def test_a_callback_is_told_in_the_report_that_it_sees_ticks() -> None:
    def callback(_pipe: Any, _i: int, _t: Any, tensors: Arguments) -> Arguments:
        return tensors

    for policy, is_told in (("steps:3", True), ("threshold:0.1", False)):
        pipe = rapid3rt.accelerate(make("sd3"), policy)
        run(pipe, "sd3", callback_on_step_end=callback)
        told = any(
            note.startswith("callback_on_step_end is") for note in rapid3rt.report(pipe).notes
        )
        assert told == is_told


# Guidance and speed --------------------------------------------------------------------------------------------------


def test_fitted_steps_are_not_taken_under_true_guidance_that_they_do_not_know() -> None:
    pipe = rapid3rt.accelerate(rapid3rt.load_tiny("flux"), budget=4)
    embeds = {"prompt": ["a red circle"], "num_inference_steps": 6, "guidance_scale": 3.5}
    shared: Any = {**embeds, "max_sequence_length": 32, "output_type": "latent"}
    pipe(**shared)
    assert not any("fitted for other calls" in note for note in rapid3rt.report(pipe).notes)
    pipe(**shared, negative_prompt=["a blue square"], true_cfg_scale=2.0)
    notes = rapid3rt.report(pipe).notes
    assert any("extra guidance 2, not none" in note for note in notes), notes


@pytest.mark.parametrize("steps", [2, 60])
def test_the_usual_speed_is_the_nearest_that_a_policy_can_do(steps: int) -> None:
    pipe = rapid3rt.accelerate(rapid3rt.load_tiny("sd3"))
    arguments: Any = {
        "num_inference_steps": steps,
        "max_sequence_length": 32,
        "output_type": "latent",
    }
    pipe("a red circle", guidance_scale=3.5, **arguments)
    assert any("the nearest that this policy" in note for note in rapid3rt.report(pipe).notes)
    rapid3rt.accelerate(rapid3rt.restore(pipe), speed=1.5 if steps == 60 else 2.0)
    with pytest.raises(ValueError, match=r"speed must ask for .* steps give a"):
        pipe("a red circle", guidance_scale=3.5, **arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    pipe = make("sd3")
    rapid3rt.accelerate(pipe, budget=np.int64(3))
    run(pipe, "sd3")
    assert rapid3rt.report(pipe).images[0].nfe == 3
    rapid3rt.accelerate(rapid3rt.restore(pipe), speed=np.float32(2))
    with pytest.raises(
        ValueError, match=r"^budget must be an integer of at least 1, got np\.True_"
    ):
        rapid3rt.accelerate(make("sd3"), budget=np.True_)

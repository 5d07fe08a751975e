# SPDX-License-Identifier: Apache-2.0
"""What the caches of other projects were found to get wrong, and what pipelines do to one another, asked of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import (
    BATCH,
    CONTROLNET,
    IMG2IMG,
    NETS,
    TICKS,
    Given,
    always,
    control,
    joined,
    no_control,
    noise_shape,
    with_picture,
)
from check import TOLERANCE, distance
from makers import ALL, SD3, basic, call, drawn, make

import rapid3rt
from rapid3rt.types import COMPUTE, REUSE, ComputeDecision, DenoiseState, Run, StepDecision

BARE = always()
NOTHING_TO_REUSE = "threshold:1e-9"
SKIP_LAYERS = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_start": 0.0,
    "skip_layer_guidance_stop": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One row. ask: raises where the answer is wrong. failed: what was found to get it wrong; empty for nothing."""

    name: str
    ask: Callable[[str], None]
    failed: str = ""
    kinds: tuple[str, ...] = ALL


def _run(pipe: Any, kind: str, given: Given = BARE) -> torch.Tensor:
    return call(pipe, {**basic(kind, BATCH), **given(kind, BATCH)}, TICKS)


# One decision per image, not per batch -------------------------------------------------------------------------------


def unlike_images_decide_as_they_do_alone(kind: str) -> None:
    """One image moves much and one little, so that alone they need different numbers of evaluations."""

    def run(pipe: Any, images: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
        shape = noise_shape(kind)
        size = torch.tensor([8.0 if i == 0 else 0.5 for i in images])
        noise = drawn(13, images, *shape) * size.view(-1, *([1] * len(shape)))
        latents = call(pipe, {**basic(kind, images), "latents": noise}, 12)
        return latents, [image.nfe for image in rapid3rt.report(pipe).images]

    pipe = rapid3rt.accelerate(make(kind), "threshold:0.05")
    alone = [run(pipe, (i,)) for i in BATCH]
    together, nfe = run(pipe, BATCH)
    assert len(set(nfe)) == 2, nfe
    assert nfe == [spent for _, (spent,) in alone]
    for i, (single, _) in enumerate(alone):
        assert distance(together[i], single[0]) <= TOLERANCE


# Families and pipelines that other caches raise on --------------------------------------------------------------------


def a_step_is_reused(kind: str, made: Callable[[str], Any] = make, given: Given = BARE) -> None:
    """The result is near the plain one and not it."""
    pipe = made(kind)
    plain = _run(pipe, kind, given)
    rapid3rt.accelerate(pipe, Reusing())
    reused = _run(pipe, kind, given)
    assert all("." in image.timeline for image in rapid3rt.report(pipe).images)
    assert 0 < distance(reused, plain) < 0.5


class Reusing:
    """Computes every other tick, on the grid; at a level of sparsity if wanted."""

    name, leaves_grid = "reusing", False

    def __init__(self, level: int = 0, reuses: bool = True) -> None:
        self.level, self.reuses = level, reuses

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        action = REUSE if self.reuses and state.tick % 2 else COMPUTE
        return ComputeDecision(
            action=torch.full_like(state.nfe, action, dtype=torch.int8),
            sparsity=torch.full_like(state.nfe, self.level),
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=self.sigmas[state.step.long() + 1])


def sparse_attention_is_at_work(kind: str) -> None:
    """More of it changes the image more, and nothing falls back."""
    moved, pipe = [], make(kind)
    plain = _run(pipe, kind)
    for level in (0, 3):
        rapid3rt.accelerate(pipe, Reusing(level, reuses=False))
        moved.append(distance(_run(pipe, kind), plain))
        assert "ran dense" not in str(rapid3rt.report(pipe))
        rapid3rt.restore(pipe)
    assert moved[0] == 0
    assert moved[1] > 1e-4


# Residuals of a ControlNet -------------------------------------------------------------------------------------------


class Standing:
    """Computes once, then reuses without having moved: what is reused must be what was computed."""

    name, leaves_grid, reuses = "standing", True, True

    def __init__(self) -> None:
        self.velocities: list[torch.Tensor] = []

    def begin(self, run: Run) -> None:
        self.velocities.clear()

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        action = torch.full_like(state.nfe, REUSE if state.tick else COMPUTE, dtype=torch.int8)
        return ComputeDecision(action=action, sparsity=torch.zeros_like(state.nfe))

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        self.velocities.append(velocity.clone())
        return StepDecision(next_sigma=state.sigma)


def controlnet_residuals_count_once(kind: str) -> None:
    """The same input twice, the second time from the cache."""
    policy = Standing()
    pipe = CONTROLNET(kind)
    bare = _run(pipe, kind, control())
    off = joined(control(), no_control())
    assert distance(_run(pipe, kind, off), bare) > 1e-2
    _run(rapid3rt.accelerate(pipe, policy), kind, control())
    computed, *reused = policy.velocities
    assert len(reused) == TICKS - 1
    assert all(distance(velocity, computed) <= TOLERANCE for velocity in reused)


def a_cache_that_may_reuse_nothing_is_plain(
    kind: str, made: Callable[[str], Any], given: Given
) -> None:
    plain = _run(made(kind), kind, given)
    ours = rapid3rt.accelerate(made(kind), NOTHING_TO_REUSE)
    assert torch.equal(_run(ours, kind, given), plain)


def skip_layers_work_from_the_cache(kind: str) -> None:
    """Skip-layer guidance goes on in ticks that reuse."""
    images = {}
    for name, given in {"with": always(**SKIP_LAYERS), "without": always()}.items():
        ours = rapid3rt.accelerate(make(kind), "threshold:0.2", budget=TICKS - 1)
        images[name] = _run(ours, kind, given)
        assert "." in rapid3rt.report(ours).images[0].timeline
    assert distance(images["with"], images["without"]) > 1e-2


# Several pipelines ---------------------------------------------------------------------------------------------------


def restoring_one_pipeline_leaves_another(kind: str) -> None:
    """Two accelerated pipelines, once of their own parts and once of shared ones."""
    for shared in (False, True):
        first = make(kind)
        second = type(first)(**first.components) if shared else make(kind)
        second.set_progress_bar_config(disable=True)
        plain = _run(first, kind)
        rapid3rt.accelerate(first, "threshold:0.2", budget=TICKS - 1)
        rapid3rt.accelerate(second, "threshold:0.2", budget=TICKS - 2)
        reused = _run(second, kind)
        rapid3rt.restore(first)
        assert torch.equal(_run(second, kind), reused)
        assert torch.equal(_run(first, kind), plain)
        assert not torch.equal(reused, plain)
        rapid3rt.restore(second)
        assert torch.equal(_run(second, kind), plain)


def a_pipeline_from_another_is_independent(kind: str) -> None:
    """`from_pipe` before accelerating, to the same class and to another; the first one stays as it is."""
    base = make(kind)
    plain = _run(base, kind)
    no_text = {n: None for n in base.components if n.startswith(("text_encoder", "tokenizer"))}
    derivations = [(type(base), BARE)]
    if kind in NETS:
        derivations.append((type(IMG2IMG(kind)), with_picture))
    for cls, given in derivations:
        derived = cls.from_pipe(base, **no_text)
        derived.set_progress_bar_config(disable=True)
        expected = _run(derived, kind, given)
        rapid3rt.accelerate(derived, "dense")
        assert torch.equal(_run(derived, kind, given), expected)
        rapid3rt.restore(derived)
        rapid3rt.accelerate(derived, "threshold:0.2", budget=2)
        assert not torch.equal(_run(derived, kind, given), expected)
        assert torch.equal(_run(base, kind), plain)
        assert cls is type(base) or torch.equal(_run(IMG2IMG(kind), kind, given), expected)


FIRST_BLOCK = "diffusers FirstBlockCache"
PROBES: tuple[Probe, ...] = (
    Probe(
        name="two unlike images in one batch decide as they do alone",
        failed=f"{FIRST_BLOCK}, cache-dit: one decision for the batch",
        ask=unlike_images_decide_as_they_do_alone,
    ),
    Probe(
        name="a step is reused", failed=f"{FIRST_BLOCK}: error on SD3, FLUX.2", ask=a_step_is_reused
    ),
    Probe(
        name="a step is reused, image to image",
        failed=f"{FIRST_BLOCK}: error on FLUX",
        kinds=NETS,
        ask=partial(a_step_is_reused, made=IMG2IMG, given=with_picture),
    ),
    Probe(
        name="sparse attention is at work",
        failed="diffusers set_attention_backend: none on SD3, unsaid",
        ask=sparse_attention_is_at_work,
    ),
    Probe(
        name="ControlNet residuals count once in a reused step",
        failed=f"{FIRST_BLOCK}, MagCache: counted twice",
        kinds=NETS,
        ask=controlnet_residuals_count_once,
    ),
    Probe(
        name="a cache that may reuse nothing, under a ControlNet",
        failed="cache-dit: another image on FLUX, error on SD3",
        kinds=NETS,
        ask=partial(a_cache_that_may_reuse_nothing_is_plain, made=CONTROLNET, given=control()),
    ),
    Probe(
        name="a cache that may reuse nothing, under skip-layer guidance",
        failed="cache-dit: the guidance is ignored",
        kinds=SD3,
        ask=partial(
            a_cache_that_may_reuse_nothing_is_plain, made=make, given=always(**SKIP_LAYERS)
        ),
    ),
    Probe(
        name="skip-layer guidance goes on in reused steps",
        failed="cache-dit: the guidance is ignored",
        kinds=SD3,
        ask=skip_layers_work_from_the_cache,
    ),
    Probe(
        name="two accelerated pipelines, one restored",
        failed="cache-dit: the other one raises",
        ask=restoring_one_pipeline_leaves_another,
    ),
    Probe(name="from_pipe before accelerating", ask=a_pipeline_from_another_is_independent),
)

# SPDX-License-Identifier: Apache-2.0
"""Schedulers that step all images alike: what is each image's own, what is refused, and what stays the user's.

Dense equals plain, and images that compute and reuse on their own do not meet, are rows of the matrix.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from test_layouts import call, make_pipeline

import rapid3rt
from rapid3rt.types import ComputeDecision, DenoiseState, Run, StepDecision

STEPS = 6


def make(cls: type, **options: Any) -> Any:
    pipe = make_pipeline("sd3", torch.float32)
    if cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    pipe.scheduler = cls(**options)
    return pipe


def test_a_threshold_reuses_for_each_image_on_its_own_and_budgets_hold() -> None:
    pipe = make(DPMSolverMultistepScheduler)
    rapid3rt.accelerate(pipe, "threshold:0.05", budget=3)
    call(pipe, STEPS)
    report = rapid3rt.report(pipe)
    assert all(1 <= image.nfe <= 3 for image in report.images)
    assert all(len(image.actions) == STEPS for image in report.images)
    assert not report.trace.interrupted


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_saved_trace_replays_bit_for_bit(cls: type, tmp_path: Path) -> None:
    pipe = make(cls)
    rapid3rt.accelerate(pipe, "threshold:0.1")
    first = call(pipe, STEPS)
    report = rapid3rt.report(pipe)
    report.save(tmp_path / "trace.json")
    assert any(image.nfe < report.trace.ticks for image in report.images)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(call(pipe, STEPS), first)
    rapid3rt.restore(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    with pytest.raises(ValueError, match=f"scheduler '{cls.__name__}' in the trace, None in the"):
        call(pipe, report.trace.ticks)


def test_the_users_own_scheduler_is_left_alone() -> None:
    pipe = make(UniPCMultistepScheduler)
    real, plain = pipe.scheduler, call(make(UniPCMultistepScheduler), STEPS)
    before = {name: repr(value) for name, value in vars(real).items()}
    rapid3rt.accelerate(pipe, "threshold:0.1")
    call(pipe, STEPS)
    rapid3rt.restore(pipe)
    assert pipe.scheduler is real
    assert {name: repr(value) for name, value in vars(real).items()} == before
    assert torch.equal(call(pipe, STEPS), plain)


def test_the_twin_shows_the_real_signatures() -> None:
    pipe = make(DPMSolverMultistepScheduler)
    real = {n: inspect.signature(getattr(pipe.scheduler, n)) for n in ("step", "set_timesteps")}
    rapid3rt.accelerate(pipe, "dense")
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert {n: inspect.signature(getattr(pipe.scheduler, n)) for n in real} == real


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["steps:4", "steps:4/trim", "controller:0.1", "auto", "threshold:0.1/ab2"]
)
def test_what_needs_a_step_of_its_own_is_refused_before_any_step(policy: str) -> None:
    pipe = make(DPMSolverMultistepScheduler)
    plain = call(pipe, STEPS)
    rapid3rt.accelerate(pipe, policy)
    calls: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(rapid3rt.UnsupportedError, match="DPMSolverMultistepScheduler steps all"):
        call(pipe, STEPS)
    hook.remove()
    assert not calls
    rapid3rt.restore(pipe)
    assert torch.equal(call(pipe, STEPS), plain)


class Wanderer:
    """Says that it stays on the grid, and does not."""

    leaves_grid = False

    def __init__(self, order: int | None) -> None:
        self.order_given = order

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        zeros = torch.zeros(len(state.sigma))
        return ComputeDecision(action=zeros.to(torch.int8), sparsity=zeros.to(torch.int32))

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        following = self.sigmas[state.step.long() + 1]
        if self.order_given is None:
            return StepDecision(next_sigma=0.9 * following)
        return StepDecision(
            next_sigma=following,
            order=torch.full_like(state.nfe, self.order_given, dtype=torch.int8),
        )


@pytest.mark.parametrize("order", [None, 2])
def test_a_policy_that_leaves_the_grid_all_the_same_is_an_error(order: int | None) -> None:
    pipe = make(DPMSolverMultistepScheduler)
    rapid3rt.accelerate(pipe, Wanderer(order))
    with pytest.raises(ValueError, match=r"next_sigma .* run's own grid .* at order 1"):
        call(pipe, STEPS)


def test_stochastic_sampling_draws_the_noise_that_the_plain_pipeline_draws() -> None:
    pipe = make(FlowMatchEulerDiscreteScheduler, shift=3.0, stochastic_sampling=True)
    torch.manual_seed(5)
    plain = call(pipe, STEPS)
    torch.manual_seed(6)
    assert not torch.equal(call(pipe, STEPS), plain)
    rapid3rt.accelerate(pipe, "dense")
    torch.manual_seed(5)
    assert torch.equal(call(pipe, STEPS), plain)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "threshold:1")
    call(pipe, STEPS)
    assert min(image.nfe for image in rapid3rt.report(pipe).images) < STEPS


def test_check_says_that_steps_are_the_schedulers() -> None:
    text = str(rapid3rt.check(make(DPMSolverMultistepScheduler)))
    assert "DPMSolverMultistepScheduler steps all images alike" in text
    assert "every image skips noise levels on its own" not in text

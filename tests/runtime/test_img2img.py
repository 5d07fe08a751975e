# SPDX-License-Identifier: Apache-2.0
"""Image to image and inpainting: runs that start in the middle, of SD3 and FLUX, at several strengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
)
from test_flux import call_flux, make_flux
from test_layouts import call, make_pipeline

import rapid3rt
from rapid3rt.types import ComputeDecision, DenoiseState, Run, StepDecision

PIPELINES = {
    "sd3": (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline),
    "flux": (FluxImg2ImgPipeline, FluxInpaintPipeline),
}
STRENGTHS = (0.3, 0.75, 1.0)
TICKS = 8


def make(family: str, inpaint: bool) -> Any:
    """The tiny random pipeline of a family in its other shape."""
    # Inpainting of SD3 insists on 16 channels.
    plain = make_flux("dev")
    if family == "sd3":
        plain = make_pipeline("sd3", torch.float32, channels=16)
    pipe = PIPELINES[family][inpaint](**plain.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, steps: int, strength: float) -> torch.Tensor:
    """Latents from a fixed picture, and a mask of its left half where the pipeline takes one."""
    side = 16 if "3" in type(pipe).__name__ else 32
    picture = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    arguments: dict[str, Any] = {"image": picture, "strength": strength}
    if "Inpaint" in type(pipe).__name__:
        mask = torch.zeros(2, 1, side, side)
        mask[..., : side // 2] = 1
        arguments["mask_image"] = mask
    if side == 16:
        # Its size is that of the pixels, with a VAE of factor one.
        return call(pipe, steps, (side, side), guidance_scale=4.0, **arguments)
    return call_flux(pipe, steps, (side, side), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("inpaint", [False, True], ids=["img2img", "inpaint"])
@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_dense_is_the_plain_pipeline_bit_for_bit(
    family: str, inpaint: bool, strength: float
) -> None:
    pipe = make(family, inpaint)
    plain = run(pipe, TICKS, strength)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, run(pipe, TICKS, strength))


@pytest.mark.slow
@pytest.mark.parametrize("inpaint", [False, True], ids=["img2img", "inpaint"])
@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("steps", [3, 5])
def test_fewer_steps_are_those_of_the_plain_pipeline_at_the_same_strength(
    family: str, inpaint: bool, strength: float, steps: int
) -> None:
    pipe = make(family, inpaint)
    plain = run(pipe, steps, strength)
    rapid3rt.accelerate(pipe, f"steps:{steps}")
    assert torch.equal(plain, run(pipe, TICKS, strength))
    nfe = {image.nfe for image in rapid3rt.report(pipe).images}
    assert nfe == {steps - int(max(steps - min(steps * strength, steps), 0))}


@pytest.mark.slow
@pytest.mark.parametrize("inpaint", [False, True], ids=["img2img", "inpaint"])
@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("policy", ["steps:3/trim/auto", "threshold:0.2", "controller:0.2"])
def test_policies_that_leave_the_grid_end_within_the_shorter_run(
    family: str, inpaint: bool, policy: str
) -> None:
    pipe = make(family, inpaint)
    rapid3rt.accelerate(pipe, policy)
    run(pipe, TICKS, 0.6)
    report = rapid3rt.report(pipe)
    assert report.trace.ticks == 5
    assert all(0 < image.nfe <= 5 for image in report.images)
    assert all(ticks[-1].next_sigma == 0 for ticks in report.trace.images)


@pytest.mark.slow
@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize(
    ("dial", "expected"),
    [({"speed": 2.0}, 2), ({"budget": 6}, 5), ({"budget": 3}, 3), ({"speed": 1.25}, 4)],
)
def test_the_dial_counts_the_steps_that_the_strength_leaves(
    family: str, dial: dict[str, Any], expected: int
) -> None:
    """Without a bundled policy, and for a policy of the user's own: 5 of 8 steps are left."""
    for policy in ("auto", Stay()):
        pipe = make(family, inpaint=False)
        rapid3rt.accelerate(pipe, policy, **dial)
        run(pipe, TICKS, 0.6)
        report = rapid3rt.report(pipe)
        assert {image.nfe for image in report.images} == {expected}
        assert report.trace.budget == expected
        text = str(report)
        if "speed" in dial:
            assert f"became budget={expected} of 5 steps" in text
        else:
            assert ("more than the 5 steps that are left" in text) == (dial["budget"] > 5)


class Stay:
    """Somebody's policy: computes while it may."""

    leaves_grid = False

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return ComputeDecision(
            action=torch.zeros_like(state.nfe), sparsity=torch.zeros_like(state.nfe)
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=self.sigmas[state.step.long() + 1])

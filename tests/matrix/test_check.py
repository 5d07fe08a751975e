# SPDX-License-Identifier: Apache-2.0
"""`check` says what `accelerate` and a run do: for every line of its table, a pipeline that makes it say so."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import test_bad_input
import test_flux2
import torch
from cases import BATCH, CONTROLNET, PAG, ROWS, TICKS, Row, shared
from makers import (
    ALL,
    FLUX,
    KINDS,
    SD3,
    Arguments,
    basic,
    call,
    calls_per_tick,
    fuse_projections,
    held,
    load_ip_adapter,
    load_lora,
    make,
)

import rapid3rt
from rapid3rt.ops import backends, native

FAMILIES = {"sd3": "sd3", "sd35": "sd3", "dev": "flux", "schnell": "flux"}
FAMILIES |= {"flux2": "flux2", "klein": "flux2", "qwen": "qwen"}
kinds = pytest.mark.parametrize("kind", ALL)


def said(pipe: Any, about: str) -> str:
    """What `check` says about one thing."""
    return "\n".join(text for name, text in rapid3rt.check(pipe).rows if name == about)


@kinds
def test_a_supported_pipeline_gets_every_line_and_is_left_as_it_was(kind: str) -> None:
    pipe = make(kind)
    before = dict(pipe.components), dict(vars(pipe.transformer)), dict(vars(pipe))
    answer = rapid3rt.check(pipe)
    assert (dict(pipe.components), dict(vars(pipe.transformer)), dict(vars(pipe))) == before
    assert answer.supported
    names = [
        "transformer",
        "scheduler",
        "steps",
        "cache",
        "sparsity",
        "gain",
        "memory",
        "policy",
        "kernels",
    ]
    assert list(dict(answer.rows)) == names
    assert f"({FAMILIES[kind]}), supported" in said(pipe, "transformer")
    assert "FlowMatchEulerDiscreteScheduler" in said(pipe, "scheduler")
    printed = str(answer)
    assert " ".join(printed.split()) == " ".join(f"{name}: {text}" for name, text in answer.rows)
    assert max(map(len, printed.splitlines())) <= 100


@kinds
def test_an_accelerated_pipeline_says_so(kind: str) -> None:
    pipe = rapid3rt.accelerate(make(kind), "dense")
    assert "accelerated" in said(pipe, "transformer")
    rapid3rt.restore(pipe)
    assert "accelerated" not in said(pipe, "transformer")


# Levels --------------------------------------------------------------------------------------------------------------


@kinds
def test_sparsity_counts_the_layers_that_it_acts_on(kind: str) -> None:
    layers = {"sd35": 5, "sd3": 3, "qwen": 3}.get(kind, 4)
    pipe = make(kind)
    load_lora(pipe)
    assert (
        said(pipe, "sparsity") == f"levels act on {layers} attention layers, for each image its own"
    )


@pytest.mark.parametrize("kind", SD3)
def test_sparsity_falls_back_under_an_ip_adapter_of_sd3(kind: str) -> None:
    pipe = make(kind)
    load_ip_adapter(pipe)
    assert said(pipe, "sparsity").startswith("levels run dense: no attention processor")


@pytest.mark.parametrize("kind", FLUX)
def test_sparsity_falls_back_in_some_layers_under_an_ip_adapter_of_flux(kind: str) -> None:
    pipe = make(kind)
    load_ip_adapter(pipe)
    assert "levels act on 2 attention layers" in said(pipe, "sparsity")
    assert "2 layers stay dense: another attention processor" in said(pipe, "sparsity")


@pytest.mark.parametrize("kind", KINDS)
def test_sparsity_falls_back_under_fused_projections(kind: str) -> None:
    pipe = make(kind)
    fuse_projections(pipe)
    assert said(pipe, "sparsity").startswith("levels run dense")


def test_sparsity_goes_on_in_blocks_that_have_nothing_to_fuse() -> None:
    pipe = make("flux2")
    fuse_projections(pipe)
    assert "2 layers stay dense: another attention processor, or fused" in said(pipe, "sparsity")


@pytest.mark.parametrize("kind", SD3)
def test_sparsity_falls_back_while_perturbed_attention_guidance_is_on(kind: str) -> None:
    assert "levels run dense while pag_scale is above 0" in said(PAG(kind), "sparsity")
    assert "pag_scale" not in said(make(kind), "sparsity")


def test_steps_names_what_counts_them_in_this_pipeline() -> None:
    window, skip, adaptive = "a ControlNet window", "skip-layer guidance", "an adaptive PAG scale"
    for pipe, named in (
        (make("sd3"), {skip}),
        (PAG("sd3"), {adaptive}),
        (CONTROLNET("sd3"), {window}),
        (CONTROLNET("dev"), {window}),
        (CONTROLNET("qwen"), {window}),
        (make("klein"), set[str]()),
    ):
        found = {text for text in (window, skip, adaptive) if text in said(pipe, "steps")}
        assert found == named
        assert "a callback of diffusers' own" in said(pipe, "steps")


@pytest.mark.parametrize("kind", ["sd3", "dev", "qwen"])
def test_controlnet_names_the_class_single_or_multi(kind: str) -> None:
    for nets in (1, 2):
        pipe = CONTROLNET(kind, nets=nets)
        name = type(pipe.controlnet).__name__
        assert said(pipe, "controlnet").startswith(f"{name}, runs for the images that compute")


# Gain, memory, policy ------------------------------------------------------------------------------------------------


def test_gain_is_none_for_few_step_and_distilled_models() -> None:
    for pipe in (make("schnell"), test_flux2.make("distilled")):
        assert said(pipe, "gain").startswith("none: this is a few-step or distilled model")
    turbo = make("sd35")
    assert said(turbo, "gain").startswith("about `speed` times")
    turbo.register_to_config(_name_or_path="stabilityai/stable-diffusion-3.5-large-turbo")
    assert said(turbo, "gain").startswith("none: this is a few-step or distilled model")


@pytest.mark.parametrize("kind", ["sd3", "sd35", "dev", "flux2", "klein", "qwen"])
def test_gain_of_other_models_is_the_speed_and_says_where_there_is_none(kind: str) -> None:
    text = said(make(kind), "gain")
    assert "speed=2.5 computes 11 of 28 steps" in text
    assert "none for few-step or distilled weights, or calls of 4 to 8 steps" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@kinds
def test_memory_is_what_a_run_holds(kind: str, dtype: torch.dtype) -> None:
    pipe, held_bytes = make(kind, dtype=dtype), list[int]()
    pipe.default_sample_size = 8 if kind in SD3 else 16
    branches = 2 if kind in SD3 else calls_per_tick(kind)
    bytes_each = 64 * 32 * dtype.itemsize
    side = pipe.default_sample_size * pipe.vae_scale_factor
    assert said(pipe, "memory") == (
        f"{bytes_each / 2**20:.3g} MiB for each image and once more for each of its guidance branches, at {side} x "
        f"{side} (64 tokens of 32 {str(dtype)[6:]}); reference images add theirs"
    )

    def watch(caller: Any, _step: int, _t: Any, _kwargs: Arguments) -> Arguments:
        held_bytes.append(held(caller))
        return {}

    rapid3rt.accelerate(pipe, "threshold:0.2")
    call(pipe, {**basic(kind, BATCH), "callback_on_step_end": watch}, TICKS)
    assert max(held_bytes) == len(BATCH) * bytes_each * (1 + branches)


def test_policy_and_kernels_are_those_that_accelerate_takes() -> None:
    tiny, other = rapid3rt.load_tiny("sd3"), shared(make, "sd3")
    assert "bundled for model SD3Transformer2DModel-" in said(tiny, "policy")
    assert "none bundled" in said(other, "policy")
    assert "rapid3rt.calibrate(pipe, prompts, out=DIR)" in said(other, "policy")
    assert said(other, "kernels").endswith("on cpu")


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        pytest.param(row, kind, id=f"{row.name} [{kind}]".replace(" ", "_"))
        for row in ROWS
        for kind in row.kinds
        if row.refused and not row.after and not row.at_call
    ],
)
def test_what_accelerate_refuses_is_not_supported_in_the_same_words(row: Row, kind: str) -> None:
    pipe = row.pipeline(kind)
    answer = rapid3rt.check(pipe)
    assert not answer.supported
    with pytest.raises(rapid3rt.UnsupportedError) as refusal:
        rapid3rt.accelerate(pipe, "dense")
    assert f"not supported: {refusal.value}" in [text for _, text in answer.rows]
    assert "gain" not in dict(answer.rows)


def test_the_way_out_of_a_refused_scheduler_option_works() -> None:
    pipe = make("dev", scheduler={"invert_sigmas": True})
    assert "from_config(pipe.scheduler.config, invert_sigmas=False)" in said(pipe, "scheduler")
    cls = type(pipe.scheduler)
    pipe.scheduler = cls.from_config(pipe.scheduler.config, invert_sigmas=False)
    assert rapid3rt.check(pipe).supported


@pytest.mark.parametrize(
    "pipe",
    [
        partial(make, scheduler_class=diffusers.DPMSolverMultistepScheduler),
        partial(make, scheduler={"stochastic_sampling": True}),
    ],
    ids=["DPM++", "stochastic"],
)
def test_steps_of_their_own_are_one_line_away_from_another_scheduler(pipe: Any) -> None:
    pipe = pipe("sd3")
    way_out = "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)"
    assert way_out in said(pipe, "scheduler")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, stochastic_sampling=False
    )
    assert "its own noise level" in said(pipe, "scheduler")
    rapid3rt.accelerate(pipe, "steps:2/trim")
    assert call(pipe, basic("sd3", BATCH), TICKS).isfinite().all()
    rapid3rt.restore(pipe)


def test_the_way_out_of_an_unknown_scheduler_works() -> None:
    pipe = make("sd3", scheduler_class=diffusers.FlowMatchLCMScheduler)
    assert "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)" in said(
        pipe, "scheduler"
    )
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert rapid3rt.check(pipe).supported
    assert call(rapid3rt.accelerate(pipe, "dense"), basic("sd3", BATCH), TICKS).isfinite().all()


@pytest.mark.parametrize(
    "made", [test_bad_input.auraflow, test_bad_input.unet, lambda: "a pipeline"]
)
def test_an_unknown_family_is_not_supported_and_lists_the_known_ones(made: Any) -> None:
    answer = rapid3rt.check(made())
    assert not answer.supported
    text = dict(answer.rows)["transformer"]
    assert "must be of a supported family (sd3, flux, qwen, flux2)" in text
    assert text.endswith("use it as it is: nothing has been changed")


def test_what_only_holds_the_parts_of_a_pipeline_is_not_supported() -> None:
    parts = SimpleNamespace(**shared(make, "sd3").components)
    answer = rapid3rt.check(parts)
    assert not answer.supported
    assert said(parts, "transformer").startswith(
        "not supported: pipe must be a diffusers pipeline, got SimpleNamespace without config"
    )


@pytest.mark.parametrize("backend", ["native", "bogus"])
def test_a_backend_of_the_environment_that_is_not_there_is_told(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(native, "_missing", "module rapid3rt._cpu cannot be loaded")
    monkeypatch.setenv("RAPID3RT_BACKEND", backend)
    answer = rapid3rt.check(shared(make, "sd3"))
    assert not answer.supported
    assert said(shared(make, "sd3"), "kernels").startswith("not supported: RAPID3RT_BACKEND ")


def test_a_controlnet_of_another_family_is_not_supported() -> None:
    pipe = CONTROLNET("sd3")
    pipe.controlnet = CONTROLNET("dev").controlnet
    assert said(pipe, "controlnet").startswith("not supported: controlnet must be one of SD3")
    assert not rapid3rt.check(pipe).supported


def test_the_pipelines_of_these_tests_are_the_ones_of_the_matrix() -> None:
    """A class that the matrix runs and `check` does not know would be a gap."""
    makers = {row.make for row in ROWS if not row.refused}
    assert len(makers) > 10
    for made in makers:
        for row in ROWS:
            if row.make is made and not row.refused:
                assert rapid3rt.check(shared(partial(made), row.kinds[0])).supported
                break

# SPDX-License-Identifier: Apache-2.0
"""The recipe that makes the tiny pipelines: words, stages, resuming, and the pipeline that ships."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rapid3rt
from rapid3rt.policies.fixed import Dense
from rapid3rt.tiny import flux, load_tiny, parts, sd3
from rapid3rt.tiny.scenes import sample
from rapid3rt.types import Run

SHORT = {"vae_steps": 2, "decoder_steps": 2, "vae_batch": 2, "num_latents": 100, "batch": 2}
SMALL = sd3.SD3Recipe(**SHORT, steps=2, layers=1, heads=1)
SMALL_FLUX = flux.FluxRecipe(**SHORT, steps=2, text_steps=2, double_layers=1, single_layers=1)


def test_every_caption_fits_the_tokenizer_without_unknown_words() -> None:
    tokenizer = parts.make_tokenizer()
    for scene in sample(300, 0):
        ids = tokenizer(scene.caption).input_ids
        assert len(ids) <= parts.MAX_TOKENS
        assert parts.UNK not in ids


def test_a_person_may_write_commas_capitals_and_the_top_left() -> None:
    tokenizer = parts.make_tokenizer()
    loose = tokenizer("A red circle at the top left, and a blue square bottom right.").input_ids
    assert loose == tokenizer("a red circle top-left and a blue square bottom-right").input_ids


@pytest.mark.slow
def test_an_interrupted_build_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    sd3.build_sd3(SMALL, tmp_path / "whole", tmp_path / "a", device)
    save, saves = parts.Checkpoint.save, []

    def stop_after_first(self: parts.Checkpoint, step: int) -> None:
        save(self, step)
        saves.append(self.path.name)
        if self.path.name == "vae.safetensors" and len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts.Checkpoint, "save", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        sd3.build_sd3(SMALL, tmp_path / "resumed", tmp_path / "b", device)
    sd3.build_sd3(SMALL, tmp_path / "resumed", tmp_path / "b", device)
    for part in ("transformer", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
        assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_no_warmup_begins_at_the_peak() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1)])
    rates = []
    for warmup in (0, 4):
        parts.set_rate(optimiser, 1e-3, 0, 10, warmup)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 0.25e-3])


def forget_recipes(work: Path) -> None:
    """Make the files of a work folder what they were before they told their recipe."""
    for path in work.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            kept = {k: v for k, v in file.metadata().items() if k == "step"}
        save_file(load_file(path), path, metadata=kept or None)


@pytest.mark.slow
def test_a_work_folder_is_tied_to_its_recipe(tmp_path: Path) -> None:
    out, work, device = tmp_path / "out", tmp_path / "work", torch.device("cpu")
    sd3.build_sd3(SMALL, out, work, device)
    for stage, field, value in (
        ("vae", "seed", 2),
        ("vae", "vae_rate", 1e-3),
        ("decoder", "decoder_steps", 3),
        ("latents", "num_latents", 200),
        ("sd3", "steps", 3),
        ("sd3", "object_weight", 1.0),
    ):
        got = re.escape(str(getattr(SMALL, field)))
        message = (
            rf"{stage}.safetensors must be of a recipe with {field} = {value}, got {got}; give"
        )
        with pytest.raises(ValueError, match=message):
            sd3.build_sd3(replace(SMALL, **{field: value}), out, work, device)
    sd3.build_sd3(replace(SMALL, shift=3.0), out, work, device)
    forget_recipes(work)
    sd3.build_sd3(replace(SMALL, seed=2), out, work, device)


def test_a_flux_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    for name, given in (
        ("t5.safetensors", parts.deciding(SMALL_FLUX, flux.T5_FIELDS)),
        ("flux.safetensors", parts.transformer_recipe(SMALL_FLUX)),
    ):
        metadata = {"step": "1", "recipe": json.dumps(given | {"text_steps": 3})}
        save_file({}, tmp_path / name, metadata=metadata)
        with pytest.raises(
            ValueError, match=f"{name} must be of a recipe with text_steps = 2, got 3"
        ):
            flux.train_flux(
                SMALL_FLUX, load_tiny("sd3"), torch.empty(0), tmp_path, torch.device("cpu")
            )


def test_a_flux_build_gives_a_pipeline_that_runs(tmp_path: Path) -> None:
    flux.build_flux(SMALL_FLUX, tmp_path / "out", tmp_path / "work", torch.device("cpu"))
    pipe = FluxPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        "a red circle top",
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=32,
        output_type="pt",
    ).images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()


def test_flux_packs_as_its_pipeline_does() -> None:
    latents = torch.randn(2, 4, 8, 8)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 8, 8)
    assert torch.equal(flux.pack(latents), packed)
    assert torch.equal(flux.unpack(packed, 4), latents)
    ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(flux.grid_ids(4, torch.device("cpu")), ids)


def test_the_teacher_is_asked_what_its_pipeline_computes() -> None:
    pipe = load_tiny("sd3")
    prompts = [s.caption for s in sample(2, 5)]
    x, scale = torch.randn(2, 4, 32, 32), torch.tensor([2.0, 5.0])
    sigma = torch.tensor([0.7, 0.7])
    with torch.no_grad():
        ours = flux.guided_velocity(pipe, parts.make_tokenizer(), prompts, x, sigma, scale)
        told, empty, pooled, pooled_empty = pipe.encode_prompt(
            prompts, None, None, max_sequence_length=32
        )
        velocity = [
            pipe.transformer(
                hidden_states=x,
                encoder_hidden_states=text[:, :32],
                pooled_projections=summary,
                timestep=sigma * 1000,
                return_dict=False,
            )[0]
            for text, summary in ((empty, pooled_empty), (told, pooled))
        ]
    guided = velocity[0] + scale[:, None, None, None] * (velocity[1] - velocity[0])
    assert torch.allclose(ours, guided, atol=1e-4)


@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_a_bundled_pipeline_is_a_genuine_one_that_every_kernel_serves(model: str) -> None:
    pipe = load_tiny(model)
    assert type(pipe) is {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}[model]
    assert pipe.transformer.config.attention_head_dim == 64
    assert pipe.transformer.dtype == torch.float32
    sizes = []
    rapid3rt.accelerate(pipe, Sized(sizes))
    pipe("a red circle top", num_inference_steps=1, output_type="latent", max_sequence_length=32)
    assert sizes[0][0] * sizes[0][1] >= 256


class Sized(Dense):
    """Notes the image tokens of a run."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes

    def begin(self, run: Run) -> None:
        self.sizes.append(run.resolution)
        super().begin(run)


def test_an_unknown_tiny_pipeline_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model must be one of .*sd3"):
        load_tiny("sd4")


def test_the_loss_weighs_what_is_near_an_object() -> None:
    scene = sample(1, seed=3, split="train")[0]
    assert len(scene.objects) == 1
    mask = parts.near_objects([scene], 32)[0]
    item, side = scene.objects[0], 2 * (scene.objects[0].radius + 2)
    assert mask.sum().item() * 4 == pytest.approx(side**2, rel=0.25)
    rows, columns = torch.nonzero(mask, as_tuple=True)
    assert 2 * rows.float().mean().item() + 1 == pytest.approx(item.y, abs=1)
    assert 2 * columns.float().mean().item() + 1 == pytest.approx(item.x, abs=1)


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_bars_and_verbosity_of_other_libraries_as_they_were(enabled: bool) -> None:
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    hub = huggingface_hub.utils
    hub_was_silent = hub.are_progress_bars_disabled()

    def switch(library: Any, on: bool) -> None:
        (library.enable_progress_bar if on else library.disable_progress_bar)()

    try:
        for library in libraries:
            switch(library, enabled)
        (hub.disable_progress_bars if enabled else hub.enable_progress_bars)()  # each its own way
        load_tiny("sd3")
        assert [library.is_progress_bar_enabled() for library in libraries] == [enabled, enabled]
        assert [library.get_verbosity() for library in libraries] == [level for _, level in before]
        assert hub.are_progress_bars_disabled() == enabled
    finally:
        for library, (on, _) in zip(libraries, before, strict=True):
            switch(library, on)
        (hub.disable_progress_bars if hub_was_silent else hub.enable_progress_bars)()

# SPDX-License-Identifier: Apache-2.0
"""The recipe that makes the tiny pipelines: words, stages, resuming, and the pipeline that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rapid3rt.tiny import build, load_tiny
from rapid3rt.tiny.scenes import sample

SMALL = build.Recipe(
    vae_steps=2, decoder_steps=2, vae_batch=2, num_latents=100, steps=2, batch=2, layers=1, heads=1
)


def test_every_caption_fits_the_tokenizer_without_unknown_words() -> None:
    tokenizer = build.make_tokenizer()
    for scene in sample(300, 0):
        ids = tokenizer(scene.caption).input_ids
        assert len(ids) <= build.MAX_TOKENS
        assert build.UNK not in ids


def test_a_person_may_write_commas_capitals_and_the_top_left() -> None:
    tokenizer = build.make_tokenizer()
    loose = tokenizer("A red circle at the top left, and a blue square bottom right.").input_ids
    assert loose == tokenizer("a red circle top-left and a blue square bottom-right").input_ids


def test_an_interrupted_build_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    build.build_sd3(SMALL, tmp_path / "whole", tmp_path / "a", device)
    save, saves = build.Checkpoint.save, []

    def stop_after_first(self: build.Checkpoint, step: int) -> None:
        save(self, step)
        saves.append(self.path.name)
        if self.path.name == "vae.safetensors" and len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(build.Checkpoint, "save", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        build.build_sd3(SMALL, tmp_path / "resumed", tmp_path / "b", device)
    build.build_sd3(SMALL, tmp_path / "resumed", tmp_path / "b", device)
    for part in ("transformer", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
        assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_the_bundled_pipeline_is_a_genuine_one_that_every_kernel_serves() -> None:
    from diffusers import StableDiffusion3Pipeline

    pipe = load_tiny("sd3")
    assert type(pipe) is StableDiffusion3Pipeline
    config = pipe.transformer.config
    assert config.attention_head_dim == 64
    assert (config.sample_size // config.patch_size) ** 2 >= 256
    assert pipe.transformer.dtype == torch.float32


def test_an_unknown_tiny_pipeline_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model must be one of .*sd3"):
        load_tiny("sd4")


def test_the_loss_weighs_what_is_near_an_object() -> None:
    scene = sample(1, seed=3, split="train")[0]
    assert len(scene.objects) == 1
    mask = build._near_objects([scene], 32)[0]
    item, side = scene.objects[0], 2 * (scene.objects[0].radius + 2)
    assert mask.sum().item() * 4 == pytest.approx(side**2, rel=0.25)
    rows, columns = torch.nonzero(mask, as_tuple=True)
    assert 2 * rows.float().mean().item() + 1 == pytest.approx(item.y, abs=1)
    assert 2 * columns.float().mean().item() + 1 == pytest.approx(item.x, abs=1)

# SPDX-License-Identifier: Apache-2.0
"""Frozen encoders: what they give is what the formulas say, and the pipeline they were taken from is left alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTModel,
)

import rapid3rt
from rapid3rt.tiny import scenes
from training.discriminator import Discriminator, DiscriminatorConfig, clip_features, vae_features
from training.discriminator.features import WINDOW, local_detail


@pytest.fixture(scope="module")
def pipe():
    return rapid3rt.load_tiny("sd3")


@pytest.fixture(scope="module")
def images():
    return scenes.draw(scenes.sample(5, 3, split="train"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP vision tower of random weights: 2 layers of width 16, 3 x 3 patches of 8 pixels."""
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    return str(folder)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}


def test_local_detail_by_hand():
    """One flat window and one of checks: standard deviations 0 and 1; what fills no window is left out."""
    checks = (torch.arange(WINDOW)[:, None] + torch.arange(WINDOW)) % 2 * 2.0 - 1
    x = torch.full((1, 1, WINDOW + 1, 2 * WINDOW + 3), 100.0)
    x[0, 0, :WINDOW, :WINDOW] = 5.0
    x[0, 0, :WINDOW, WINDOW : 2 * WINDOW] = checks
    flat, rough = math.log(1e-4), math.log(1 + 1e-4)
    torch.testing.assert_close(local_detail(x), torch.tensor([[(flat + rough) / 2, flat]]))


def test_pictures_without_a_whole_window_are_refused():
    with pytest.raises(ValueError, match=r"images must have 4 cells per side .* got \(3, 9\)"):
        local_detail(torch.zeros(1, 2, 3, 9))


def test_vae_features_are_the_detail_of_every_level(pipe, images):
    features = vae_features(pipe)
    seen = features(images)
    assert seen.shape == (5, features.width) == (5, 2 * (24 + 24 + 48 + 48))
    assert seen.dtype == torch.float32
    assert not seen.requires_grad
    levels = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: levels.append(output))
        for module in (
            pipe.vae.encoder.conv_in,
            *pipe.vae.encoder.down_blocks,
            pipe.vae.encoder.mid_block,
        )
    ]
    with torch.no_grad():
        pipe.vae.encode(images * 2 - 1)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(seen, torch.cat([local_detail(level) for level in levels], 1))


def test_a_picture_is_seen_alike_in_any_batch(pipe, images):
    features = vae_features(pipe)
    alone = torch.cat([features(image[None]) for image in images])
    torch.testing.assert_close(features(images), alone, rtol=1e-4, atol=1e-4)


def test_features_outlive_what_happens_to_the_pipeline(images):
    pipe = rapid3rt.load_tiny("sd3")
    features = vae_features(pipe)
    before = features(images)
    pipe.vae.to(torch.bfloat16)
    for parameter in pipe.vae.parameters():
        parameter.data.zero_()
    assert torch.equal(features(images), before)


def test_making_features_leaves_pipeline_and_global_generator_alone(pipe):
    weights = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    flags = [p.requires_grad for p in pipe.vae.parameters()]
    state = torch.get_rng_state()
    vae_features(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.vae.state_dict().items())
    assert [p.requires_grad for p in pipe.vae.parameters()] == flags


def test_both_tiny_pipelines_have_features(images):
    assert vae_features(rapid3rt.load_tiny("flux"))(images).shape[0] == 5


def test_half_precision_encoders_are_read_in_float32(images):
    pipe = rapid3rt.load_tiny("sd3")
    pipe.vae.to(torch.bfloat16)
    assert vae_features(pipe)(images).dtype == torch.float32


def test_vaes_that_cannot_be_read_are_refused(pipe):
    with pytest.raises(ValueError, match="AutoencoderKL as its vae, got Linear"):
        vae_features(SimpleNamespace(vae=torch.nn.Linear(1, 1)))
    with torch.device("meta"):
        hollow = type(pipe.vae).from_config(pipe.vae.config)
    with pytest.raises(ValueError, match="got an offloaded one"):
        vae_features(SimpleNamespace(vae=hollow))


def test_clip_gives_class_token_mean_and_spread(clip_folder, images):
    features = clip_features(clip_folder)
    seen = features(images)
    assert seen.shape == (5, features.width) == (5, 48)
    tower = CLIPVisionModel.from_pretrained(clip_folder)
    small = torch.nn.functional.interpolate(images, (24, 24), mode="bicubic", antialias=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        hidden = tower((small.clamp(0, 1) - mean) / std, output_hidden_states=True).hidden_states
    patches = hidden[-2][:, 1:]
    spread = (patches.var(1, correction=0).sqrt() + 1e-4).log()
    expected = torch.cat([hidden[-2][:, 0], patches.mean(1), spread], 1)
    torch.testing.assert_close(seen, expected)


def test_clip_sees_wide_pictures_whole(clip_folder):
    """What stands at the left edge of a wide picture is seen: nothing is cut off."""
    features = clip_features(clip_folder)
    images = torch.full((2, 3, 24, 96), 0.5)
    images[1, :, :, :8] = 1.0
    seen = features(images)
    assert not torch.equal(seen[0], seen[1])


def test_the_vision_part_of_a_whole_clip_is_taken(tmp_path, images):
    whole = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8))
    whole.save_pretrained(tmp_path)
    assert clip_features(str(tmp_path))(images).shape == (5, 48)


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


def test_other_models_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, num_hidden_layers=1, image_size=24)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must be a CLIP, got .* of type 'vit'"):
        clip_features(str(tmp_path))


def test_names_tell_encoders_apart(pipe, clip_folder):
    names = {vae_features(pipe).name, clip_features(clip_folder).name}
    names.add(clip_features(clip_folder, layer=-1).name)
    other = rapid3rt.load_tiny("sd3")
    other.vae.encoder.conv_in.bias.data[0] += 1
    names.add(vae_features(other).name)
    assert len(names) == 4
    assert vae_features(pipe).name in names


def test_layers_that_a_tower_does_not_have_are_refused(clip_folder):
    with pytest.raises(ValueError, match=r"layer must be in -3\.\.2, got 3"):
        clip_features(clip_folder, layer=3)


def test_a_head_on_them_is_small(pipe, clip_folder):
    for features in (vae_features(pipe), clip_features(clip_folder)):
        head = Discriminator(features, DiscriminatorConfig(), seed=0)
        print(f"{features.name}: {head.num_parameters:,} parameters")
        assert head.num_parameters < 100_000


@pytest.mark.slow
def test_few_steps_are_seen_on_the_tiny_pipeline(pipe):
    """Plain 3 steps against plain 28: told apart once learned, on 8 pairs and on 4 others."""
    discriminator = Discriminator(vae_features(pipe), DiscriminatorConfig(), seed=0)
    captions = [scene.caption for scene in scenes.sample(12, 8, split="train")]
    full, fast = (discriminator.encode(generate(pipe, captions, steps)) for steps in (28, 3))
    discriminator.add(fast[:8], full[:8], torch.full((8,), 3))
    before, after = discriminator.update(), discriminator.update()
    assert after["auc@3"] > 0.9 > before["auc@3"]
    better = discriminator.score(full[8:]) > discriminator.score(fast[8:])
    assert float(better.float().mean()) >= 0.75  # of pairs it never saw


def generate(pipe, captions, steps):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    return pipe(
        captions,
        num_inference_steps=steps,
        guidance_scale=3.5,
        max_sequence_length=32,
        generator=generators,
        output_type="pt",
    ).images

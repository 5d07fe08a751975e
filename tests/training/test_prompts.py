# SPDX-License-Identifier: Apache-2.0
"""Prompts that are encoded beforehand give the images of the strings, and what cannot be encoded stays strings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import small_world
import torch

import rapid3rt
from rapid3rt.tiny.scenes import sample
from training.prompts import Prompts

CAPTIONS = [scene.caption for scene in sample(20, 3, "train")]
CPU = torch.device("cpu")


def latents(pipe, arguments, call, count):
    noise = [torch.Generator().manual_seed(i) for i in range(count)]
    images = pipe(
        **arguments, num_inference_steps=2, generator=noise, output_type="latent", **call
    ).images
    return images.float()


@pytest.fixture(scope="module")
def flux():
    pipe = rapid3rt.load_tiny("flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [3.5, 1.0])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_images_are_those_of_the_strings(request, family, guidance) -> None:
    pipe = small_world.make_pipe() if family == "sd3" else request.getfixturevalue("flux")
    call = {"guidance_scale": guidance, "max_sequence_length": 32, "height": 32, "width": 32}
    rows = [17, 3, 3]
    arguments = Prompts(pipe, CAPTIONS, call).arguments(rows, CPU)
    assert "prompt" not in arguments
    encoded = latents(pipe, arguments, call, 3)
    strings = latents(pipe, {"prompt": [CAPTIONS[i] for i in rows]}, call, 3)
    torch.testing.assert_close(encoded, strings, rtol=1e-4, atol=1e-4)
    other = latents(pipe, {"prompt": [CAPTIONS[i] for i in (16, 4, 2)]}, call, 3)
    assert float((other - strings).abs().mean()) > 20 * float((encoded - strings).abs().mean())


def test_a_prompt_may_come_several_times() -> None:
    prompts = Prompts(small_world.make_pipe(), CAPTIONS, {"guidance_scale": 3.5})
    both = prompts.arguments([4, 4, 0], CPU)
    for tensor in both.values():
        assert len(tensor) == 3
        assert torch.equal(tensor[0], tensor[1])
    assert not torch.equal(both["prompt_embeds"][0], both["prompt_embeds"][2])


def test_without_guidance_nothing_negative_is_kept() -> None:
    arguments = Prompts(small_world.make_pipe(), CAPTIONS[:2], {"guidance_scale": 1.0})
    assert set(arguments.arguments([0], CPU)) == {"prompt_embeds", "pooled_prompt_embeds"}


def test_a_family_that_is_not_known_gets_strings() -> None:
    pipe = SimpleNamespace(transformer=object())
    arguments = Prompts(pipe, CAPTIONS, {}).arguments([2, 0, 2], CPU)
    assert arguments == {"prompt": [CAPTIONS[2], CAPTIONS[0], CAPTIONS[2]]}

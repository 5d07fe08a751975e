# SPDX-License-Identifier: Apache-2.0
"""Heads: size, what they read, how they start."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rapid3rt.policies.heads import Head, count_parameters, observe, with_validity


def test_three_heads_on_flux_have_about_three_million_parameters():
    heads = {name: Head(64, 3072, n) for name, n in (("step", 2), ("cache", 2), ("sparse", 4))}
    assert 2.9e6 < count_parameters(heads) < 3.1e6


@pytest.mark.slow
def test_three_heads_take_less_than_a_hundredth_of_a_step_of_flux():
    side, text = 64, 512  # packed latents of 1024 x 1024 pixels
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        inputs = {
            "hidden_states": torch.empty(1, side * side, 64),
            "encoder_hidden_states": torch.empty(1, text, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(side * side, 3),
            "txt_ids": torch.empty(text, 3),
        }
        heads = [Head(64, model.inner_dim, n, num_scalars=9) for n in (2, 2, 4)]
        seen = torch.empty(1, 64, side, side), torch.empty(1, model.inner_dim), torch.empty(1, 18)
    with torch.no_grad(), FlopCounterMode(display=False) as step:
        model(**inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as decisions:
        for head in heads:
            head(*seen)
    assert 0 < decisions.get_total_flops() < 0.01 * step.get_total_flops()


def test_a_head_starts_as_nothing_added_and_learns():
    head = Head(4, 8, 2, width=8, num_scalars=3)
    seen = (observe(torch.randn(5, 4, 9, 12), None), torch.randn(5, 8), torch.rand(5, 6))
    assert torch.equal(head(*seen), torch.zeros(5, 2))
    optimiser = torch.optim.SGD(head.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    for _ in range(2):  # the last layer moves first, and only then do the others see a gradient
        (head(*seen) - 1).square().mean().backward()
        optimiser.step()
    assert all(not torch.equal(p, before[name]) for name, p in head.named_parameters())


def test_with_a_bias_it_starts_near_it():
    head = Head(4, 8, 2, bias=(2.5, 1.0))
    out = head(observe(torch.randn(3, 4, 16, 16), None), torch.randn(3, 8))
    assert torch.allclose(out, torch.tensor([2.5, 1.0]).expand(3, 2), atol=0.5)
    assert not torch.equal(out[0], out[1])


def test_an_image_is_seen_alone_and_at_any_size():
    head = Head(4, 8, 3, width=16)
    nn.init.normal_(head.decide.weight)
    for height, width in ((8, 8), (13, 40), (1, 1)):
        x, c = observe(torch.randn(4, 4, height, width), None), torch.randn(4, 8)
        together = head(x, c)
        assert together.shape == (4, 3)
        assert torch.allclose(together[2:3], head(x[2:3], c[2:3]), atol=1e-5)


def test_observations_are_small_and_rounded():
    x = torch.randn(2, 4, 64, 8)
    seen = observe(x, 16)
    assert seen.shape == (2, 4, 16, 8)
    assert seen.dtype is torch.bfloat16
    assert torch.equal(seen, x.unflatten(2, (16, 4)).mean(3).bfloat16())
    assert observe(x, None).shape == x.shape
    assert torch.equal(observe(seen, 16), seen)


def test_unknown_scalars_are_zero_and_say_so():
    drift = torch.tensor([0.5, math.nan, math.inf])
    out = with_validity([drift, None, torch.tensor([1, 2, 3])], 3)
    assert out.tolist() == [
        [0.5, 0.0, 1.0, 1.0, 0.0, 1.0],
        [0.0, 0.0, 2.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 3.0, 0.0, 0.0, 1.0],
    ]

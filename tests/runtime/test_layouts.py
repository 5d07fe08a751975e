# SPDX-License-Identifier: Apache-2.0
"""Dense equals plain bit for bit on SD3 and SD3.5 layouts with random weights, in float32 and bf16, several shapes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch.utils.flop_counter import FlopCounterMode

import rapid3rt

LAYOUTS: dict[str, dict[str, Any]] = {
    "sd3": {"dual_attention_layers": (), "qk_norm": None},
    "sd35": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
}


def make_pipeline(layout: str, dtype: torch.dtype, channels: int = 4, **scheduler: Any) -> Any:
    """A pipeline without text encoders: three blocks of width 32. channels: of the latents."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=channels,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=channels,
        **LAYOUTS[layout],
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.to(dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae.to(dtype).eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: Any, steps: int, size: tuple[int, int] = (16, 16), images: int = 2, **kwargs: Any
) -> torch.Tensor:
    """Latents from fixed random embeddings."""
    dtype, source = pipe.transformer.dtype, torch.Generator().manual_seed(5)
    shapes = {"prompt_embeds": (images, 9, 32), "pooled_prompt_embeds": (images, 64)}
    embeds = {k: torch.randn(s, generator=source).to(dtype) for k, s in shapes.items()}
    embeds |= {
        f"negative_{k}": torch.randn(s, generator=source).to(dtype) for k, s in shapes.items()
    }
    noise = torch.Generator().manual_seed(1)
    out: torch.Tensor = pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=noise,
        output_type="latent",
        **{**embeds, **kwargs},
    ).images
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_dense_is_plain(
    layout: str, size: tuple[int, int], guidance: float, dtype: torch.dtype
) -> None:
    pipe = make_pipeline(layout, dtype)
    arguments = {"guidance_scale": guidance}
    plain = call(pipe, 4, size, **arguments)
    rapid3rt.accelerate(pipe, "dense")
    accelerated = call(pipe, 4, size, **arguments)
    assert accelerated.dtype == dtype
    assert torch.equal(plain, accelerated)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_fewer_steps_are_the_plain_fewer_steps_under_dynamic_shifting_too(layout: str) -> None:
    pipe = make_pipeline(layout, torch.float32, use_dynamic_shifting=True)
    plain = call(pipe, 3)
    rapid3rt.accelerate(pipe, "steps:3")
    assert torch.equal(plain, call(pipe, 7))


def test_two_accelerated_pipelines_share_one_transformer_undisturbed() -> None:
    first = make_pipeline("sd3", torch.float32)
    second = StableDiffusion3Pipeline(**first.components)
    second.set_progress_bar_config(disable=True)
    plain = call(first, 4)
    rapid3rt.accelerate(first, "dense")
    rapid3rt.accelerate(second, "threshold:0.4")
    reused = call(second, 4)
    assert torch.equal(plain, call(first, 4))
    assert torch.equal(reused, call(second, 4))
    assert not torch.equal(plain, reused)
    rapid3rt.restore(second)
    assert torch.equal(plain, call(second, 4))
    assert torch.equal(plain, call(first, 4))


def test_a_second_call_may_have_another_size_batch_and_number_of_steps() -> None:
    pipe, fresh = make_pipeline("sd3", torch.float32), make_pipeline("sd3", torch.float32)
    rapid3rt.accelerate(pipe, "threshold:0.4")
    call(pipe, 5)
    second = call(pipe, 3, (8, 8), images=1)
    rapid3rt.accelerate(fresh, "threshold:0.4")
    assert torch.equal(second, call(fresh, 3, (8, 8), images=1))


def test_hooks_on_the_root_fire_once_per_call_before_and_after_accelerating() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    plain = call(make_pipeline("sd3", torch.float32), 4)
    for hook_first in (True, False):
        pipe, hook = make_pipeline("sd3", torch.float32), Count()
        transformer = pipe.transformer
        if hook_first:
            add_hook_to_module(transformer, hook)
        rapid3rt.accelerate(pipe, "dense")
        if not hook_first:
            add_hook_to_module(transformer, hook)
        assert torch.equal(plain, call(pipe, 4))
        assert hook.calls == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_estimate_of_a_level_counts_what_the_blocks_compute(layout: str) -> None:
    pipe = make_pipeline(layout, torch.float32)
    with FlopCounterMode(
        display=False, depth=3
    ) as counter:  # counts linears; SDPA it does not, on CPU
        call(pipe, 1, images=1, guidance_scale=1.0)
    linears = sum(
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if re.fullmatch(r".*\.transformer_blocks\.\d+", name)
    )
    image, text, width = 256, 9, 32
    layers, dual = 3, len(LAYOUTS[layout]["dual_attention_layers"])
    pairs = 4 * width * image**2 * (layers + dual)
    text_pairs = 4 * width * ((image + text) ** 2 - image**2) * layers
    share = pairs / (pairs + text_pairs + linears)
    rapid3rt.accelerate(pipe, "dense")
    call(pipe, 1, images=1, guidance_scale=1.0)
    costs = rapid3rt.report(pipe).trace.costs
    rapid3rt.restore(pipe)
    assert not costs.measured
    # Eight key blocks of 32: level 1 drops two of them, level 2 four, level 3 six.
    expected = tuple(1 - share * dropped / 8 for dropped in (0, 2, 4, 6))
    assert costs.levels == pytest.approx(expected, abs=0.01)

# SPDX-License-Identifier: Apache-2.0
"""FLUX with random weights: dense equals plain bit for bit; fewer steps, reuse, sparsity and true CFG."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

import rapid3rt

VARIANTS = {"dev": True, "schnell": False}


def make_flux(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline without text encoders: two double and two single blocks of width 32."""
    torch.manual_seed(0)
    dev = VARIANTS[variant]
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=dev,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    pipe = FluxPipeline(
        transformer=transformer.to(dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=dev),
        vae=vae.to(dtype).eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_flux(
    pipe: Any, steps: int, size: tuple[int, int] = (32, 32), images: int = 2, **kwargs: Any
) -> torch.Tensor:
    """Packed latents from fixed random embeddings; `true_cfg` adds a negative prompt."""
    dtype, source = pipe.transformer.dtype, torch.Generator().manual_seed(5)
    shapes = {"prompt_embeds": (images, 9, 32), "pooled_prompt_embeds": (images, 32)}
    embeds = {k: torch.randn(s, generator=source).to(dtype) for k, s in shapes.items()}
    if kwargs.pop("true_cfg", False):
        embeds |= {
            f"negative_{k}": torch.randn(s, generator=source).to(dtype) for k, s in shapes.items()
        }
        embeds["true_cfg_scale"] = 3.0
    out: torch.Tensor = pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **{**embeds, **kwargs},
    ).images
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("true_cfg", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_dense_is_plain(
    variant: str, size: tuple[int, int], true_cfg: bool, dtype: torch.dtype
) -> None:
    pipe = make_flux(variant, dtype)
    plain = call_flux(pipe, 4, size, true_cfg=true_cfg)
    rapid3rt.accelerate(pipe, "dense")
    accelerated = call_flux(pipe, 4, size, true_cfg=true_cfg)
    assert accelerated.dtype == dtype
    assert torch.equal(plain, accelerated)


@pytest.mark.parametrize("true_cfg", [False, True])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_fewer_steps_are_the_plain_fewer_steps(variant: str, true_cfg: bool) -> None:
    pipe = make_flux(variant)
    plain = call_flux(pipe, 3, true_cfg=true_cfg)
    rapid3rt.accelerate(pipe, "steps:3")
    assert torch.equal(plain, call_flux(pipe, 7, true_cfg=true_cfg))


@pytest.mark.parametrize("true_cfg", [False, True])
def test_a_callback_that_calls_the_transformer_is_not_taken_for_guidance(true_cfg: bool) -> None:
    pipe, arguments = make_flux("dev"), dict[str, Any]()
    plain = call_flux(pipe, 4, true_cfg=true_cfg)
    rapid3rt.accelerate(pipe, "dense")
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: arguments.update(kwargs), with_kwargs=True
    )

    def probe(pipe: Any, step: int, _t: Any, _kwargs: Any) -> dict[str, Any]:
        if step == 1:
            pipe.transformer(**arguments)
        return {}

    calls = "cond, then uncond" if true_cfg else "cond"
    with pytest.raises(rapid3rt.UnsupportedError, match=f"called for {calls} in each tick and by"):
        call_flux(pipe, 4, true_cfg=true_cfg, callback_on_step_end=probe)
    handle.remove()
    assert torch.equal(call_flux(pipe, 4, true_cfg=true_cfg), plain)


def test_sigmas_of_the_users_own_are_refused_where_the_policy_sets_the_grid() -> None:
    pipe = make_flux("dev")
    rapid3rt.accelerate(pipe, "steps:3")
    with pytest.raises(rapid3rt.UnsupportedError, match="sigmas="):
        call_flux(pipe, 4, sigmas=[1.0, 0.7, 0.4, 0.1])


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["threshold:0.3", "controller:0.3", "steps:3/trim/ab2"])
def test_a_batch_equals_its_singles(policy: str) -> None:
    pipe = make_flux("dev")
    source = torch.Generator().manual_seed(3)
    prompts = torch.randn(4, 9, 32, generator=source) * torch.tensor([0.1, 1, 3, 10])[:, None, None]
    pooled, noise = (torch.randn(4, *s, generator=source) for s in ((32,), (256, 16)))

    def run(which: list[int]) -> tuple[torch.Tensor, list[int]]:
        latents = call_flux(
            pipe,
            6,
            prompt_embeds=prompts[which],
            pooled_prompt_embeds=pooled[which],
            latents=noise[which],
        )
        return latents, [i.nfe for i in rapid3rt.report(pipe).images]

    rapid3rt.accelerate(pipe, policy)
    batch, nfe = run([0, 1, 2, 3])
    for i in range(4):
        single, spent = run([i])
        assert spent == [nfe[i]]
        assert (single[0] - batch[i]).abs().max() <= 1e-5 * single.abs().max()

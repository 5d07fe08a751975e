# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: image tokens first, text after; dual attention and qk norm live inside the blocks.

The loop calls the diffusers blocks as they are, so LoRA, quantised linears and regional compilation keep working.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3ControlNetModel, SD3MultiControlNetModel, SD3Transformer2DModel
from diffusers.models.attention_processor import (
    Attention,
    JointAttnProcessor2_0,
    PAGCFGJointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)

from rapid3rt.adapters.attention import NOT_STOCK, SparseProcessor, attend, exchanged_processors
from rapid3rt.adapters.base import (
    IMAGE_PROMPTS,
    ControlNetLayout,
    Embedded,
    SparseRows,
    Widths,
    is_model,
    take,
    take_entries,
    take_nested,
)
from rapid3rt.errors import UnsupportedError

_PERTURBING = (PAGCFGJointAttnProcessor2_0, PAGJointAttnProcessor2_0)

_FORWARD = SD3Transformer2DModel.forward


class SD3Adapter:
    """Adapter of `SD3Transformer2DModel`."""

    family = "sd3"
    attention_kwargs = "joint_attention_kwargs"
    widths: Widths = (
        ("encoder_hidden_states", "joint_attention_dim"),
        ("pooled_projections", "pooled_projection_dim"),
    )
    controlnet = ControlNetLayout(
        classes=(SD3ControlNetModel, SD3MultiControlNetModel),
        outputs=("block_controlnet_hidden_states",),
        rows=("hidden_states", "encoder_hidden_states", "pooled_projections", "controlnet_cond"),
        per_net=("controlnet_cond",),
    )

    def supports(self, transformer: Any) -> bool:
        """Whether the transformer is an SD3 one."""
        return is_model(transformer, SD3Transformer2DModel, _FORWARD)

    def branches(
        self, pipe: Any, call: int, kwargs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Call 0: uncond, cond and perturbed rows in one batch, as guided; call 1: skip-layer guidance, cond rows."""
        skip_layers = kwargs.get("skip_layers")
        if call == 0 and skip_layers is None:
            guided = ("uncond", "cond") if pipe.do_classifier_free_guidance else ("cond",)
            perturbs = getattr(pipe, "do_perturbed_attention_guidance", False)
            return (*guided, "perturbed") if perturbs else guided
        if call == 1 and skip_layers is not None:
            return (f"skip:{','.join(map(str, skip_layers))}",)
        raise UnsupportedError(
            f"transformer call {call} of a tick (skip_layers={skip_layers}) has a guidance layout that is not known; "
            "use rapid3rt.restore(pipe) for this pipeline"
        )

    def extra_guidance(self, pipe: Any, arguments: Mapping[str, Any]) -> float | None:
        """Perturbed attention."""
        perturbs = getattr(pipe, "do_perturbed_attention_guidance", False)
        return float(pipe.pag_scale) if perturbs else None

    def mu(self, arguments: Mapping[str, Any], mu: float | None, steps: int) -> float | None:
        """The pipelines shift by the size of the image alone."""
        return mu

    def is_few_step(self, pipe: Any) -> bool:
        """Nothing in a pipeline tells a Turbo from another SD3.5."""
        return False

    def patch(self, transformer: Any) -> int:
        """As the model says."""
        patch: int = transformer.config.patch_size
        return patch

    def resolution(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Latent size over patch size."""
        patch = transformer.config.patch_size
        height, width = kwargs["hidden_states"].shape[-2:]
        return height // patch, width // patch

    def observe(
        self, transformer: Any, kwargs: Mapping[str, Any], images: int, resolution: tuple[int, int]
    ) -> torch.Tensor:
        """The last branch's latents; all branches hold the same. Mask and image of an inpainting model lie behind."""
        hidden: torch.Tensor = kwargs["hidden_states"]
        return hidden[-images:, : transformer.out_channels]

    def as_grid(self, velocity: torch.Tensor, resolution: tuple[int, int]) -> torch.Tensor:
        """SD3's velocity is a grid already."""
        return velocity

    def image_attention_share(self, transformer: Any, kwargs: Mapping[str, Any]) -> float:
        """Per joint block 24 D^2 a token for its linears (QKV, output, MLP of 4 D), 4 D a pair for attention."""
        rows, columns = self.resolution(transformer, kwargs)
        image, text = rows * columns, kwargs["encoder_hidden_states"].shape[1]
        width, layers = transformer.inner_dim, len(transformer.transformer_blocks)
        dual = len(transformer.config.dual_attention_layers)
        pairs = 4 * width * image**2 * (layers + dual)
        linears = 24 * width**2 * (image + text) * layers + 8 * width**2 * image * dual
        text_pairs = 4 * width * ((image + text) ** 2 - image**2) * layers
        return float(pairs / (pairs + linears + text_pairs))

    def model_time(self, kwargs: Mapping[str, Any], timestep: torch.Tensor) -> torch.Tensor:
        """The scheduler's units, as they are."""
        return timestep

    def embed(
        self,
        transformer: Any,
        kwargs: Mapping[str, Any],
        timestep: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> Embedded:
        """Patch embedding with positions; modulation embedding from time and pooled text."""
        hidden, pooled = (
            take(kwargs[name], rows) for name in ("hidden_states", "pooled_projections")
        )
        # PatchEmbed returns a transposed view; the model makes it contiguous before its first block, so must we.
        return Embedded(
            image=transformer.pos_embed(hidden).contiguous(),
            temb=transformer.time_text_embed(timestep, pooled),
        )

    def run_blocks(
        self, transformer: Any, kwargs: Mapping[str, Any], embedded: Embedded, rows: torch.Tensor | None,
        timestep: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """All joint blocks but those of `skip_layers`, which take their ControlNet residual all the same."""
        image, text = (
            embedded.image,
            transformer.context_embedder(take(kwargs["encoder_hidden_states"], rows)),
        )
        total = len(kwargs["hidden_states"])
        attention_kwargs = take_entries(kwargs.get(self.attention_kwargs), rows, total)
        if attention_kwargs is not None and IMAGE_PROMPTS in attention_kwargs:
            embeds = attention_kwargs.pop(IMAGE_PROMPTS)
            embeds = take_nested(embeds, rows, total)
            tokens, ip_temb = transformer.image_proj(embeds, timestep)
            attention_kwargs |= {"ip_hidden_states": tokens, "temb": ip_temb}
        skip_layers = kwargs.get("skip_layers") or ()
        control = kwargs.get("block_controlnet_hidden_states")
        for i, block in enumerate(transformer.transformer_blocks):
            if i not in skip_layers:
                text, image = block(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=embedded.temb,
                    joint_attention_kwargs=attention_kwargs,
                )
            if control is not None and not block.context_pre_only:
                interval = len(transformer.transformer_blocks) / len(control)
                image = image + control[int(i / interval)]
        return image

    def finish(
        self, transformer: Any, kwargs: Mapping[str, Any], hidden: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        """norm_out, proj_out, then patches back to the latent grid."""
        hidden = transformer.proj_out(transformer.norm_out(hidden, temb))
        patch, channels = transformer.config.patch_size, transformer.out_channels
        height, width = self.resolution(transformer, kwargs)
        hidden = hidden.reshape(len(hidden), height, width, patch, patch, channels)
        hidden = torch.einsum("nhwpqc->nchpwq", hidden)
        return hidden.reshape(len(hidden), channels, height * patch, width * patch)

    def stock_attention(self, transformer: Any) -> list[Any]:
        """Attention modules, joint and dual, whose processor is the stock one."""
        return [
            module
            for block in transformer.transformer_blocks
            for module in (block.attn, getattr(block, "attn2", None))
            if module is not None and type(module.processor) is JointAttnProcessor2_0
        ]

    def dense_only(self, transformer: Any, kwargs: Mapping[str, Any]) -> str | None:
        """Fused projections and IP-adapter bring processors of their own; those of PAG count on the rows' order."""
        if any(isinstance(p, _PERTURBING) for p in transformer.attn_processors.values()):
            return "perturbed-attention guidance splits the batch by the order of its rows"
        return None if self.stock_attention(transformer) else NOT_STOCK

    def sparse_attention(
        self, transformer: Any, kwargs: Mapping[str, Any], rows: SparseRows
    ) -> AbstractContextManager[None]:
        """Our processor where the stock one sits, in joint and dual attention."""
        return exchanged_processors(self.stock_attention(transformer), _SparseJointProcessor, rows)


class _SparseJointProcessor(SparseProcessor):
    """Joint attention whose first rows are dense through the model's own call and whose other rows are block-sparse."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Same projections and order of tokens as the stock processor (image, then text)."""
        if self.is_foreign_thread():
            own: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask
            )
            return own
        del attention_mask  # the stock processor ignores it too
        q, k, v = (_heads(attn, p(hidden_states)) for p in (attn.to_q, attn.to_k, attn.to_v))
        q, k = _norm(attn.norm_q, q), _norm(attn.norm_k, k)
        num_image = hidden_states.shape[1]
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (_heads(attn, p(encoder_hidden_states)) for p in projections)
            text_q, text_k = _norm(attn.norm_added_q, text_q), _norm(attn.norm_added_k, text_k)
            q, k, v = (torch.cat(pair, dim=2) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        num_text = q.shape[2] - num_image
        out = attend(q, k, v, self.rows, num_image, num_text, F.scaled_dot_product_attention)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        image, text = out[:, :num_image], out[:, num_image:]
        if encoder_hidden_states is not None and not attn.context_pre_only:
            text = attn.to_add_out(text)
        image = attn.to_out[1](attn.to_out[0](image))
        return image if encoder_hidden_states is None else (image, text)


def _heads(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """`[R, N, H K]` to `[R, H, N, K]`, a view."""
    return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)


def _norm(norm: torch.nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = x if norm is None else norm(x)
    return out

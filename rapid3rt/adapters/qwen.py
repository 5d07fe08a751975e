# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image (text-to-image, img2img, inpaint, Edit, ControlNet): text first, packed latents, double blocks only.

The loop calls the diffusers blocks as they are, so LoRA, quantised linears and regional compilation keep working.
Noise tokens are those of the first entry of `img_shapes` (Edit appends reference images). Prompts of one batch differ
in length, so a mask says which text tokens are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from diffusers import (
    QwenImageControlNetModel,
    QwenImageMultiControlNetModel,
    QwenImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
    compute_text_seq_len_from_mask,
)

from rapid3rt.adapters.attention import (
    SparseProcessor,
    block_sparse,
    exchanged_processors,
)
from rapid3rt.adapters.base import (
    ControlNetLayout,
    Embedded,
    SparseRows,
    Widths,
    is_model,
    take,
    take_entries,
)
from rapid3rt.adapters.packed import PackedAdapter
from rapid3rt.errors import UnsupportedError

Pair = tuple[torch.Tensor, torch.Tensor]
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # image, text, which text is there

_FORWARD = QwenImageTransformer2DModel.forward


class QwenAdapter(PackedAdapter):
    """Adapter of `QwenImageTransformer2DModel`."""

    family = "qwen"
    attention_kwargs = "attention_kwargs"
    widths: Widths = (("encoder_hidden_states", "joint_attention_dim"),)
    controlnet = ControlNetLayout(
        classes=(QwenImageControlNetModel, QwenImageMultiControlNetModel),
        outputs=("controlnet_block_samples",),
        rows=(
            *("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask"),
            "controlnet_cond",
        ),
        per_net=("controlnet_cond",),
        is_bare=True,
    )

    def supports(self, transformer: Any) -> bool:
        """Whether the transformer is a Qwen-Image one; layered images and guidance embeddings are refused."""
        if not is_model(transformer, QwenImageTransformer2DModel, _FORWARD):
            return False
        for option in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if transformer.config.get(option):
                raise UnsupportedError(
                    f"option {option} of the Qwen-Image transformer must be off, got True"
                )
        return True

    def resolution(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """From the first entry of `img_shapes`; reads no device."""
        frames, rows, columns = _shapes(kwargs)[0]
        return frames * rows, columns

    def image_attention_share(self, transformer: Any, kwargs: Mapping[str, Any]) -> float:
        """24 D^2 a token for linears, 4 D a pair for attention."""
        image, text = kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1]
        tokens, width = image + text, transformer.inner_dim
        return float(4 * width * image**2 / (4 * width * tokens**2 + 24 * width**2 * tokens))

    def embed(
        self,
        transformer: Any,
        kwargs: Mapping[str, Any],
        timestep: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> Embedded:
        """Linear embedding of packed latents; modulation embedding from time alone.

        With `zero_cond_t` temb is `[A, 2 D]`: behind each row's own half the one of reference tokens, at time 0.
        """
        image = transformer.img_in(take(kwargs["hidden_states"], rows))
        time = self.model_time(kwargs, timestep).to(image.dtype)
        if not transformer.zero_cond_t:
            return Embedded(image=image, temb=transformer.time_text_embed(time, image))
        both = transformer.time_text_embed(torch.cat((time, time * 0)), image)
        return Embedded(image=image, temb=torch.cat(both.chunk(2), dim=1))

    def run_blocks(
        self, transformer: Any, kwargs: Mapping[str, Any], embedded: Embedded, rows: torch.Tensor | None,
        timestep: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """All blocks; positions are the same for every row. A ControlNet may have fewer blocks than the transformer."""
        image, temb, is_reference = embedded.image, embedded.temb, None
        shapes = _shapes(kwargs)
        if transformer.zero_cond_t:
            temb = torch.cat(temb.chunk(2, dim=1))
            places = torch.arange(image.shape[1], device=image.device)
            is_reference = (places >= prod(shapes[0])).int()[None]
        text = take(kwargs["encoder_hidden_states"], rows)
        text = transformer.txt_in(transformer.txt_norm(text))
        mask = kwargs.get("encoder_hidden_states_mask")
        num_text, _, mask = compute_text_seq_len_from_mask(
            text, None if mask is None else take(mask, rows)
        )
        positions = transformer.pos_embed([shapes], max_txt_seq_len=num_text, device=image.device)
        total = len(kwargs["hidden_states"])
        attention_kwargs = take_entries(kwargs.get(self.attention_kwargs), rows, total)
        blocks, control = transformer.transformer_blocks, kwargs.get("controlnet_block_samples")
        for i, block in enumerate(blocks):
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=mask,
                temb=temb,
                image_rotary_emb=positions,
                joint_attention_kwargs=attention_kwargs,
                modulate_index=is_reference,
            )
            if control is not None:
                image = image + control[i // -(-len(blocks) // len(control))]
        return image

    def finish(
        self, transformer: Any, kwargs: Mapping[str, Any], hidden: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        """norm_out and proj_out: `[A, I, C]`, packed as the pipeline steps with it."""
        hidden = transformer.norm_out(hidden, temb[:, : transformer.inner_dim])
        out: torch.Tensor = transformer.proj_out(hidden)
        return out

    def stock_attention(self, transformer: Any) -> list[Any]:
        """Attention modules whose processor is the stock one."""
        return [
            block.attn
            for block in transformer.transformer_blocks
            if type(block.attn.processor) is QwenDoubleStreamAttnProcessor2_0
        ]

    def sparse_attention(
        self, transformer: Any, kwargs: Mapping[str, Any], rows: SparseRows
    ) -> AbstractContextManager[None]:
        """Our processor where the stock one sits."""
        return exchanged_processors(self.stock_attention(transformer), _SparseQwenProcessor, rows)


def _shapes(kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(frames, rows, columns) of the noise and of every reference image, the same for every row."""
    shapes = kwargs["img_shapes"]
    if any(shape != shapes[0] for shape in shapes):
        raise UnsupportedError(f"img_shapes must be the same for every image, got {shapes}")
    return shapes[0] if isinstance(shapes[0], list) else [shapes[0]]


class _SparseQwenProcessor(SparseProcessor):
    """Dense rows go through the stock processor, the others through ours.

    A prompt is padded to the longest of its batch. Image tokens come first here, so that neither their blocks nor what
    they see depend on the length of a neighbour's prompt; text that is not there comes last and is cut off.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Pair:
        """Same projections and norms as the stock processor; image and text `[R, N, D]`."""
        tokens = (hidden_states, encoder_hidden_states, encoder_hidden_states_mask)
        if self.is_foreign_thread():
            own: Pair = self.stock(attn, *tokens, attention_mask, image_rotary_emb)
            return own
        first = self.rows.num_dense
        sparse = self._attend(attn, *_some(tokens, slice(first, None)), image_rotary_emb)
        if not first:
            return sparse
        dense = self.stock(attn, *_some(tokens, slice(first)), attention_mask, image_rotary_emb)
        return torch.cat((dense[0], sparse[0])), torch.cat((dense[1], sparse[1]))

    def _attend(
        self,
        attn: Attention,
        image: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        positions: Pair,
    ) -> Pair:
        """The rows that are not dense. mask: bool `[R, T]`, which text tokens are there; None: all."""
        num_image, num_text = image.shape[1], text.shape[1]
        q, k, v = (_heads(attn, p, image) for p in (attn.to_q, attn.to_k, attn.to_v))
        text_q, text_k, text_v = (
            _heads(attn, p, text) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        q, k = (_rotate(x, n, positions[0]) for x, n in ((q, attn.norm_q), (k, attn.norm_k)))
        text_q = _rotate(text_q, attn.norm_added_q, positions[1])
        text_k = _rotate(text_k, attn.norm_added_k, positions[1])
        kv_len = None
        if mask is not None:
            # Keys know their positions already: any order will do.
            order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :, None, None]
            text_k, text_v = (torch.take_along_dim(x, order, dim=1) for x in (text_k, text_v))
            kv_len = num_image + mask.sum(1, dtype=torch.int32)
        q, k, v = (
            torch.cat(pair, dim=1).transpose(1, 2)
            for pair in ((q, text_q), (k, text_k), (v, text_v))
        )
        out = block_sparse(q, k, v, self.rows, num_image, num_text, kv_len)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        image, text = out[:, :num_image], out[:, num_image:]
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


def _some(tokens: Tokens, rows: slice) -> Tokens:
    image, text, mask = tokens
    return image[rows], text[rows], None if mask is None else mask[rows]


def _heads(attn: Attention, projection: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    """`[R, N, D]` to `[R, N, H, K]`."""
    heads: torch.Tensor = projection(x).unflatten(-1, (attn.heads, -1))
    return heads


def _rotate(x: torch.Tensor, norm: torch.nn.Module | None, positions: torch.Tensor) -> torch.Tensor:
    """Norm, then positions."""
    out: torch.Tensor = apply_rotary_emb_qwen(
        x if norm is None else norm(x), positions, use_real=False
    )
    return out

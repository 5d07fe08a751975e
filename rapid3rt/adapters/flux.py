# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 (dev, schnell, Kontext, Fill, Control): text tokens first, packed latents, double and single blocks.

The loop calls the diffusers blocks as they are, so LoRA, quantised linears and regional compilation keep working.
Noise tokens are those whose `img_ids[:, 0]` is 0 (Kontext appends reference images); noise channels are the first ones
(Fill and Control append conditions).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxMultiControlNetModel, FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from rapid3rt.adapters.attention import SparseProcessor, attend, exchanged_processors
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
from rapid3rt.adapters.packed import PackedAdapter
from rapid3rt.errors import UnsupportedError

_FORWARD = FluxTransformer2DModel.forward


class FluxAdapter(PackedAdapter):
    """Adapter of `FluxTransformer2DModel`."""

    family = "flux"
    attention_kwargs = "joint_attention_kwargs"
    widths: Widths = (
        ("encoder_hidden_states", "joint_attention_dim"),
        ("pooled_projections", "pooled_projection_dim"),
    )
    # img_ids and txt_ids are positions, the same for every row, whatever their first size happens to be.
    controlnet = ControlNetLayout(
        classes=(FluxControlNetModel, FluxMultiControlNetModel),
        outputs=("controlnet_block_samples", "controlnet_single_block_samples"),
        rows=(
            *("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance"),
            *("controlnet_cond", "controlnet_mode"),
        ),
        per_net=("controlnet_cond", "controlnet_mode"),
    )

    def supports(self, transformer: Any) -> bool:
        """Whether the transformer is a FLUX.1 one."""
        return is_model(transformer, FluxTransformer2DModel, _FORWARD)

    def is_few_step(self, pipe: Any) -> bool:
        """Of the models of this class, schnell alone has no guidance embedding."""
        return not pipe.transformer.config.guidance_embeds

    def resolution(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """From the position ids of the noise tokens."""
        return noise_grid(kwargs["img_ids"])

    def image_attention_share(self, transformer: Any, kwargs: Mapping[str, Any]) -> float:
        """Double and single blocks alike: 24 D^2 a token for linears, 4 D a pair for attention."""
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
        """Linear embedding of packed latents; modulation embedding from time, pooled text and, on dev, guidance."""
        image = transformer.x_embedder(take(kwargs["hidden_states"], rows))
        time = self.model_time(kwargs, timestep).to(image.dtype) * 1000  # the model multiplies back
        conditions = [take(kwargs["pooled_projections"], rows)]
        if kwargs.get("guidance") is not None:
            conditions.insert(0, take(kwargs["guidance"], rows).to(image.dtype) * 1000)
        return Embedded(image=image, temb=transformer.time_text_embed(time, *conditions))

    def run_blocks(
        self, transformer: Any, kwargs: Mapping[str, Any], embedded: Embedded, rows: torch.Tensor | None,
        timestep: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Double blocks, then single blocks; positions are the same for every row."""
        image = embedded.image
        text = transformer.context_embedder(take(kwargs["encoder_hidden_states"], rows))
        ids = torch.cat((plane(kwargs["txt_ids"]), plane(kwargs["img_ids"])))
        total = len(kwargs["hidden_states"])
        attention_kwargs = take_entries(kwargs.get(self.attention_kwargs), rows, total)
        if attention_kwargs is not None and IMAGE_PROMPTS in attention_kwargs:
            embeds = attention_kwargs.pop(IMAGE_PROMPTS)
            embeds = take_nested(embeds, rows, total)
            attention_kwargs["ip_hidden_states"] = transformer.encoder_hid_proj(embeds)
        positions = transformer.pos_embed(ids)
        double, single = (kwargs.get(name) for name in self.controlnet.outputs)
        repeats = kwargs.get("controlnet_blocks_repeat", False)
        for blocks, control, cycle in (
            (transformer.transformer_blocks, double, repeats),
            (transformer.single_transformer_blocks, single, False),
        ):
            for i, block in enumerate(blocks):
                text, image = block(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=embedded.temb,
                    image_rotary_emb=positions,
                    joint_attention_kwargs=attention_kwargs,
                )
                if control is not None:
                    num = len(control)
                    image = image + control[i % num if cycle else i // -(-len(blocks) // num)]
        return image

    def finish(
        self, transformer: Any, kwargs: Mapping[str, Any], hidden: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        """norm_out and proj_out: `[A, I, C]`, packed as the pipeline steps with it."""
        out: torch.Tensor = transformer.proj_out(transformer.norm_out(hidden, temb))
        return out

    def stock_attention(self, transformer: Any) -> list[Any]:
        """Attention modules of both kinds of blocks with the stock processor and unfused projections."""
        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        return [
            block.attn
            for block in blocks
            if type(block.attn.processor) is FluxAttnProcessor and not block.attn.fused_projections
        ]

    def sparse_attention(
        self, transformer: Any, kwargs: Mapping[str, Any], rows: SparseRows
    ) -> AbstractContextManager[None]:
        """Our processor where the stock one sits, in double and single blocks."""
        processor = partial(SparseFluxProcessor, num_text=kwargs["encoder_hidden_states"].shape[1])
        return exchanged_processors(self.stock_attention(transformer), processor, rows)


class SparseFluxProcessor(SparseProcessor):
    """Attention of FLUX.1 and of FLUX.2's double blocks, text first; FLUX.1's single blocks come joined already."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, rows: SparseRows, stock: Any, num_text: int) -> None:
        super().__init__(rows, stock)
        self._num_text = num_text

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Same projections, norms and order of tokens as the stock processor."""
        if attention_mask is not None or self.is_foreign_thread():
            own: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = self.stock(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return own
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, attn.head_dim))
            for p in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (
                p(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim)) for p in projections
            )
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
            q, k, v = (torch.cat(pair, dim=1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, self.rows, 0, self._num_text, partial(dense_attention, self.stock))
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        text, image = out[:, : self._num_text], out[:, self._num_text :]
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


def dense_attention(stock: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The attention of a stock processor, on the backend that its user chose; that takes `[R, N, H, K]`."""
    own = {"backend": stock._attention_backend, "parallel_config": stock._parallel_config}
    out: torch.Tensor = dispatch_attention_fn(*(x.transpose(1, 2) for x in (q, k, v)), **own)
    return out.transpose(1, 2)


def plane(ids: torch.Tensor) -> torch.Tensor:
    """Position ids `[N, axes]`, the same for every row; the models drop a batch dimension too."""
    return ids[0] if ids.ndim == 3 else ids


def noise_grid(img_ids: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens whose first position is 0: one host read, at the beginning of a run.

    img_ids: `[N, 3]` or more axes (image, row, column, ...), or a batch of them.
    """
    image, row, column, *_ = plane(img_ids).float().T.tolist()
    noise = [i for i, index in enumerate(image) if index == 0]
    # Where the first row ends is exact in any dtype; far from 0 half-precision positions fall together.
    columns = next((i for i in noise if row[i] != row[0]), max(len(noise), 1))
    is_grid = noise == list(range(len(noise))) and len(noise) % columns == 0
    if not is_grid or any(
        row[i] != row[i - i % columns] or column[i] != column[i % columns] for i in noise
    ):
        raise UnsupportedError(
            f"img_ids must list the noise tokens first and as a full grid, got {len(noise)} tokens, "
            f"{columns} of them in the first row"
        )
    return len(noise) // columns, columns

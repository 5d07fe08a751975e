# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 (dev, Klein): text tokens first, packed latents, double blocks, then single ones on the joined tokens.

The loop calls the diffusers blocks as they are, so LoRA, quantised linears and regional compilation keep working. All
blocks of a kind share one modulation. Noise tokens are those whose `img_ids[:, 0]` is 0; reference images are appended.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from rapid3rt.adapters.attention import SparseProcessor, attend, exchanged_processors
from rapid3rt.adapters.base import (
    NO_CONTROLNET,
    Embedded,
    SparseRows,
    Widths,
    is_model,
    take,
    take_entries,
)
from rapid3rt.adapters.flux import SparseFluxProcessor, dense_attention, noise_grid, plane
from rapid3rt.adapters.packed import PackedAdapter
from rapid3rt.errors import UnsupportedError

_FORWARD = Flux2Transformer2DModel.forward


class Flux2Adapter(PackedAdapter):
    """Adapter of `Flux2Transformer2DModel`."""

    family = "flux2"
    attention_kwargs = "joint_attention_kwargs"
    widths: Widths = (("encoder_hidden_states", "joint_attention_dim"),)
    controlnet = NO_CONTROLNET

    def supports(self, transformer: Any) -> bool:
        """Whether the transformer is a FLUX.2 one."""
        return is_model(transformer, Flux2Transformer2DModel, _FORWARD)

    def branches(
        self, pipe: Any, call: int, kwargs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Call 0: cond; call 1: uncond. The key-value cache of references is one for the whole batch: refused."""
        if kwargs.get("kv_cache_mode") is not None:
            raise UnsupportedError(
                f"kv_cache_mode must be None, got {kwargs['kv_cache_mode']!r}; use a pipeline that appends its "
                "reference images (Flux2KleinPipeline)"
            )
        return super().branches(pipe, call, kwargs, arguments)

    def mu(self, arguments: Mapping[str, Any], mu: float | None, steps: int) -> float | None:
        """The pipelines shift by the size of the image and by the number of steps."""
        return None if mu is None else compute_empirical_mu(arguments["image_seq_len"], steps)

    def resolution(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """From the position ids of the noise tokens."""
        return noise_grid(kwargs["img_ids"])

    def image_attention_share(self, transformer: Any, kwargs: Mapping[str, Any]) -> float:
        """Double and single blocks alike: 4 D a pair for attention, and for linears 8 D^2 and a gated MLP a token."""
        image, text = kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1]
        tokens, width = image + text, transformer.inner_dim
        linears = (8 + 6 * transformer.config.mlp_ratio) * width**2 * tokens
        return float(4 * width * image**2 / (4 * width * tokens**2 + linears))

    def embed(
        self,
        transformer: Any,
        kwargs: Mapping[str, Any],
        timestep: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> Embedded:
        """Linear embedding of packed latents; modulation embedding from time and, on dev, guidance."""
        hidden, guidance = take(kwargs["hidden_states"], rows), kwargs.get("guidance")
        time = (
            self.model_time(kwargs, timestep).to(hidden.dtype) * 1000
        )  # the model multiplies back
        if guidance is not None:
            guidance = take(guidance, rows).to(hidden.dtype) * 1000
        temb = transformer.time_guidance_embed(time, guidance)
        return Embedded(image=transformer.x_embedder(hidden), temb=temb)

    def run_blocks(
        self, transformer: Any, kwargs: Mapping[str, Any], embedded: Embedded, rows: torch.Tensor | None,
        timestep: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Double blocks, then single blocks; positions are the same for every row."""
        image, temb = embedded.image, embedded.temb
        text = transformer.context_embedder(take(kwargs["encoder_hidden_states"], rows))
        num_text = text.shape[1]
        ids = (transformer.pos_embed(plane(kwargs[name])) for name in ("txt_ids", "img_ids"))
        shared = {
            "image_rotary_emb": tuple(torch.cat(pair) for pair in zip(*ids, strict=True)),
            "joint_attention_kwargs": take_entries(
                kwargs.get(self.attention_kwargs), rows, len(kwargs["hidden_states"])
            ),
        }
        modulation = {
            "temb_mod_img": transformer.double_stream_modulation_img(temb),
            "temb_mod_txt": transformer.double_stream_modulation_txt(temb),
        }
        for block in transformer.transformer_blocks:
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, **modulation, **shared
            )
        joined, single = torch.cat((text, image), dim=1), transformer.single_stream_modulation(temb)
        for block in transformer.single_transformer_blocks:
            joined = block(
                hidden_states=joined, encoder_hidden_states=None, temb_mod=single, **shared
            )
        return joined[:, num_text:]

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
            if type(block.attn.processor) in (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)
            and not getattr(block.attn, "fused_projections", False)
        ]

    def sparse_attention(
        self, transformer: Any, kwargs: Mapping[str, Any], rows: SparseRows
    ) -> AbstractContextManager[None]:
        """Our processors where the stock ones sit, in double and single blocks."""
        num_text = kwargs["encoder_hidden_states"].shape[1]

        def processor(rows: SparseRows, stock: Any) -> SparseProcessor:
            is_double = type(stock) is Flux2AttnProcessor
            return (SparseFluxProcessor if is_double else _SparseParallelProcessor)(
                rows, stock, num_text
            )

        return exchanged_processors(self.stock_attention(transformer), processor, rows)


class _SparseParallelProcessor(SparseProcessor):
    """Attention of single blocks: text and image joined, one linear for queries, keys, values and the MLP."""

    def __init__(self, rows: SparseRows, stock: Any, num_text: int) -> None:
        super().__init__(rows, stock)
        self._num_text = num_text

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        """Same projections, norms and order of tokens as the stock processor."""
        if attention_mask is not None or self.is_foreign_thread():
            own: torch.Tensor = self.stock(attn, hidden_states, attention_mask, image_rotary_emb)
            return own
        sizes = [attn.inner_dim] * 3 + [attn.mlp_hidden_dim * attn.mlp_mult_factor]
        *qkv, mlp = attn.to_qkv_mlp_proj(hidden_states).split(sizes, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv)
        q, k = (
            apply_rotary_emb(x, image_rotary_emb, sequence_dim=1)
            for x in (attn.norm_q(q), attn.norm_k(k))
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = attend(q, k, v, self.rows, 0, self._num_text, partial(dense_attention, self.stock))
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        joined: torch.Tensor = attn.to_out(torch.cat((out, attn.mlp_act_fn(mlp)), dim=-1))
        return joined

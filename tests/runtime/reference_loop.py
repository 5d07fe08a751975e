# SPDX-License-Identifier: Apache-2.0
"""The definition of an accelerated SD3 run: one image, one guidance branch at a time, float32, slow.

Written from METHOD.md (section 1) and DESIGN.md (sections 3 to 5) alone. It owns no batching, no plan and no cache
slots, and must never import the runtime: what the runtime shares with it is its input, the decisions, and its output.
`test_reference_loop.py` compares the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

from rapid3rt.ops import reference
from rapid3rt.planning.sparsity import kept_blocks
from rapid3rt.types import ADAMS_BASHFORTH, EULER

MAX_STEP_RATIO = 8.0  # of a step of order 2 to the one before it (METHOD.md, section 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is answered for one image at one tick."""

    next_sigma: float
    reuse: bool = False
    level: int = 0
    order: int = EULER


Script = tuple[Decision, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image before its first tick.

    latents: `[1, C, h, w]`. prompts: text `[1, T, D]` and pooled text of each guidance branch: the unconditional and
    the conditional one under classifier-free guidance, else the conditional one alone.
    """

    latents: torch.Tensor
    prompts: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(slots=True, kw_only=True)
class Visit:
    """One tick: where the image stood, what it saw there. latents, velocity, reference: `[1, C, h, w]`."""

    sigma: torch.Tensor
    latents: torch.Tensor
    computed: bool
    velocity: torch.Tensor
    reference: torch.Tensor
    drift: float


@dataclass(slots=True)
class Walk:
    """A whole run of one image."""

    latents: torch.Tensor
    visits: list[Visit] = field(default_factory=list)

    @property
    def nfe(self) -> int:
        """Ticks in which the image computed, whatever the number of branches."""
        return sum(visit.computed for visit in self.visits)


@torch.no_grad()
def denoise(
    transformer: Any, image: Image, script: Script, *, sigma: float, ticks: int, guidance: float
) -> Walk:
    """Denoise one image from `sigma` by its script, in at most `ticks` ticks."""
    x, now = image.latents, torch.tensor(sigma)
    walk = Walk(x)
    residuals: dict[int, torch.Tensor] = {}
    computed: list[tuple[torch.Tensor, torch.Tensor]] = []  # sigma and guided velocity
    reference_latents = reference_embedded = x
    for tick, decision in enumerate(script):
        is_compute = tick == 0 or not decision.reuse
        outputs = []
        for branch, (text, pooled) in enumerate(image.prompts):
            embedded = transformer.pos_embed(x)
            temb = transformer.time_text_embed(now[None] * 1000, pooled)
            if is_compute:
                tokens = run_blocks(transformer, embedded, text, temb, decision.level)
                residuals[branch] = tokens - embedded
            else:
                tokens = embedded + residuals[branch]
            outputs.append(project(transformer, tokens, temb, x))
        velocity = outputs[-1]
        if len(outputs) == 2:
            velocity = outputs[0] + guidance * (outputs[1] - outputs[0])
        drift = 0.0
        if tick > 0:
            change = (embedded - reference_embedded).abs().mean()
            drift = float(change / reference_embedded.abs().mean())
        before = reference_latents
        if is_compute:
            computed.append((now, velocity))
            reference_latents, reference_embedded = x, embedded
        walk.visits.append(
            Visit(
                sigma=now,
                latents=x,
                computed=is_compute,
                velocity=velocity,
                reference=before,
                drift=drift,
            )
        )
        end = 0.0 if tick == ticks - 1 else decision.next_sigma
        following = torch.tensor(end).clamp(torch.zeros(()), now)
        direction = velocity
        if decision.order == ADAMS_BASHFORTH and len(computed) >= 2:
            direction = second_order(computed, now, following, velocity, is_compute)
        x = x + (following - now) * direction
        now = following
        if now == 0:
            break
    assert now == 0, "a script must end at 0, or fill every tick"
    walk.latents = x
    return walk


def second_order(
    computed: list[tuple[torch.Tensor, torch.Tensor]],
    now: torch.Tensor,
    following: torch.Tensor,
    velocity: torch.Tensor,
    is_compute: bool,
) -> torch.Tensor:
    """The mean velocity over the step from `now` to `following`, from the last two *computed* velocities."""
    (sigma_p, v_p), (sigma_c, v_c) = computed[-2:]
    d = following - now
    if is_compute:
        ratio = (d / (now - sigma_p)).clamp_max(MAX_STEP_RATIO)
        return velocity + ratio / 2 * (velocity - v_p)
    ahead, gap = now + d / 2 - sigma_c, sigma_c - sigma_p
    # As far as a computed tick would reach at the cap: half a step of 8 times the gap.
    limit = (MAX_STEP_RATIO / 2 * gap).abs()
    return v_c + ahead.clamp(-limit, limit) * (v_c - v_p) / gap


def run_blocks(
    transformer: Any, img: torch.Tensor, txt: torch.Tensor, temb: torch.Tensor, level: int
) -> torch.Tensor:
    """Image tokens behind the last block; every attention of every block at one sparsity level, 0 is dense."""
    txt = transformer.context_embedder(txt)
    processor = BlockSparse(level) if level else JointAttnProcessor2_0()
    for block in transformer.transformer_blocks:
        for attention in (block.attn, block.attn2):
            if attention is not None:
                attention.set_processor(processor)
        txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=temb)
    return img


def project(
    transformer: Any, img: torch.Tensor, temb: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Final norm and projection; for patches of one pixel a token is a pixel."""
    assert transformer.config.patch_size == 1
    velocity: torch.Tensor = transformer.proj_out(transformer.norm_out(img, temb))
    return velocity.mT.reshape(like.shape)


class BlockSparse:
    """Attention in which an image query block sees the best image key blocks, and all text where there is text."""

    def __init__(self, level: int, block: int = 32) -> None:
        self.level, self.block = level, block

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        img, txt = hidden_states, encoder_hidden_states
        q = _heads(attn, attn.to_q(img), attn.norm_q)
        k = _heads(attn, attn.to_k(img), attn.norm_k)
        v = _heads(attn, attn.to_v(img), None)
        if txt is not None:  # follows the image
            q = torch.cat([q, _heads(attn, attn.add_q_proj(txt), attn.norm_added_q)], dim=2)
            k = torch.cat([k, _heads(attn, attn.add_k_proj(txt), attn.norm_added_k)], dim=2)
            v = torch.cat([v, _heads(attn, attn.add_v_proj(txt), None)], dim=2)
        num_img = img.shape[1]
        out = self.attend(q, k, v, num_img).transpose(1, 2).flatten(2)
        seen = attn.to_out[0](out[:, :num_img])
        if txt is None:
            return seen  # type: ignore[no-any-return]
        told = out[:, num_img:]
        return seen, told if attn.context_pre_only else attn.to_add_out(told)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_img: int
    ) -> torch.Tensor:
        num_txt = q.shape[2] - num_img
        # The block in which text begins is a text block; without text the last block, full or not, is the image's.
        image_blocks = num_img // self.block if num_txt else math.ceil(num_img / self.block)
        keep = torch.tensor([kept_blocks(self.level, image_blocks)], dtype=torch.int32)
        blocks, scale = (self.block, self.block), q.shape[-1] ** -0.5
        lists = reference.build_block_lists(q, k, keep, num_img, num_txt, *blocks, scale)
        out, _ = reference.block_sparse_attention(q, k, v, *lists, None, *blocks, scale)
        return out


def _heads(attn: Any, tokens: torch.Tensor, norm: Any) -> torch.Tensor:
    """`[1, N, H K]` to `[1, H, N, K]`, normalised where the model does so."""
    heads: torch.Tensor = tokens.unflatten(2, (attn.heads, -1)).transpose(1, 2)
    if norm is not None:
        heads = norm(heads)
    return heads

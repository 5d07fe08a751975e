# SPDX-License-Identifier: Apache-2.0
"""Inputs of block-sparse attention: geometries, packed heads, and lists made from which block sees which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Geometry of an attention case: image tokens first, then text."""

    rows: int
    heads: int
    image: int
    text: int
    head_dim: int
    block: int

    @property
    def tokens(self) -> int:
        """N, joint tokens."""
        return self.image + self.text

    @property
    def blocks(self) -> int:
        """Blocks of the joint tokens."""
        return -(-self.tokens // self.block)

    @property
    def text_blocks(self) -> int:
        """Blocks that touch a text token."""
        return self.blocks - self.image // self.block if self.text else 0

    def __str__(self) -> str:
        return f"R{self.rows} H{self.heads} N{self.image}+{self.text} K{self.head_dim} block {self.block}"


def packed_heads(
    g: torch.Generator, dtype: torch.dtype, geometry: Heads
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v `[R, H, N, K]` as views of one packed projection, the layout of diffusers."""
    shape = (geometry.rows, geometry.tokens, 3, geometry.heads, geometry.head_dim)
    q, k, v = torch.randn(shape, generator=g).to(dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


def lists_of(listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a mask of blocks, bool `[R, H, Mq, Mk]`, into count and ascending index; beyond count, the other blocks."""
    count = listed.sum(-1, dtype=torch.int32)
    index = torch.argsort((~listed).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    return count, index


def random_lists(
    g: torch.Generator, geometry: Heads, density: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bernoulli lists: count, index with garbage beyond count, and a random permutation as order."""
    shape = (geometry.rows, geometry.heads, geometry.blocks, geometry.blocks)
    count, index = lists_of(torch.rand(shape, generator=g) < density)
    index[~_in_list(count, index)] = 2**31 - 1
    order = torch.randperm(count.numel(), generator=g).to(torch.int32)
    return count, index, order


def text_lists(
    g: torch.Generator, geometry: Heads, density: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists as `build_block_lists` makes them, of random image blocks: count, index, order.

    density: computed over all pairs of blocks, those of text included; met as far as whole blocks go.
    """
    blocks, text = geometry.blocks, geometry.text_blocks
    image = blocks - text
    spent = blocks * text + image * text
    pairs = min(max(round(density * blocks**2) - spent, 0), image**2)
    keep = torch.full((image,), pairs // image)
    keep[torch.randperm(image, generator=g)[: pairs % image]] += 1
    luck = torch.rand((geometry.rows, geometry.heads, image, image), generator=g)
    listed = torch.ones((geometry.rows, geometry.heads, blocks, blocks), dtype=torch.bool)
    listed[:, :, :image, :image] = luck.argsort(-1).argsort(-1) < keep[:, None]
    count, index = lists_of(listed)
    order = torch.argsort(-count.flatten(), stable=True).to(torch.int32)
    return count, index, order


def listed_mask(arguments: tuple[Any, ...]) -> torch.Tensor:
    """Which key blocks each query block of a `block_sparse_attention` call sees: bool `[R, H, Mq, Mk]`.

    Dense heads see all, skipped ones none.
    """
    q, k, _, mode, count, index, _, _, block_q, block_kv = arguments[:10]
    blocks_q, blocks_kv = -(-q.shape[2] // block_q), -(-k.shape[2] // block_kv)
    seen: torch.Tensor = (mode == 0)[..., None, None].expand(*mode.shape, blocks_q, blocks_kv)
    if count is None:
        return seen
    beyond = torch.where(_in_list(count, index), index, blocks_kv).long()
    listed = torch.zeros(*count.shape, blocks_kv + 1, dtype=torch.bool, device=k.device)
    listed.scatter_(-1, beyond, True)
    chosen: torch.Tensor = listed[..., :blocks_kv] & (mode == 1)[..., None, None]
    return seen | chosen


def listed_flops(arguments: tuple[Any, ...]) -> int:
    """Arithmetic of a `block_sparse_attention` call, 4 K for each pair of a query and a key that it sees."""
    q, k, *_ = arguments
    block_q, block_kv = arguments[8:10]
    sizes_q, sizes_kv = (
        torch.tensor([min(block, n - b) for b in range(0, n, block)], device=q.device)
        for n, block in ((q.shape[2], block_q), (k.shape[2], block_kv))
    )
    pairs = listed_mask(arguments) * sizes_q[:, None] * sizes_kv
    return int(4 * q.shape[3] * pairs.sum())


def _in_list(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return torch.arange(index.shape[-1], device=index.device) < count[..., None]

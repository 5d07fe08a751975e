# SPDX-License-Identifier: Apache-2.0
"""The definition of an accelerated run with packed latents: one image, one guidance branch at a time, float32, slow.

A computed tick goes through the plain forward of diffusers, at a sparse level with another attention function under the
stock processors; a reused one adds to the embedded latents what the block stack added to them at the last compute.
Nothing of the runtime is used here; prompts are as long as they are, without padding and mask.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from rapid3rt.ops import reference
from rapid3rt.planning.sparsity import kept_blocks
from rapid3rt.types import COMPUTE, REUSE, ComputeDecision, DenoiseState, Run, StepDecision

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Word:
    """What one image is told at each tick: c(ompute), r(euse) or compute at level 1 to 3; a sigma or grid index."""

    actions: str
    targets: tuple[float | int, ...]

    def sigma(self, tick: int, grid: Sequence[float]) -> float:
        target = self.targets[tick]
        return grid[target] if isinstance(target, int) else target


ON_GRID = (1, 2, 3, 4, 5, 6)
WORDS = (
    Word("crcrcr", ON_GRID),
    Word("c2r31r", ON_GRID),
    Word("cccccc", ON_GRID),
    Word("crc", (0.61, 0.2, 0.0)),
    Word("3", (0.0,)),
    Word("crr1cr", (0.97, 0.8, 0.6, 5, 0.01, 0.0)),
)
TICKS = 6


class Scripted:
    """A policy by which every image plays its own word.

    latents: what it saw at the first tick. at_done: the largest velocity that it saw of a finished image; NaN counts.
    """

    name = "scripted"

    def __init__(self, words: Sequence[Word]) -> None:
        self.words = words
        self.grid: tuple[float, ...] = ()
        self.latents = self.at_done = torch.zeros(())

    def begin(self, run: Run) -> None:
        assert (run.images, run.ticks) == (len(self.words), TICKS)
        self.grid = run.sigmas

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        if state.tick == 0:
            self.latents = state.latents
        now = [word.actions[state.tick : state.tick + 1] for word in self.words]
        action = torch.tensor([REUSE if a == "r" else COMPUTE for a in now], dtype=torch.int8)
        levels = torch.tensor([int(a) if a.isdigit() else 0 for a in now], dtype=torch.int32)
        return ComputeDecision(action=action, sparsity=levels)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        done = state.done.view(-1, 1, 1, 1)
        self.at_done = torch.maximum(self.at_done, velocity.abs().where(done, 0).max())
        sigmas = [
            word.sigma(state.tick, self.grid) if state.tick < len(word.targets) else 0.0
            for word in self.words
        ]
        return StepDecision(next_sigma=torch.tensor(sigmas))


@dataclass
class Model(abc.ABC):
    """A plain transformer for one image.

    prompts: text `[1, T, D]` of each branch. module: where its processors find their attention function. text_first:
    whether blocks of tokens are counted from the text. references: tokens `[1, N, C]` behind the noise.
    """

    transformer: Any
    prompts: list[torch.Tensor]
    module: Any
    text_first: bool
    references: torch.Tensor
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)

    @abc.abstractmethod
    def arguments(self, branch: int, sigma: float) -> dict[str, Any]:
        """Of the forward, but for the tokens."""

    @abc.abstractmethod
    def embed(self, tokens: torch.Tensor) -> torch.Tensor: ...

    @abc.abstractmethod
    def temb(self, tokens: torch.Tensor, sigma: float) -> torch.Tensor: ...

    @abc.abstractmethod
    def combine(self, velocities: list[torch.Tensor]) -> torch.Tensor:
        """Guidance."""

    def compute(self, branch: int, x: torch.Tensor, sigma: float, level: int) -> torch.Tensor:
        tokens, seen = torch.cat([x, self.references], dim=1), list[torch.Tensor]()
        handle = self.transformer.norm_out.register_forward_pre_hook(
            lambda _module, arguments: seen.append(arguments[0])
        )
        attention = Sparse(level, tokens.shape[1], self.text_first)
        own = self.module.dispatch_attention_fn
        with mock.patch.object(self.module, "dispatch_attention_fn", attention if level else own):
            velocity: torch.Tensor = self.transformer(
                hidden_states=tokens, **self.arguments(branch, sigma), return_dict=False
            )[0]
        handle.remove()
        assert not level or attention.calls
        self.residuals[branch] = seen[0] - self.embed(tokens)
        return velocity[:, : x.shape[1]]

    def reuse(self, branch: int, x: torch.Tensor, sigma: float) -> torch.Tensor:
        tokens = torch.cat([x, self.references], dim=1)
        hidden = self.embed(tokens) + self.residuals[branch]
        hidden = self.transformer.norm_out(hidden, self.temb(tokens, sigma))
        velocity: torch.Tensor = self.transformer.proj_out(hidden)
        return velocity[:, : x.shape[1]]


@torch.no_grad()
def denoise(model: Model, latents: torch.Tensor, word: Word, grid: Sequence[float]) -> torch.Tensor:
    """Latents `[1, I, C]` of one image by its word."""
    x, now = latents, grid[0]
    for tick, action in enumerate(word.actions):
        level = int(action) if action.isdigit() else 0
        velocity = model.combine(
            [
                model.reuse(branch, x, now)
                if action == "r"
                else model.compute(branch, x, now, level)
                for branch in range(len(model.prompts))
            ]
        )
        following = word.sigma(tick, grid)
        assert following < now
        x, now = x + (following - now) * velocity, following
    assert now == 0
    return x


@dataclass
class Sparse:
    """Attention in which an image query block sees the best image key blocks, and all text; `[1, N, H, K]`."""

    level: int
    num_image: int
    text_first: bool
    calls: int = 0

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: None = None, **_: Any
    ) -> torch.Tensor:
        assert attn_mask is None
        self.calls += 1
        num_text = q.shape[1] - self.num_image
        turn = 0 if self.text_first else num_text  # the models join text and image in this order
        q, k, v = (x.roll(-turn, 1).transpose(1, 2) for x in (q, k, v))
        text = num_text if self.text_first else self.num_image
        touched = -(-num_text // BLOCK) if self.text_first else 0
        image_blocks = -(-q.shape[2] // BLOCK) - touched if self.text_first else text // BLOCK
        keep = torch.tensor([kept_blocks(self.level, image_blocks)], dtype=torch.int32)
        start, scale = 0 if self.text_first else self.num_image, q.shape[-1] ** -0.5
        lists = reference.build_block_lists(q, k, keep, start, num_text, BLOCK, BLOCK, scale)
        out, _ = reference.block_sparse_attention(q, k, v, *lists, None, BLOCK, BLOCK, scale)
        return out.transpose(1, 2).roll(turn, 1)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest value."""
    return float((got - want).abs().max() / want.abs().max())

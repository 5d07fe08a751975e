# SPDX-License-Identifier: Apache-2.0
"""The network of a policy head: what it sees of an image, and three layers on it (METHOD.md, section 2).

A head sees a latent grid (the observation), the model's own modulation embedding, and a few scalars. It works at any
latent size: train at a low resolution, serve at a high one.

Shape letters: B images, C latent channels, D model width, S scalars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rapid3rt.policies.base import interpolate

OBSERVED_SIDE = 16
"""Cells per side that a head sees of a small model's latents, at most."""


def observe(x: torch.Tensor, side: int | None) -> torch.Tensor:
    """What heads read and trajectories store: `[B, C, h, w]` averaged to at most side x side, in bfloat16.

    Serving rounds as training does, so that a stored observation gives the decision that was taken.
    """
    x = x.float()
    if side is not None and max(x.shape[2:]) > side:
        x = F.adaptive_avg_pool2d(x, (min(x.shape[2], side), min(x.shape[3], side)))
    return x.bfloat16()


def with_validity(scalars: Sequence[torch.Tensor | None], images: int) -> torch.Tensor:
    """Scalars and a flag beside each: float32 `[B, 2 S]`. None, or a value that is not finite, is 0 with flag 0."""
    device = next((s.device for s in scalars if s is not None), None)
    unknown = torch.full((images,), float("nan"), device=device)
    values = torch.stack([unknown if s is None else s.float() for s in scalars], 1)
    valid = values.isfinite()
    return torch.cat([torch.where(valid, values, 0.0), valid.float()], 1)


class Head(nn.Module):
    """Convolution, adaptive norm, strided convolution, mean and max over the grid, linear layer.

    The norm is over the whole grid of an image. It takes the magnitude of the observation away, which the scalars bring
    back; their embedding and that of the conditioning make its scale and shift.

    Parameters
    ----------
    channels, conditioning: C and D. outputs: numbers per image. num_scalars: S, without their flags.
    bias: of the outputs; without one they start at exactly 0, whatever is seen: a residual that adds nothing yet.
    """

    def __init__(
        self,
        channels: int,
        conditioning: int,
        outputs: int,
        *,
        width: int = 128,
        num_scalars: int = 0,
        bias: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width, affine=False)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(conditioning, 2 * width))
        self.scalars = (
            nn.Sequential(nn.Linear(2 * num_scalars, width), nn.SiLU(), nn.Linear(width, 2 * width))
            if num_scalars
            else None
        )
        self.reduce = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.decide = nn.Linear(2 * width, outputs)
        nn.init.zeros_(self.decide.weight)
        nn.init.zeros_(self.decide.bias)
        if bias is not None:
            nn.init.normal_(self.decide.weight, std=0.01)
            with torch.no_grad():
                self.decide.bias.copy_(torch.tensor(bias))

    def forward(
        self,
        observation: torch.Tensor,
        conditioning: torch.Tensor,
        scalars: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of `observe`, `[B, D]` and `with_validity`: float32 `[B, outputs]`, whatever the types given."""
        modulation = self.modulate(conditioning.float())
        if self.scalars is not None:
            modulation = modulation + self.scalars(scalars)
        scale, shift = modulation[:, :, None, None].chunk(2, 1)
        x = self.norm(self.project(observation.float()))
        x = F.silu(x * (1 + scale) + shift)
        x = F.silu(self.reduce(x)).flatten(2)
        decided: torch.Tensor = self.decide(torch.cat([x.mean(2), x.amax(2)], 1))
        return decided


class AllocationHead(nn.Module):
    """How much more than others an image needs, from the conditioning alone: linear, and stronger at larger budgets.

    What makes an image hard is in its caption: on the tiny SD3 a linear map of the modulation embedding explains 74 %
    of the variance of log error between held-out pairs, and the image's own early velocities add nothing to it. A few
    hundred pairs fit so few numbers. The log of what a plan is multiplied by is s(b) times the hardness plus o(b), both
    linear between the dials that they were fitted at.

    conditioning: D; its mean and spread over the training pairs are kept beside the weights. dials: rising.
    """

    def __init__(self, conditioning: int, dials: Sequence[float]) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.spread: torch.Tensor
        self.dials: torch.Tensor
        self.register_buffer("mean", torch.zeros(conditioning))
        self.register_buffer("spread", torch.ones(conditioning))
        self.register_buffer("dials", torch.tensor([float(dial) for dial in dials]))
        self.hardness = nn.Linear(conditioning, 1, bias=False)
        nn.init.zeros_(self.hardness.weight)
        self.strength = nn.Parameter(torch.zeros(len(dials)))
        self.offset = nn.Parameter(torch.zeros(len(dials)))

    def forward(self, conditioning: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
        """conditioning: `[B, D]`. dial: b, float32 `[B]`. Returns the log of the stretch, float32 `[B]`."""
        hardness: torch.Tensor = self.hardness((conditioning.float() - self.mean) / self.spread)
        strength = interpolate(dial, self.dials, self.strength)
        offset = interpolate(dial, self.dials, self.offset)
        return strength * hardness.squeeze(1) + offset

    def level(self, dials: Sequence[float]) -> None:
        """Give all images the same at some of the dials that it was fitted at, in place."""
        chosen = torch.isin(self.dials, self.dials.new_tensor(list(dials)))
        with torch.no_grad():
            self.strength.masked_fill_(chosen, 0.0)
            self.offset.masked_fill_(chosen, 0.0)

    def is_level(self, dial: float) -> bool:
        """Whether all images get the same at a mean of `dial`: that mean."""
        dials, at = self.dials.cpu(), torch.tensor([dial])
        parts = (self.strength.detach().cpu(), self.offset.detach().cpu())
        return all(float(interpolate(at, dials, part)) == 0 for part in parts)


def count_parameters(heads: Mapping[str, nn.Module] | nn.Module) -> int:
    """Numbers that training changes."""
    modules = heads.values() if isinstance(heads, Mapping) else [heads]
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

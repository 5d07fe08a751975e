# SPDX-License-Identifier: Apache-2.0
"""The trained part of the discriminator and its loss: an adapter on frozen features, cross-entropy, R1.

Shape letters: B pictures, N tokens, W width of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MAX_PARAMETERS = 1_000_000
_LEAST_SHARE = 0.1


class Head(nn.Module):
    """Standardise, project every token to `hidden`, pool over tokens, two linear layers: one logit per picture.

    Above 0 it says "full", below 0 "accelerated". The standardisation is part of the head: there is one way from
    features to logits, in training and in scoring.

    Raises ValueError for features so wide that the head would have a million parameters.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.adapter = _linear(width, hidden, generator)
        self.mix = _linear(2 * hidden, hidden, generator)
        self.logit = _linear(hidden, 1, generator)
        count = sum(p.numel() for p in self.parameters())
        if count >= MAX_PARAMETERS:
            msg = f"hidden must leave the head below {MAX_PARAMETERS:,} parameters at features of width {width}"
            raise ValueError(f"{msg}, got {hidden}: {count:,}")

    def standardise(self, real: torch.Tensor) -> None:
        """Fix mean and scale to those of the first full pictures' features, `[B, W]` or `[B, N, W]`.

        A scale is at least a tenth of the scales' root mean square: a feature that was constant in the first pictures
        must not outweigh all others as soon as it moves. Where nothing varies, scales are 1.
        """
        rows = real.flatten(0, -2)
        spread = rows.std(0, correction=0)
        least = _LEAST_SHARE * spread.square().mean().sqrt()
        self.mean.copy_(rows.mean(0))
        self.scale.copy_(spread.clamp(min=least) if least > 0 else torch.ones_like(spread))

    def normalised(self, features: torch.Tensor) -> torch.Tensor:
        """Features as the head sees them; of the same shape."""
        return (features - self.mean) / self.scale

    def forward(self, normalised: torch.Tensor) -> torch.Tensor:
        """Logits, float32 `[B]`, of normalised features `[B, W]` or `[B, N, W]`."""
        tokens = normalised[:, None] if normalised.ndim == 2 else normalised
        x = F.silu(self.adapter(tokens))
        x = torch.cat([x.mean(1), x.amax(1)], 1)
        logit: torch.Tensor = self.logit(F.silu(self.mix(x)))
        return logit.squeeze(1)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """As torch draws it, but from a generator of its own: the global one is nobody's to move."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    for parameter in (layer.weight, layer.bias):
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def cross_entropy(real: torch.Tensor, fake: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Mean binary cross-entropy of logits `[B]` of full and accelerated pictures, both classes of equal weight.

    Targets are 1 - smoothing / 2 and smoothing / 2. Equals the mean of softplus(-l) + smoothing / 2 l over full and
    of softplus(l) - smoothing / 2 l over accelerated pictures.
    """
    off = smoothing / 2
    return ((F.softplus(-real) + off * real).mean() + (F.softplus(fake) - off * fake).mean()) / 2


def r1(logits: torch.Tensor, normalised: torch.Tensor) -> torch.Tensor:
    """Mean over pictures of the squared norm of the logit's gradient in the normalised features, differentiable.

    logits: `[B]`, made from `normalised`, which requires a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), normalised, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean()

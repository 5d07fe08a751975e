# SPDX-License-Identifier: Apache-2.0
"""Random decisions of learned policies, and what they were worth: log-probability and entropy.

The noise of every image is drawn from its own seed before a run, a fixed number of values per tick, and shaped into
decisions on the device. So a decision depends on (seed, tick) and on what the heads said, never on the batch, on other
heads or on what was decided before, and nothing is read back.

Shape letters: B images, T ticks, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributions import Beta

_TRIES = 8
"""Of the rejection method below, whose every try is taken with at least 0.95: none is in 1 of 2.5e10 draws."""
_CHOICES = 3
_SMALLEST_RATIO = 1e-3


class Noise:
    """Noise of one run. seeds: one per image, 0 to 2^63 - 1."""

    def __init__(self, seeds: Sequence[int], ticks: int, device: torch.device) -> None:
        normals, uniforms = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            normals.append(torch.randn(ticks, 2, _TRIES, generator=generator))
            uniforms.append(torch.rand(ticks, 2 * _TRIES + _CHOICES, generator=generator))
        self._normals = torch.stack(normals, 1).to(device)
        self._uniforms = torch.stack(uniforms, 1).to(device)

    def ratio(self, tick: int, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """Draw from Beta(alpha, beta), both float32 `[B]` of at least 1. Returns float32 `[B]`."""
        uniforms = self._uniforms[tick, :, : 2 * _TRIES].unflatten(1, (2, _TRIES))
        both = sample_gamma(torch.stack([alpha, beta], 1), self._normals[tick], uniforms)
        return clamp_ratio(both[:, 0] / both.sum(1))

    def choice(self, tick: int, head: int, logits: torch.Tensor) -> torch.Tensor:
        """Draw an action of a categorical head, 0 to 2, with logits `[B, A]`. Returns int64 `[B]`."""
        uniform = self._uniforms[tick, :, 2 * _TRIES + head, None]
        below = logits.softmax(1).cumsum(1)[:, :-1] <= uniform
        return below.sum(1)


def sample_gamma(
    shape: torch.Tensor, normals: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """Gamma variates of rate 1 by the method of Marsaglia and Tsang (2000).

    shape: `[...]`, at least 1. normals, uniforms: `[..., tries]`, of which the first pair that is accepted counts;
    where none is, the mode of the proposal stands in.
    """
    d = shape - 1 / 3
    cube = (1 + normals / (9 * d).sqrt()[..., None]) ** 3
    bound = normals.square() / 2 + d[..., None] * (1 - cube + cube.clamp(min=1e-30).log())
    accepted = (cube > 0) & (uniforms.clamp(min=1e-30).log() < bound)
    first = accepted.to(torch.uint8).argmax(-1, keepdim=True)
    taken = torch.where(accepted.any(-1), cube.gather(-1, first).squeeze(-1), 1.0)
    return d * taken


def clamp_ratio(ratio: torch.Tensor) -> torch.Tensor:
    """Keep a step within what a log-probability can be trusted for."""
    return ratio.clamp(_SMALLEST_RATIO, 1 - _SMALLEST_RATIO)


def beta_mode(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Where Beta(alpha, beta) is densest, alpha and beta above 1; the middle where both are 1."""
    a, b = alpha - 1, beta - 1
    return clamp_ratio(torch.where(a + b > 0, a / (a + b).clamp(min=1e-30), 0.5))


def beta_log_prob(ratio: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Log density of a ratio in nat; in float64, for alpha and beta reach thousands."""
    distribution = Beta(alpha.double(), beta.double(), validate_args=False)
    log_prob: torch.Tensor = distribution.log_prob(ratio.double())
    return log_prob.float()


def beta_entropy(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Differential entropy in nat: 0 for the uniform distribution, negative for all others."""
    entropy: torch.Tensor = Beta(alpha.double(), beta.double(), validate_args=False).entropy()
    return entropy.float()


def choice_log_prob(action: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Log-probability in nat of int64 actions `[B]` under logits `[B, A]`."""
    return logits.log_softmax(1).gather(1, action[:, None]).squeeze(1)


def choice_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nat, `[B]`."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)

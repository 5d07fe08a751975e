# SPDX-License-Identifier: Apache-2.0
"""The formulas of the trainer, each a pure function (METHOD.md, sections 3 and 5).

Shape letters: P groups (one prompt, noise and dial each), G members of a group, N decisions of one head, A actions.
Rewards, advantages and log-probabilities are float32 whatever the generator uses. A member whose reward is NaN is
missing: it is in no mean, no standard deviation and no loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LARGEST_ADVANTAGE = 5.0
_LARGEST_LOG_RATIO = 10.0


# Rewards --------------------------------------------------------------------------------------------------------------


def compute_discount(steps: torch.Tensor, discount: float) -> torch.Tensor:
    """w(K) = (1 - lambda^K) / (K (1 - lambda)) of METHOD.md, section 3: the mean of lambda^j over K steps; 1 at K = 0.

    steps: equivalent steps, any shape. discount: lambda in 0..1; 1 gives 1 everywhere.
    """
    if discount == 1:
        return torch.ones_like(steps)
    safe = steps.clamp(min=1e-6)
    weight = (1 - discount**safe) / (safe * (1 - discount))
    return torch.where(steps > 0, weight, 1.0)


def paper_reward(
    quality: torch.Tensor,
    realism: torch.Tensor,
    steps: torch.Tensor,
    *,
    discount: float,
    omega: float,
) -> torch.Tensor:
    """r = w(K) (q + omega d). Where q + omega d is negative, more steps raise r: shift q to be positive."""
    return compute_discount(steps, discount) * (quality + omega * realism)


def dial_reward(
    error: torch.Tensor,
    steps: torch.Tensor,
    *,
    scale: torch.Tensor,
    price: torch.Tensor,
    dial: torch.Tensor,
    failure: float,
    power: float = 1.0,
) -> torch.Tensor:
    """r = -(m / M_b)^p / p - mu_b E / b, the second term dropped for groups in which everybody fails.

    error, steps: m and E, `[P, G]`. scale, price, dial: M_b, mu_b and b of every group, `[P]`. failure: the least
    m / M_b of a group above which it must not learn to fail quickly. power: p; below 1 the few images whose outcome
    flips weigh less, and a price means the same: where m is M_b all powers have one slope.
    """
    relative = error / scale[:, None]
    least = relative.nan_to_num(nan=float("inf")).amin(1)
    cost = price[:, None] * steps / dial[:, None]
    return -relative.pow(power) / power - torch.where(least[:, None] > failure, 0.0, cost)


# Advantages -----------------------------------------------------------------------------------------------------------


def masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the last axis of what is valid; 0 where nothing is."""
    count = valid.sum(-1)
    return values.masked_fill(~valid, 0.0).sum(-1) / count.clamp(min=1)


def group_std(rewards: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the finite rewards of every group (of the population: divided by their number), `[P]`."""
    valid = rewards.isfinite()
    centred = rewards - masked_mean(rewards, valid)[:, None]
    return masked_mean(centred.square(), valid).sqrt()


def dead_groups(rewards: torch.Tensor, scale: torch.Tensor, share: float = 0.05) -> torch.Tensor:
    """Groups that say nothing: fewer than two members, a spread below a share of their bin's, or beyond float32's
    range, bool `[P]`.

    rewards: `[P, G]`. scale: the bin's standard deviation of every group, `[P]`.
    """
    few = rewards.isfinite().sum(1) < 2
    spread = group_std(rewards)
    return few | (spread < share * scale) | ~spread.isfinite()


def advantages(
    rewards: torch.Tensor, *, scale: torch.Tensor | None, leave_one_out: bool = False
) -> torch.Tensor:
    """Rewards `[P, G]` against their group, clipped to 5; 0 for missing members, groups of fewer than two, and what is
    beyond float32's range.

    scale: what the difference is divided by, `[P]`; None: nothing (GRPO without standard deviation, RLOO).
    leave_one_out: the baseline is the mean of the others (RLOO), which is G / (G - 1) times the difference.
    """
    valid = rewards.isfinite()
    count = valid.sum(1, keepdim=True)
    centred = rewards - masked_mean(rewards, valid)[:, None]
    if leave_one_out:
        centred = centred * count / (count - 1).clamp(min=1)
    if scale is not None:
        centred = centred / scale[:, None]
    centred = torch.where(valid & (count > 1) & centred.isfinite(), centred, 0.0)
    return centred.clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)


# The surrogate --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """loss: scalar with a gradient. ratios: `[N]` or one per trajectory. clipped, divergence: means, no gradient."""

    loss: torch.Tensor
    ratios: torch.Tensor
    clipped: torch.Tensor
    divergence: torch.Tensor


def log_ratio(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """logp_new - logp_old, clipped to +-10."""
    return (new - old).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def k3(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """e^d - 1 - d of d = logp_new - logp_old: never negative, 0 at d = 0.

    Over samples of the old policy its mean is KL(old || new).
    """
    d = log_ratio(new, old)
    return d.exp() - 1 - d


def clipped_surrogate(
    new: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    weight: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """-sum of weight min(rho A, clip(rho, 1 - low, 1 + high) A), the sum being normalised by its weights outside.

    new, old: log-probabilities `[N]` of single decisions, or their sums over a trajectory. advantage, weight: `[N]`;
    weight 0: not a decision, or of a group that is dead.
    """
    ratios = log_ratio(new, old).exp()
    bounded = ratios.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratios * advantage, bounded * advantage)
    live = weight > 0
    with torch.no_grad():
        clipped = masked_mean((ratios * advantage > bounded * advantage).float(), live)
        divergence = masked_mean(k3(new, old), live)
    return Surrogate(
        loss=-(weight * gain).sum(),
        ratios=ratios.detach(),
        clipped=clipped,
        divergence=divergence,
    )


# What adapts ----------------------------------------------------------------------------------------------------------


def adapt_entropy(
    coefficient: float,
    entropy: float,
    floor: float,
    *,
    low: float = 1e-4,
    high: float = 0.1,
    gain: float = 0.5,
) -> float:
    """log c += gain (floor - H), c held to low..high. A head without live decisions (NaN) keeps its coefficient."""
    if math.isnan(entropy):
        return coefficient
    moved = math.log(coefficient) + gain * (floor - entropy)
    return min(max(math.exp(min(moved, 0.0)), low), high)


def adapt_price(price: float, mean_steps: float, dial: float) -> float:
    """mu <- clip(mu + (mean E - b) / b, 0, 8): dearer while images take more than was asked for."""
    return min(max(price + (mean_steps - dial) / dial, 0.0), 8.0)

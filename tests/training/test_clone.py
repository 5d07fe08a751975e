# SPDX-License-Identifier: Apache-2.0
"""The warm start: heads say what the teacher did, and stay as unsure as exploring needs."""

from __future__ import annotations

import math

import pytest
import torch

from rapid3rt.policies.learned import Decision, Heads, HeadsConfig
from rapid3rt.policies.prior import step_logits
from rapid3rt.policies.sampling import beta_entropy, beta_mode
from training.clone import _distance
from training.trajectory import Decisions

CONFIG = HeadsConfig(
    family="sd3",
    channels=2,
    conditioning=3,
    heads=("cache", "sparse", "step"),
    width=8,
    has_prior=False,
)


def lessons(head: str, action: torch.Tensor) -> Decisions:
    n, outputs = len(action), CONFIG.outputs(head)
    return Decisions(
        head=head,
        observation=torch.randn(n, 2, 4, 4).bfloat16(),
        conditioning=torch.randn(n, 3).bfloat16(),
        scalars=torch.zeros(n, 18),
        prior=torch.zeros(n, outputs),
        action=action,
        member=torch.arange(n),
        tick=torch.zeros(n, dtype=torch.int64),
        log_prob=torch.zeros(n),
    )


def taught(head: str, action: torch.Tensor, steps: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and entropies after so many steps of the same lesson."""
    torch.manual_seed(0)
    heads, batch = Heads(CONFIG), lessons(head, action)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        decision: Decision = batch.on(heads)
        _distance(batch, heads.logits(decision)).backward()
        optimiser.step()
    with torch.no_grad():
        return heads.logits(batch.on(heads)), batch.score(heads)[1]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["cache", "sparse"])
def test_choices_are_learned_and_stay_above_twice_the_floor(head: str) -> None:
    logits, entropy = taught(head, torch.zeros(16, dtype=torch.int64))
    chances = logits.softmax(1)
    torch.testing.assert_close(chances[:, 0], torch.full((16,), 0.9), atol=0.02, rtol=0)
    assert entropy.min() > 2 * 0.15 * math.log(CONFIG.outputs(head))
    others = chances[:, 1:] * (CONFIG.outputs(head) - 1)
    torch.testing.assert_close(others, torch.full_like(others, 0.1), atol=0.03, rtol=0)


@pytest.mark.slow
def test_a_step_is_learned_with_the_spread_of_a_prior() -> None:
    ratio = torch.full((16,), 0.8)
    logits, entropy = taught("step", ratio)
    mode = beta_mode(*(1 + logits.exp()).unbind(1))
    torch.testing.assert_close(mode, ratio, atol=0.01, rtol=0)
    expected = beta_entropy(*(1 + step_logits(ratio).exp()).unbind(1))
    torch.testing.assert_close(entropy, expected, atol=0.15, rtol=0)

# SPDX-License-Identifier: Apache-2.0
"""Samplers against exact distribution functions, and that a draw depends on its seed and tick alone."""

from __future__ import annotations

import math

import pytest
import torch

from rapid3rt.policies.sampling import (
    Noise,
    beta_entropy,
    beta_log_prob,
    beta_mode,
    choice_entropy,
    choice_log_prob,
    clamp_ratio,
)

CPU = torch.device("cpu")
DRAWS = 20_000


def draws(alpha: float, beta: float) -> torch.Tensor:
    """One image per draw."""
    noise = Noise(range(DRAWS), 1, CPU)
    return noise.ratio(0, torch.full((DRAWS,), alpha), torch.full((DRAWS,), beta)).double()


@pytest.mark.parametrize(
    ("alpha", "beta", "cdf"),
    [
        (1.0, 1.0, lambda x: x),
        (3.0, 1.0, lambda x: x**3),
        (1.0, 2.5, lambda x: 1 - (1 - x) ** 2.5),
        (2.0, 2.0, lambda x: x * x * (3 - 2 * x)),
    ],
)
def test_ratios_follow_their_distribution(alpha, beta, cdf):
    """Kolmogorov and Smirnov: the largest gap stays below 1.95 / sqrt(n) in 999 of 1,000 samples."""
    x = draws(alpha, beta).sort().values
    steps = torch.arange(1, DRAWS + 1) / DRAWS
    assert float((cdf(x) - steps).abs().max()) < 1.95 / math.sqrt(DRAWS) + 1 / DRAWS


def test_sharp_ratios_have_the_mean_and_spread_of_theirs():
    x = draws(2800.0, 1200.0)
    assert float(x.mean()) == pytest.approx(0.7, abs=3e-4)
    assert float(x.std()) == pytest.approx(math.sqrt(0.7 * 0.3 / 4001), rel=0.03)


def test_choices_follow_their_probabilities():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(DRAWS, 3)
    counts = Noise(range(DRAWS), 2, CPU).choice(1, 0, logits).bincount(minlength=3)
    expected = DRAWS * torch.tensor([0.2, 0.5, 0.3])
    assert float(((counts - expected) ** 2 / expected).sum()) < 13.8  # chi-squared, 999 of 1,000


def test_a_draw_depends_on_seed_and_tick_alone():
    alpha, beta, logits = torch.tensor([3.0]), torch.tensor([5.0]), torch.zeros(1, 4)
    alone, among = Noise([7], 3, CPU), Noise([3, 7, 11], 3, CPU)
    among.ratio(0, torch.full((3,), 40.0), torch.full((3,), 2.0))
    for tick in (2, 0, 1):
        together = among.ratio(tick, alpha.expand(3), beta.expand(3))
        assert float(together[1]) == float(alone.ratio(tick, alpha, beta))
        for head in (0, 1):
            chosen = among.choice(tick, head, logits.expand(3, 4))
            assert int(chosen[1]) == int(alone.choice(tick, head, logits))
    ratios = [float(alone.ratio(tick, alpha, beta)) for tick in range(3)]
    assert len(set(ratios)) == 3


def test_probabilities_by_hand():
    # Beta(2, 3): 12 x (1 - x)^2, densest at 1 / 3.
    x = torch.tensor([0.25])
    a, b = torch.tensor([2.0]), torch.tensor([3.0])
    assert float(beta_log_prob(x, a, b)) == pytest.approx(math.log(12 * 0.25 * 0.75**2), abs=1e-6)
    assert float(beta_mode(a, b)) == pytest.approx(1 / 3)
    assert float(beta_mode(torch.ones(1), torch.ones(1))) == 0.5
    assert float(beta_entropy(torch.ones(1), torch.ones(1))) == pytest.approx(0.0, abs=1e-6)
    # B(2, 2) = 1 / 6 and psi(4) - psi(2) = 5 / 6: ln(1 / 6) + 2 * 5 / 6.
    two = torch.tensor([2.0])
    assert float(beta_entropy(two, two)) == pytest.approx(math.log(1 / 6) + 5 / 3, abs=1e-6)
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert float(choice_log_prob(torch.tensor([1]), logits)) == pytest.approx(math.log(0.75))
    assert float(choice_entropy(logits)) == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
    assert clamp_ratio(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1e-3, 1 - 1e-3])

# SPDX-License-Identifier: Apache-2.0
"""The fit of the allocation head: it finds what is there, leaves alone what is not, and keeps the mean asked for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import small_world
import torch

from rapid3rt.policies.heads import AllocationHead
from rapid3rt.policies.learned import Heads, HeadsConfig, LearnedPolicy
from rapid3rt.types import AUTO
from training.allocation import TABLE, Pairs, fit_head, read_conditioning, read_pairs
from training.bank import accelerated
from training.config import LEAST_PAIRS
from training.recipes import tiny_sd3_allocation
from training.subject import Subject

TICKS, POWER, WIDTH = 28, 2.0, 12
DIALS = (6.0, 8.0, 10.0)


def pairs_of(hardness: torch.Tensor, conditioning: torch.Tensor, noise: float = 0.0) -> Pairs:
    """Errors that are power laws: log m = hardness - POWER log k."""
    generator = torch.Generator().manual_seed(9)
    ks = torch.tensor(TABLE, dtype=torch.float64)
    logs = hardness[:, None].double() - POWER * ks.log()
    logs = logs + noise * torch.randn(logs.shape, generator=generator, dtype=torch.float64)
    return Pairs(conditioning=conditioning.float(), ks=TABLE, errors=logs.exp())


def linear(count: int = 256, spread: float = 1.0, noise: float = 0.0) -> Pairs:
    """Hardness is one direction of the conditioning, of a standard deviation of `spread`."""
    generator = torch.Generator().manual_seed(3)
    conditioning = torch.randn(count, WIDTH, generator=generator) * 3 + 1
    return pairs_of(spread * (conditioning[:, 0] - 1) / 3, conditioning, noise)


def unrelated(count: int = 256, seed: int = 4) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    conditioning = torch.randn(count, WIDTH, generator=generator)
    return pairs_of(torch.randn(count, generator=generator), conditioning)


def fitted(pairs: Pairs) -> tuple[AllocationHead, dict[str, float]]:
    head = AllocationHead(WIDTH, DIALS)
    return head, fit_head(head, pairs, TICKS)


def plans(head: AllocationHead, pairs: Pairs, dial: float) -> torch.Tensor:
    """Evaluations of every image, by what the head says and the limits of serving."""
    with torch.no_grad():
        stretch = head(pairs.conditioning, torch.full((len(pairs.errors),), dial)).exp()
    return (dial * stretch).double()


def ratio_of(head: AllocationHead, pairs: Pairs, dial: float) -> float:
    """Mean error over that of all images alike, at the same mean."""
    own = plans(head, pairs, dial)
    own = own * dial / own.mean()
    hardness = pairs.hardness
    return float((hardness.exp() * own**-POWER).mean() / (hardness.exp() * dial**-POWER).mean())


def test_a_linear_hardness_is_found() -> None:
    pairs = linear()
    head, metrics = fitted(pairs)
    assert metrics["allocation/explained"] > 0.99
    for dial in DIALS:
        log_plan = plans(head, pairs, dial).log()
        both = torch.stack([log_plan, pairs.hardness])
        assert float(torch.corrcoef(both)[0, 1]) > 0.99
        # Least total error has k in proportion to c^(1 / (p + 1)); a grid of strengths is 0.025 wide.
        slope = float(torch.cov(both)[0, 1] / torch.cov(both)[1, 1])
        assert slope == pytest.approx(1 / (POWER + 1), abs=0.04)
        assert metrics[f"allocation/ratio@{dial:g}"] == pytest.approx(
            math.exp(-POWER / (2 * (POWER + 1))), abs=0.05
        )


def test_the_mean_is_the_dial() -> None:
    for pairs in (linear(), linear(spread=0.4, noise=0.3), unrelated()):
        head, _ = fitted(pairs)
        for dial in DIALS:
            assert float(plans(head, pairs, dial).mean()) == pytest.approx(dial, rel=0.04)


@pytest.mark.parametrize("seed", [4, 5, 6, 7])
def test_what_has_nothing_to_do_with_hardness_is_left_alone(seed: int) -> None:
    head, metrics = fitted(unrelated(seed=seed))
    assert metrics["allocation/explained"] < 0.1
    assert float(head.strength.detach().abs().max()) < 0.15
    for dial in DIALS:
        assert 0.93 < metrics[f"allocation/ratio@{dial:g}"] <= 1.0
        assert ratio_of(head, unrelated(seed=seed + 100), dial) < 1.03


def test_a_hard_tail_is_worth_more_than_noise_costs() -> None:
    pairs = linear(count=96, noise=0.5)
    head, metrics = fitted(pairs)
    assert 0.5 < metrics["allocation/explained"] < 1
    assert ratio_of(head, linear(count=4096), 8.0) < 0.85


def test_too_few_pairs_are_refused_before_anything_is_made() -> None:
    with pytest.raises(
        ValueError, match=f"pairs must be at least {LEAST_PAIRS} to fit an allocatio"
    ):
        fitted(linear(count=LEAST_PAIRS - 1))
    fitted(linear(count=LEAST_PAIRS))
    with pytest.raises(
        ValueError, match=f"pairs must be at least {LEAST_PAIRS} to fit an allocatio"
    ):
        replace(tiny_sd3_allocation(), pairs=LEAST_PAIRS - 1)


def test_a_column_that_never_changes_does_no_harm() -> None:
    pairs = linear()
    conditioning = pairs.conditioning.clone()
    conditioning[:, 5] = 7.0
    head, metrics = fitted(replace(pairs, conditioning=conditioning))
    assert metrics["allocation/explained"] > 0.99
    assert bool(head.hardness.weight.isfinite().all())


def test_what_is_fitted_is_what_is_served(subject: Subject) -> None:
    """The conditioning of the table is the one that a policy reads in a run, to the bit."""
    seen = []
    config = HeadsConfig(family="sd3", channels=4, conditioning=128, heads=("step",), width=8)
    policy = LearnedPolicy(
        Heads(config), small_world.FAMILY, order=AUTO, dial=5, record=seen.append
    )
    bank = subject.training
    for start in (0, 4):
        with accelerated(bank.pipe, policy):
            bank.images(range(start, min(start + 4, len(bank))))
    first = torch.cat([d.conditioning for d in seen if d.tick == 0]).float()
    assert torch.equal(read_conditioning(bank), first)
    assert torch.equal(read_conditioning(small_world.make_bank(bank.folder)), first)


@pytest.mark.slow
def test_pairs_are_read_from_the_bank(subject: Subject) -> None:
    pairs = read_pairs(subject.training, small_world.FAMILY)
    assert pairs.ks == (3, 4, 5, 6, 8)
    assert pairs.conditioning.shape == (6, 128)
    for i, k in enumerate(pairs.ks):
        table = subject.training.searched(small_world.FAMILY, k).error
        assert torch.equal(pairs.errors[:, i].float(), table)
    assert float(pairs.hardness.sum()) == pytest.approx(0.0, abs=1e-6)

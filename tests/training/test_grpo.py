# SPDX-License-Identifier: Apache-2.0
"""One iteration from draw to metrics: rewards are those of the formulas, and what has no number is in none of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import small_world
import torch

from training import loss
from training.allocation import read_pairs
from training.config import Recipe
from training.discriminator import Discriminator, DiscriminatorConfig, vae_features
from training.grpo import Trainer
from training.ranks import Ranks
from training.rollout import Rollout
from training.run import _make_quality, make_heads
from training.subject import Subject

DIAL, PAPER = small_world.DIAL, small_world.PAPER
ADVERSARIAL = replace(PAPER, omega=0.5, groups=2, members=3)


def make(recipe: Recipe, subject: Subject, ranks: Ranks) -> Trainer:
    discriminator = None
    if recipe.omega:
        config = DiscriminatorConfig(batch=8, steps=2, first_steps=3)
        discriminator = Discriminator(vae_features(subject.pipe), config, seed=1)
    heads = small_world.make_trained(recipe, subject)
    return Trainer(
        recipe, subject, heads, ranks, quality=_make_quality(recipe), discriminator=discriminator
    )


def broken(trainer: Trainer, members: list[tuple[int, int]]) -> None:
    """From here on these members' images have a pixel that is no number."""
    collect = trainer.rollouts.collect

    def spoil(*given: Any) -> Rollout:
        rollout = collect(*given)
        for p, g in members:
            rollout.images[p, g, 0, 0, 0] = math.nan
            rollout.error[p, g] = math.nan
        return rollout

    trainer.rollouts.collect = spoil  # type: ignore[method-assign]


def test_scale_and_price_come_from_the_table(subject: Subject, ranks: Ranks) -> None:
    trainer = make(replace(DIAL, dials=(4, 5, 7)), subject, ranks)
    means = {
        k: float(subject.training.searched(small_world.FAMILY, k).error.mean())
        for k in (3, 4, 5, 6, 8)
    }
    assert trainer.errors["4"] == pytest.approx(means[4], rel=1e-4)
    assert trainer.errors["5"] == pytest.approx(means[5], rel=1e-4)
    share = math.log(7 / 6) / math.log(8 / 6)
    between = means[6] ** (1 - share) * means[8] ** share
    assert trainer.errors["7"] == pytest.approx(between, rel=1e-4)
    slope = math.log(means[6] / means[8]) / math.log(8 / 6)
    assert trainer.running.price["7"] == pytest.approx(min(max(slope, 0), 8), rel=1e-3)


def test_the_margin_is_over_the_family_at_the_cost_of_each_member(
    subject: Subject, ranks: Ranks, dial_walk: Any
) -> None:
    trainer, rollout = make(DIAL, subject, ranks), dial_walk.rollout
    dense = small_world.COSTS.levels[0]
    steps = torch.full_like(rollout.steps, 5 * dense)
    steps[:, 1:] = math.sqrt(5 * 6) * dense
    errors = {
        k: subject.training.searched(small_world.FAMILY, k).error.clamp(min=1e-9) for k in (5, 6)
    }
    between = (errors[5] * errors[6]).sqrt()
    pairs = [group.pair for group in rollout.groups]
    family = between[pairs][:, None].expand_as(steps).clone()
    family[:, 0] = errors[5][pairs]
    made = replace(rollout, steps=steps, error=family / 2)
    assert trainer._margin(made)["rollout/margin"] == pytest.approx(math.log(2), abs=1e-4)
    made.error[0, 1:], made.error[1] = math.nan, family[1]
    expected = math.log(2) * (len(pairs) - 1) / len(pairs)
    assert trainer._margin(made)["rollout/margin"] == pytest.approx(expected, abs=1e-4)
    made.error[:] = math.nan
    assert trainer._margin(made) == {}
    assert make(PAPER, subject, ranks)._margin(rollout) == {}


def test_hardness_is_that_of_the_allocation(subject: Subject, ranks: Ranks) -> None:
    trainer = make(DIAL, subject, ranks)
    expected = read_pairs(subject.training, small_world.FAMILY).hardness
    assert trainer.hardness is not None
    torch.testing.assert_close(trainer.hardness.double(), expected, rtol=1e-4, atol=1e-4)


def test_rewards_are_those_of_the_formula(subject: Subject, ranks: Ranks) -> None:
    trainer = make(DIAL, subject, ranks)
    groups = trainer.draw(0)
    rollout = trainer.rollouts.collect(groups, 4)
    rewards, terms = trainer.reward(rollout)
    for p, group in enumerate(groups):
        key = f"{group.dial:g}"
        scale, price = trainer.errors[key], trainer.running.price[key]
        relative = rollout.error[p] / scale
        expected = -relative
        if float(relative.min()) <= DIAL.failure:
            expected = expected - price * rollout.steps[p] / group.dial
        torch.testing.assert_close(rewards[p], expected)
        torch.testing.assert_close(terms["relative_error"][p], relative)


def test_the_papers_reward_with_what_the_discriminator_says(subject: Subject, ranks: Ranks) -> None:
    trainer = make(ADVERSARIAL, subject, ranks)
    trainer.iterate(0)
    rollout = trainer.rollouts.collect(trainer.draw(1), 3)
    rewards, terms = trainer.reward(rollout)
    realism = terms.pop("realism")
    assert float(realism.abs().max()) > 0
    (quality,) = terms.values()
    expected = loss.paper_reward(quality, realism, rollout.steps, discount=0.97, omega=0.5)
    torch.testing.assert_close(rewards, expected)


ALONE = replace(ADVERSARIAL, quality=())  # nothing but the discriminator pays


@pytest.mark.parametrize("recipe", [DIAL, ADVERSARIAL, ALONE], ids=["dial", "both", "alone"])
def test_members_without_a_number_are_in_nothing(
    subject: Subject, ranks: Ranks, recipe: Recipe
) -> None:
    trainer = make(recipe, subject, ranks)
    broken(trainer, [(0, 1), (1, 0)])
    for iteration in range(2):
        metrics = trainer.iterate(iteration)
        assert metrics["policy/missing_members"] == 2
        told = {k: v for k, v in metrics.items() if not k.startswith("quality")}
        assert all(math.isfinite(value) for value in told.values()), told
    assert all(bool(p.isfinite().all()) for p in trainer.heads.parameters())


def test_groups_without_numbers_leave_everything_as_it_was(subject: Subject, ranks: Ranks) -> None:
    recipe = replace(ADVERSARIAL, groups=1)
    trainer = make(recipe, subject, ranks)
    trainer.iterate(0)
    broken(trainer, [(0, g) for g in range(3)])
    metrics = trainer.iterate(1)
    assert metrics["policy/dead_groups"] == 1.0
    assert metrics["policy/missing_members"] == 3
    assert "reward/total" not in metrics


def test_prices_follow_what_images_take(subject: Subject, ranks: Ranks) -> None:
    trainer = make(replace(DIAL, dials=(4, 8), groups=6), subject, ranks)
    before = dict(trainer.running.price)
    metrics = trainer.iterate(0)
    for key, price in trainer.running.price.items():
        if f"cost/E@{key}" not in metrics:
            assert price == before[key]
            continue
        mean = 0.8 * float(key) + 0.2 * metrics[f"cost/E@{key}"]
        expected = loss.adapt_price(before[key], mean, float(key))
        assert price == pytest.approx(expected, rel=1e-5)
        assert metrics[f"cost/price@{key}"] == price


def test_choices_keep_their_entropy_to_the_end(subject: Subject, ranks: Ranks) -> None:
    trainer = make(replace(PAPER, iterations=9), subject, ranks)
    floors = [trainer._floor("sparse", {}, i / 9) for i in (1, 6, 9)]
    full = math.log(3)
    assert floors == pytest.approx([0.15 * full, 0.15 * full, 0.03 * full])
    assert trainer._floor("step", {"entropy/step_prior": -2.0}, 0.5) == -2.5
    trainer.running.first["step"] = -1.0  # above the untrained one: that decides
    assert trainer._floor("step", {"entropy/step_prior": -2.0}, 0.5) == -2.5
    trainer.running.first["step"] = -2.7  # a warm start left less
    assert trainer._floor("step", {"entropy/step_prior": -2.0}, 0.5) == pytest.approx(-3.2)


def test_an_iteration_depends_on_the_state_and_nothing_else(subject: Subject, ranks: Ranks) -> None:
    """What one iteration leaves behind outside of the state would show in the next."""
    trainer = make(ADVERSARIAL, subject, ranks)
    trainer.iterate(0)
    fresh = make(ADVERSARIAL, subject, ranks)
    fresh.load_state(trainer.state())
    torch.manual_seed(77)
    rows = [t.iterate(1) for t in (trainer, fresh)]
    for key in rows[0]:
        if not key.startswith("time/"):
            assert rows[0][key] == rows[1][key], key
    for a, b in zip(trainer.heads.parameters(), fresh.heads.parameters(), strict=True):
        assert torch.equal(a, b)


def test_heads_of_one_seed_are_the_same(subject: Subject) -> None:
    torch.manual_seed(1)
    one = make_heads(PAPER, subject).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = make_heads(PAPER, subject).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = make_heads(replace(PAPER, seed=1), subject).state_dict()
    assert not torch.equal(one["by_name.step.project.weight"], third["by_name.step.project.weight"])

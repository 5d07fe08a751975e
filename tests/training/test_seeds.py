# SPDX-License-Identifier: Apache-2.0
"""Draws are functions of counters: the same in any number of ranks, in any batch, after any stop."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import small_world
import torch

from training.config import Recipe
from training.grpo import Trainer
from training.ranks import Ranks
from training.run import make_heads
from training.seeds import seed_of
from training.subject import Subject


def trainer(recipe: Recipe, subject: Subject, ranks: Ranks) -> Trainer:
    return Trainer(recipe, subject, make_heads(recipe, subject), ranks)


def test_seeds_are_of_their_key_and_nothing_else() -> None:
    keys = [(0, 1), (1, 0), (0, "1"), ("0", 1), (0, 1, "pair"), (0, 1, "dial"), (10,), (1, 0, 0)]
    seeds = {key: seed_of(*key) for key in keys}
    assert len(set(seeds.values())) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert seeds == {key: seed_of(*key) for key in keys}
    torch.Generator().manual_seed(max(seeds.values()))


def test_seeds_stay_what_they_are() -> None:
    """Banks on disk and runs that go on hang on this number."""
    assert seed_of(11, 0, "noise") == 3531388803963634048


@pytest.mark.parametrize("change", [{}, {"rollout_batch": 1}, {"micro_batch": 3}])
def test_groups_of_an_iteration_are_those_of_its_number(
    subject: Subject, ranks: Ranks, change: dict[str, int]
) -> None:
    recipe = replace(small_world.DIAL, groups=5)
    expected = [trainer(recipe, subject, ranks).draw(i) for i in range(4)]
    again = trainer(replace(recipe, **change), subject, ranks)
    assert [again.draw(i) for i in (3, 1, 2, 0)] == [expected[i] for i in (3, 1, 2, 0)]
    numbers = [group.number for groups in expected for group in groups]
    assert numbers == list(range(20))


def test_a_run_with_another_seed_draws_other_groups(subject: Subject, ranks: Ranks) -> None:
    draws = []
    for seed in (0, 1):
        own = trainer(replace(small_world.DIAL, seed=seed), subject, ranks)
        draws.append([group for i in range(20) for group in own.draw(i)])
    same = [a == b for a, b in zip(*draws, strict=True)]
    assert sum(same) < len(same) / 2


def test_all_pairs_and_dials_come_alike(subject: Subject, ranks: Ranks) -> None:
    own = trainer(small_world.DIAL, subject, ranks)
    groups = [group for i in range(400) for group in own.draw(i)]
    pairs = Counter(group.pair for group in groups)
    dials = Counter(group.dial for group in groups)
    assert set(pairs) == set(range(6))
    assert min(pairs.values()) > 150  # of 200, 12.9 standard
    assert min(dials.values()) > 500  # of 600
    both = Counter((group.pair, group.dial) for group in groups)
    assert min(both.values()) > 60  # of 100


def test_members_act_by_seeds_of_their_own(dial_walk, paper_walk) -> None:
    for walk in (dial_walk, paper_walk):
        step = walk.rollout.decisions["step"]
        first = {
            int(m): (float(a), o)
            for m, a, o, t in zip(
                step.member, step.action, step.observation, step.tick, strict=True
            )
            if t == 0
        }
        members = walk.recipe.members
        for group in range(walk.recipe.groups):
            own = [first[group * members + g] for g in range(members)]
            # One noise: all see the same velocity, and go on from it each in its own way.
            assert all(torch.equal(own[0][1], observation) for _, observation in own)
            assert len({action for action, _ in own}) == members
        assert not torch.equal(first[0][1], first[members][1])

# SPDX-License-Identifier: Apache-2.0
"""One small world for all tests of the trainer, and one rollout of each recipe in it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import small_world
import torch

from rapid3rt.policies.learned import Heads
from training.config import Recipe
from training.ranks import Ranks
from training.rollout import Group, Rollout, Rollouts
from training.subject import Subject


@dataclass(frozen=True)
class Walk:
    """A rollout and the heads that it was made with."""

    recipe: Recipe
    heads: Heads
    rollout: Rollout


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return small_world.make_ranks()


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return small_world.make_subject(tmp_path_factory.mktemp("banks"))


def walk(recipe: Recipe, subject: Subject) -> Walk:
    heads = small_world.make_trained(recipe, subject)
    rollouts = Rollouts(
        subject.training,
        heads,
        family=small_world.FAMILY if recipe.prior else None,
        order=recipe.order,
        costs=small_world.COSTS,
        batch=recipe.rollout_batch,
        seed=recipe.seed,
    )
    groups = [
        Group(number=i, pair=i, dial=recipe.dials[i % 2] if recipe.prior else None)
        for i in range(recipe.groups)
    ]
    return Walk(recipe, heads, rollouts.collect(groups, recipe.members))


@pytest.fixture(scope="session")
def dial_walk(subject: Subject) -> Walk:
    torch.set_num_threads(1)
    return walk(small_world.DIAL, subject)


@pytest.fixture(scope="session")
def paper_walk(subject: Subject) -> Walk:
    torch.set_num_threads(1)
    return walk(small_world.PAPER, subject)

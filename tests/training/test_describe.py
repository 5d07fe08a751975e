# SPDX-License-Identifier: Apache-2.0
"""What `--dry-run` says a run will cost is what the run then asks of the generator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_run
import small_world

import training.subject
from training import run
from training.bank import Bank
from training.config import Recipe
from training.describe import (
    count_bank,
    count_lessons,
    count_rollouts,
    count_served,
    describe,
)
from training.recipes import RECIPES
from training.rollout import Rollouts


def test_the_count_by_hand() -> None:
    recipe = replace(
        small_world.DIAL,
        pairs=10,
        validation_pairs=4,
        calibration_pairs=3,
        iterations=5,
        evaluate_every=2,
    )
    table = 3 + 4 + 5 + 6 + 8
    assert count_bank(recipe) == (10 + 4) * (80 + table) + 3 * 80
    assert count_rollouts(recipe) == 5 * 3 * 4 * 5
    assert count_served(recipe) == 4 * (1 + 3) * (4 + 6) + 3 * (2 * (4 + 6))
    paper = replace(small_world.PAPER, pairs=10, validation_pairs=4, omega=1.0)
    assert count_bank(paper) == 10 * (80 + 8) + 4 * (80 + table)
    taught = replace(paper, warm_start=7)
    assert [count_lessons(r) for r in (recipe, replace(paper, warm_start=0))] == [0, 0]
    assert count_lessons(taught) == 10 * taught.dials[len(taught.dials) // 2]
    assert count_lessons(replace(taught, pairs=100)) == 64 * taught.dials[len(taught.dials) // 2]
    assert f"lessons        {count_lessons(taught)} of" in describe(taught)
    assert "lessons" not in describe(recipe)
    allocation = replace(recipe, heads=("allocation",), pairs=30)
    assert count_rollouts(allocation) == 0
    assert count_bank(allocation) == 30 * (81 + table) + 4 * (80 + table) + 3 * (81 + 4 + 6)
    assert count_served(allocation) == 3 * (4 + 6)
    assert "iteration" not in describe(allocation).split("}")[1]


@pytest.mark.slow
def test_a_run_asks_for_what_was_said(tmp_path: Path, monkeypatch) -> None:
    """Counted as images times evaluations; sampled steps may end an image earlier or later than its dial."""
    asked = {"bank": 0.0, "served": 0.0, "rollouts": 0.0}
    make, collect, serve = Bank._make, Rollouts.collect, run.Validation.rows

    def counted_make(self, *given):
        made = make(self, *given)
        asked["bank"] += float(made["nfe"].sum())
        return made

    def counted_collect(self, *given, **named):
        rollout = collect(self, *given, **named)
        asked["rollouts"] += float(rollout.nfe.sum())
        return rollout

    def counted_rows(self, heads, dial):
        rows = serve(self, heads, dial)
        asked["served"] += float(rows[:, 2].sum())
        return rows

    monkeypatch.setattr(Bank, "_make", counted_make)
    monkeypatch.setattr(Rollouts, "collect", counted_collect)
    monkeypatch.setattr(run.Validation, "rows", counted_rows)
    monkeypatch.setattr(training.subject, "load_pipeline", small_run.load_pipeline)
    small_world.make_searched().save(tmp_path / "searched")
    recipe: Recipe = replace(
        small_world.DIAL, policy=str(tmp_path / "searched"), iterations=3, evaluate_every=2
    )
    command = run.Command(
        recipe=recipe, out=tmp_path / "out", banks=tmp_path / "banks", tracker="none"
    )
    run.train(command)
    assert asked["bank"] == count_bank(recipe)
    assert asked["served"] == pytest.approx(count_served(recipe), rel=0.1)
    assert asked["rollouts"] == pytest.approx(count_rollouts(recipe), rel=0.25)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_described(name: str) -> None:
    text = describe(RECIPES[name]())
    assert f'"name": "{name}"' in text
    assert "hours for every millisecond" in text

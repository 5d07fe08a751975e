# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before it starts: `--dry-run`."""

from __future__ import annotations

import json

from training.allocation import TABLE, even_steps
from training.bank import REFERENCE_STEPS
from training.clone import LESSONS
from training.config import Recipe, as_json
from training.validation import FURTHER_DIALS


def describe(recipe: Recipe) -> str:
    """The resolved recipe, its batch geometry and its evaluations of the generator, as text."""
    bank, rollouts, validation = count_bank(recipe), count_rollouts(recipe), count_served(recipe)
    lessons = count_lessons(recipe)
    total = bank + lessons + rollouts + validation
    lines = [
        json.dumps(as_json(recipe), indent=1),
        *_geometry(recipe),
        f"rollouts       {rollouts:,} evaluations of an image",
        f"bank           {bank:,}, once for all runs of this model on these pairs",
        *(
            [f"lessons        {lessons:,} of the searched schedule, to begin with"]
            if lessons
            else []
        ),
        f"served         {validation:,} for validation and calibration",
        f"together       {total:,}: {total / 3600 / 1000:.2f} hours for every millisecond that one takes "
        "(python benches/bench_tick.py measures it)",
    ]
    return "\n".join(lines)


def count_bank(recipe: Recipe) -> int:
    """Image evaluations of the bank: references, tables of the family, what allocation and discriminator see."""
    steps, table = recipe.num_inference_steps, sum(_table(recipe))
    reference = REFERENCE_STEPS + ("allocation" in recipe.heads)
    train = reference + (table if recipe.prior else 0)
    train += steps if recipe.omega and recipe.has_rollouts else 0
    calibration = reference if recipe.prior else 0
    if "allocation" in recipe.heads:
        calibration += sum({even_steps(dial, steps) for dial in recipe.dials})
    train *= recipe.pairs
    validation = (REFERENCE_STEPS + table) * recipe.validation_pairs
    return train + validation + calibration * recipe.calibration_pairs


def count_lessons(recipe: Recipe) -> int:
    """Image evaluations of the schedule that heads without a prior first repeat, where the model has one."""
    if recipe.prior or not recipe.warm_start:
        return 0
    return min(recipe.pairs, LESSONS) * round(recipe.teacher_dial)


def count_rollouts(recipe: Recipe) -> int:
    """Image evaluations of all iterations; without a prior at most."""
    if not recipe.has_rollouts:
        return 0
    return round(recipe.iterations * recipe.groups * recipe.members * _mean(recipe))


def count_served(recipe: Recipe) -> int:
    """Image evaluations of validation, before training and while it lasts, and of the dials' calibration, where sampled
    heads are measured with what they say and without.
    """
    times = 1 + -(-recipe.iterations // recipe.evaluate_every) if recipe.has_rollouts else 0
    if not recipe.prior:
        return round(recipe.validation_pairs * times * recipe.num_inference_steps)
    dials = sum(recipe.dials)
    further = set(FURTHER_DIALS) - set(recipe.dials)
    last = sum(dial for dial in further if dial <= recipe.num_inference_steps)
    last += dials * (2 if recipe.has_rollouts else 1)
    return round(recipe.validation_pairs * times * dials + recipe.calibration_pairs * last)


def _geometry(recipe: Recipe) -> list[str]:
    if not recipe.has_rollouts:
        return []
    trajectories = recipe.groups * recipe.members
    calls = -(-trajectories // recipe.rollout_batch)
    mean = f"{_mean(recipe):.3g} evaluations of an image {'in the mean' if recipe.prior else 'at most'}"
    return [
        f"one iteration  {recipe.groups} groups x {recipe.members} members = {trajectories} images, at least {calls} "
        f"pipeline calls of up to {recipe.rollout_batch}, {mean}; {recipe.iterations} iterations"
    ]


def _table(recipe: Recipe) -> list[int]:
    return [k for k in TABLE if k <= recipe.num_inference_steps]


def _mean(recipe: Recipe) -> float:
    """Evaluations of an image in a rollout."""
    if not recipe.prior:
        return recipe.num_inference_steps
    return sum(recipe.dials) / len(recipe.dials)

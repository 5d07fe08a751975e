# SPDX-License-Identifier: Apache-2.0
"""What a run will cost, before it starts: `--dry-run`."""

from __future__ import annotations

import json

from training.allocation import TABLE
from training.bank import REFERENCE_STEPS
from training.config import Recipe, as_json
from training.validation import FURTHER_DIALS


def describe(recipe: Recipe) -> str:
    """The resolved recipe, its batch geometry and its evaluations of the generator, as text."""
    trajectories = recipe.groups * recipe.members
    mean = sum(recipe.dials) / len(recipe.dials) if recipe.prior else recipe.num_inference_steps
    calls = -(-trajectories // recipe.rollout_batch)
    table = sum(k for k in TABLE if k <= recipe.num_inference_steps) if recipe.prior else 0
    per_pair = REFERENCE_STEPS + table + (recipe.num_inference_steps if recipe.omega else 0)
    bank = per_pair * (recipe.pairs + recipe.validation_pairs)
    rollouts = round(recipe.iterations * trajectories * mean)
    measured = -(-recipe.iterations // recipe.evaluate_every)
    dials = sum(recipe.dials) if recipe.prior else recipe.num_inference_steps
    validation = round(measured * recipe.validation_pairs * dials)
    validation += round(recipe.validation_pairs * sum(FURTHER_DIALS)) if recipe.prior else 0
    total = bank + rollouts + validation
    lines = [
        json.dumps(as_json(recipe), indent=1),
        f"one iteration  {recipe.groups} groups x {recipe.members} members = {trajectories} images, at least {calls} "
        f"pipeline calls of up to {recipe.rollout_batch}, {mean:.3g} evaluations of an image in the mean",
        f"rollouts       {rollouts:,} image evaluations in {recipe.iterations} iterations",
        f"bank           {bank:,}, once for all runs of this model ({per_pair} for each of "
        f"{recipe.pairs} + {recipe.validation_pairs} pairs)",
        f"validation     {validation:,}",
        f"together       {total:,}: {total / 3600 / 1000:.2f} hours for every millisecond that one takes "
        "(python benches/bench_tick.py measures it)",
    ]
    return "\n".join(lines)

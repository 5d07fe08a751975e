# SPDX-License-Identifier: Apache-2.0
"""Two iterations of the trainer as one rank of some: what `test_ranks` starts as processes, and calls for one rank.

    python rank_run.py FOLDER '{"even": {"groups": 4}}'      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

Leaves `FOLDER/NAME-RANK.json` (metrics of every iteration, batches of the bank that this rank made, or the error) and
`FOLDER/NAME-RANK.safetensors` (all parameters).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import small_world
import torch
from safetensors.torch import save_file

from training.bank import Bank
from training.checkpoint import Checkpoints
from training.discriminator import Discriminator, DiscriminatorConfig, vae_features
from training.grpo import Trainer
from training.ranks import Ranks
from training.run import _make_quality, dials_of
from training.validation import Validation

# One group to a pipeline call: what else a batch holds changes the last bits of an image, and heads see bfloat16. Steps
# are small: after the first one, ranks that differ in the order of sums differ in what a few cells are rounded to.
RECIPES = {
    name: replace(recipe, rollout_batch=recipe.members, learning_rate=5e-5)
    for name, recipe in (("dial", small_world.DIAL), ("paper", small_world.PAPER))
}


class Half(Trainer):
    """A trainer to whom all groups of odd number, so all of the second of two ranks, are dead."""

    def reward(self, rollout: Any) -> Any:
        rewards, terms = super().reward(rollout)
        for row, group in zip(rewards, rollout.groups, strict=True):
            if group.number % 2:
                row.fill_(1.0)
        return rewards, terms


def run(name: str, change: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    """One scenario; returns what is written."""
    change = dict(change)
    recipe = RECIPES[change.pop("base", "dial")]
    make = Half if change.pop("half_dead", False) else Trainer
    for rank, differing in change.pop("on_rank", {}).items():
        change |= differing if int(rank) == ranks.index else {}
    kept = change.pop("checkpoints", None)
    spoiled = change.pop("spoiled", False)
    recipe = replace(recipe, **change)
    made: list[tuple[str, int]] = []
    original = Bank._make

    def count(self: Bank, start: int, *rest: Any) -> Any:
        made.append((self.folder.name, start))
        return original(self, start, *rest)

    Bank._make = count  # type: ignore[method-assign]
    try:
        if kept is not None:
            ranks.main_first(lambda: Checkpoints(folder / kept, fingerprint={"seed": 2}))
        ranks.require_equal("recipe", repr(recipe))
        subject = small_world.make_subject(folder / f"banks-{recipe.pairs}", recipe, ranks)
        heads = small_world.make_trained(recipe, subject)
        if spoiled:
            for parameter in heads.parameters():
                parameter.data += ranks.index
            ranks.copy_main(heads)
        discriminator = None
        if recipe.omega:
            config = DiscriminatorConfig(batch=16, steps=2)
            discriminator = Discriminator(vae_features(subject.pipe), config, seed=1)
        trainer = make(
            recipe,
            subject,
            heads,
            ranks,
            quality=_make_quality(recipe),
            discriminator=discriminator,
        )
        metrics = [trainer.iterate(i) for i in range(recipe.iterations)]
        validation = Validation(
            bank=subject.validation,
            family=small_world.FAMILY,
            order=recipe.order,
            costs=small_world.COSTS,
            ranks=ranks,
        )
        metrics.append(validation.judge(validation.measure(heads, dials_of(recipe)))[0])
    except ValueError as error:
        ranks.wait()  # nobody waits at another place
        return {"error": str(error)}
    finally:
        Bank._make = original  # type: ignore[method-assign]
    tensors = {name: p.detach().clone() for name, p in heads.named_parameters()}
    first = {
        f"first {n}": p for n, p in small_world.make_trained(recipe, subject).named_parameters()
    }
    tensors |= {name: p.detach().clone() for name, p in first.items()}
    save_file(tensors, folder / f"{name}-{ranks.index}.safetensors")
    return {"metrics": metrics, "made": made, "difficulty": trainer.difficulty}


def main() -> None:
    torch.set_num_threads(1)
    folder, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    ranks = small_world.make_ranks()
    for name, change in scenarios.items():
        told = run(name, change, folder, ranks)
        (folder / f"{name}-{ranks.index}.json").write_text(json.dumps(told))
        ranks.wait()


if __name__ == "__main__":
    main()

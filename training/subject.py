# SPDX-License-Identifier: Apache-2.0
"""What a recipe trains on: a frozen pipeline, its prompts, the prior's family and the costs of actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import rapid3rt
from rapid3rt.calibrate import command
from rapid3rt.pipeline import bundled_policy, find_adapter, model_id
from rapid3rt.policies.fixed import Steps
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.schedule import misfit_notes
from rapid3rt.tiny.policy import SEED as SEARCH_SEED
from rapid3rt.tiny.scenes import Scene, sample
from rapid3rt.types import Run
from training.bank import Bank, accelerated
from training.config import Recipe
from training.ranks import Ranks

_TINY, BUNDLED = "tiny-", "bundled"
_SEEDS = {"train": 11, "validation": 5, "calibration": 7}
"""Of the scenes that a split's pairs are drawn with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """searched: the policy folder whose family is the prior. calibration: None for heads without a prior. scenes: of
    every pair of training, None outside the tiny world. notes: what a user should know about the prior.
    grid: rows and columns of the image tokens.
    """

    pipe: Any
    searched: PolicyFolder
    training: Bank
    validation: Bank
    calibration: Bank | None
    scenes: Sequence[Scene] | None
    notes: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None


def load_subject(recipe: Recipe, folder: Path, ranks: Ranks) -> Subject:
    """Load everything that is frozen. folder: where banks are kept; runs of one model may share it.

    Raises ValueError for a model or policy that is not there, and for too few prompts.
    """
    counts = _counts(recipe)
    prompts = {split: load_prompts(recipe, split, count) for split, count in counts.items()}
    searched = None if recipe.policy == BUNDLED else PolicyFolder.load(user_path(recipe.policy))
    pipe = load_pipeline(recipe, ranks.device)
    if searched is None:
        searched = PolicyFolder.load(find_bundled(recipe, pipe))
    check_searched(recipe, searched, find_adapter(pipe).family)
    banks = {}
    for split, count in counts.items():
        banks[split] = Bank(
            pipe,
            prompts[split],
            folder / f"{split}-{count}",
            seed=_SEEDS[split],
            steps=recipe.num_inference_steps,
            call=call_arguments(recipe),
            batch_size=min(16, recipe.rollout_batch),
            progress=ranks.is_main,
            ranks=ranks,
        )
    scenes = load_scenes("train", recipe.pairs) if recipe.prompts == "scenes" else None
    begun = first_run(banks["train"])
    notes = leave_out_misfit(searched, begun) if recipe.prior else ()
    return Subject(
        pipe=pipe,
        searched=searched,
        training=banks["train"],
        validation=banks["validation"],
        calibration=banks.get("calibration"),
        scenes=scenes,
        notes=notes,
        grid=begun.resolution,
    )


class _Listener(Steps):
    def begin(self, run: Run) -> None:
        self.begun = run
        super().begin(run)


def first_run(bank: Bank) -> Run:
    """What policies hear of a recipe's calls, by one evaluation of one image."""
    policy = _Listener(1, trim=True)
    with accelerated(bank.pipe, policy):
        bank.images(range(1))
    return policy.begun


def leave_out_misfit(searched: PolicyFolder, run: Run) -> tuple[str, ...]:
    """Take the fitted steps from a family, in place, where they were fitted for other calls; returns what is told.

    With such steps no image has a plan of its own: an allocation would be priced by plans that nobody takes, and saved
    unmeasured. Without them it is learned on the family's grid at its own order.
    """
    family = searched.schedule
    if family is None or family.fit is None:
        return ()
    notes = misfit_notes(family, run)
    if notes:
        searched.schedule = replace(family, fit=None)
    return notes


def _counts(recipe: Recipe) -> dict[str, int]:
    """Pairs of every split."""
    counts = {"train": recipe.pairs, "validation": recipe.validation_pairs}
    return counts | ({"calibration": recipe.calibration_pairs} if recipe.prior else {})


def load_pipeline(recipe: Recipe, device: torch.device) -> Any:
    """The frozen generator, without bars of its own."""
    dtype = getattr(torch, recipe.dtype)
    if recipe.model.startswith(_TINY):
        pipe = rapid3rt.load_tiny(recipe.model.removeprefix(_TINY), dtype)
    else:
        pipe = command.load_pipeline(recipe.model, dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def find_bundled(recipe: Recipe, pipe: Any) -> Path:
    """The folder of the package's own searched policy."""
    bundled = bundled_policy(model_id(pipe.transformer))
    if bundled is None:
        raise ValueError(
            f"policy must be a folder of `rapid3rt calibrate`, for none is bundled for {recipe.model}, got {BUNDLED!r}"
        )
    return bundled


def check_searched(recipe: Recipe, searched: PolicyFolder, family: str) -> None:
    """Raise ValueError where a policy is of another family, or has no prior to give."""
    if searched.family != family:
        raise ValueError(
            f"policy must be for a {family} model, got one for {searched.family} in {recipe.policy!r}"
        )
    if recipe.prior and searched.schedule is None:
        raise ValueError(f"policy must hold a searched family, got none in {recipe.policy!r}")


def call_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of every call but prompts, noise and steps."""
    call: dict[str, Any] = {
        "guidance_scale": recipe.guidance_scale,
        "max_sequence_length": recipe.max_sequence_length,
    }
    if recipe.resolution is not None:
        call |= {"height": recipe.resolution, "width": recipe.resolution}
    return call


def load_scenes(split: str, count: int) -> list[Scene]:
    """The tiny world's scenes of a split."""
    return sample(count, _SEEDS[split], split)


def met_captions(count: int = 512) -> set[str]:
    """What a tiny recipe of so many pairs, or the search before it, may have met: short captions come up again."""
    met = {scene.caption for split in _SEEDS for scene in load_scenes(split, count)}
    return met | {scene.caption for scene in sample(count, SEARCH_SEED, "calibration")}


def load_prompts(recipe: Recipe, split: str, count: int) -> list[str]:
    """Prompts of a split: of scenes, or of the file's lines: validation at its end, calibration before that."""
    if recipe.prompts == "scenes":
        return [scene.caption for scene in load_scenes(split, count)]
    path = user_path(recipe.prompts)
    if not path.is_file():
        raise ValueError(
            f"prompts must be 'scenes' or a file with one prompt per line, got {recipe.prompts!r}"
        )
    lines = list(dict.fromkeys(command.read_prompts(path)))
    counts = _counts(recipe)
    needed = sum(counts.values())
    if len(lines) < needed:
        names = "pairs + validation_pairs" + " + calibration_pairs" * ("calibration" in counts)
        raise ValueError(
            f"prompts must be at least {needed} different lines ({names}), got {len(lines)} in {path}"
        )
    if split == "train":
        return lines[:count]
    end = len(lines) - (recipe.validation_pairs if split == "calibration" else 0)
    return lines[end - count : end]


def user_path(text: str) -> Path:
    """Of a recipe's field."""
    return Path(text).expanduser()

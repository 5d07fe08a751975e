# SPDX-License-Identifier: Apache-2.0
"""A trainer small enough for every test: the bundled SD3 with one layer of random weights, at 32 x 32 pixels.

Milliseconds per evaluation, but the pipeline, its text encoders and its VAE are the real ones. No number from here says
anything about quality.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from torch import nn

import rapid3rt
from rapid3rt.pipeline import model_id
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.learned import Heads
from rapid3rt.policies.schedule import WarpFamily
from rapid3rt.tiny import GUIDANCE
from rapid3rt.types import AUTO, ActionCosts
from training.bank import Bank
from training.config import Recipe
from training.ranks import Ranks
from training.recipes import as_paper
from training.run import make_heads
from training.subject import Subject, call_arguments, load_prompts, load_scenes

FAMILY = WarpFamily(
    family="sd3", num_ticks=8, shift=1.2, order=AUTO, knots=((0.3, 0.25), (0.7, 0.75))
)
COSTS = ActionCosts(levels=(1.0, 0.9, 0.85), reuse=0.1, measured=True)
DIAL = Recipe(
    name="small",
    model="tiny-sd3",
    guidance_scale=GUIDANCE,
    max_sequence_length=32,
    num_inference_steps=8,
    resolution=32,
    heads=("step",),
    head_width=8,
    head_side=8,
    pairs=6,
    groups=3,
    members=4,
    iterations=2,
    dials=(4, 6),
    rollout_batch=8,
    validation_pairs=3,
    calibration_pairs=4,
    checkpoint_every=1,
)
PAPER = replace(
    as_paper(replace(DIAL, resolution=64)), quality=(("ssim", 1.0),), omega=0.0, resolution=32
)


@cache
def make_pipe() -> Any:
    """One for the whole process: what is frozen can be shared."""
    pipe = rapid3rt.load_tiny("sd3")
    config = {**pipe.transformer.config, "num_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer = SD3Transformer2DModel.from_config(config).eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_ranks() -> Ranks:
    """The processes that the environment names; one by default."""
    return Ranks(Accelerator(cpu=True))  # the small world stays on the CPU where there is a GPU too


def make_searched() -> PolicyFolder:
    """What `calibrate` would have found, made by hand."""
    model = model_id(make_pipe().transformer)
    return PolicyFolder(model=model, schedule=FAMILY, costs=COSTS, provenance={})


def make_bank(folder: Path, recipe: Recipe = DIAL, split: str = "train", **changes: Any) -> Bank:
    """Pairs of scenes' captions and noise."""
    counts = {"train": recipe.pairs, "validation": recipe.validation_pairs}
    count = counts.get(split, recipe.calibration_pairs)
    values: dict[str, Any] = {
        "seed": {"train": 11, "validation": 5, "calibration": 7}[split],
        "steps": recipe.num_inference_steps,
        "call": call_arguments(recipe),
        "batch_size": 4,
        "progress": False,
    }
    return Bank(make_pipe(), load_prompts(recipe, split, count), folder, **{**values, **changes})


def make_subject(folder: Path, recipe: Recipe = DIAL, ranks: Ranks | None = None) -> Subject:
    """Everything that is frozen."""
    return Subject(
        pipe=make_pipe(),
        searched=make_searched(),
        training=make_bank(folder / "train", recipe, ranks=ranks),
        validation=make_bank(folder / "validation", recipe, "validation", ranks=ranks),
        calibration=make_bank(folder / "calibration", recipe, "calibration", ranks=ranks),
        scenes=load_scenes("train", recipe.pairs),
    )


def make_trained(recipe: Recipe, subject: Subject, spread: float = 0.3) -> Heads:
    """Heads that do something: their last layers are random."""
    heads = make_heads(recipe, subject)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, head in heads.by_name.items():
            if name != "allocation":
                nn.init.normal_(head.decide.weight, std=spread)
    return heads

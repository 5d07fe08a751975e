# SPDX-License-Identifier: Apache-2.0
"""A training run as one value: every choice that decides what is learned, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

HEAD_NAMES = ("cache", "sparse", "allocation", "step")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `python -m training.run` trains. METHOD.md, sections 2 to 5, says why the numbers are as they are."""

    name: str
    """Of the recipe; a checkpoint of another one is refused."""
    model: str
    """`tiny-sd3`, `tiny-flux`, or folder or hub id of a diffusers pipeline."""
    policy: str = "bundled"
    """Policy folder whose searched family is the prior and whose costs are counted; `bundled`: the package's own."""
    prompts: str = "scenes"
    """`scenes` of the tiny world, or a file with one prompt per line."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the generator. Heads and rewards are float32 always."""

    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    max_sequence_length: int = 256
    resolution: int | None = None
    """Pixels per side of the training images; None: the pipeline's own. Heads serve at any other."""

    heads: tuple[str, ...] = ("allocation", "step")
    head_width: int = 128
    head_side: int | None = None
    """Cells per side that heads see, None: all."""
    prior: bool = True
    """Heads add to the searched family. False: the recipe of the paper, from nothing."""
    order: int = 0
    """Of every step: 1 Euler, 2 Adams-Bashforth, 0 as much of it as is stable."""

    pairs: int = 384
    """Of prompt and noise in the reference bank, all of training."""
    groups: int = 8
    """P, of one iteration over all ranks."""
    members: int = 8
    """G, images of one group."""
    iterations: int = 80
    dials: tuple[float, ...] = (5, 6, 8, 10, 14)
    rollout_batch: int = 64
    """Images of one pipeline call."""

    reward: Literal["fidelity", "paper"] = "fidelity"
    """`fidelity`: -m / M - mu E / b. `paper`: w(K) (q + omega d)."""
    quality: tuple[tuple[str, float], ...] = (("scene", 1.0),)
    """Rewards q and their weights, for `paper`."""
    omega: float = 0.0
    """Weight of the discriminator; 0: there is none."""
    discount: float = 0.97
    """lambda of w(K)."""
    failure: float = 4.0
    """m / M of a group's best image above which cost does not count."""

    advantage: Literal["bin", "group", "none", "rloo"] = "bin"
    """What a reward is divided by: the running std of its dial, its group's std, nothing; `rloo` nothing, against the
    mean of the others."""
    ratio: Literal["decision", "trajectory"] = "decision"
    clip_low: float = 0.2
    clip_high: float = 0.28
    inner_epochs: int = 2
    kl_stop: float = 0.02
    """Mean k3 per live decision of any head at which an iteration's epochs end."""
    prior_kl: float = 0.0
    """Weight of the divergence from the untrained policy."""
    learning_rate: float = 2e-4
    gradient_norm: float = 1.0
    step_entropy: float = 0.5
    """How far below the prior's a step head's entropy may fall, in nat."""
    choice_entropy: float = 0.15
    """Least entropy of a choice, as a share of ln(actions); annealed to 0.03 in the last third."""
    micro_batch: int = 2048
    """Decisions that are scored at once."""
    warm_start: int = 200
    """Steps of cloning the searched schedule before the first rollout, for heads without a prior; 0: from nothing."""

    seed: int = 0
    checkpoint_every: int = 5
    keep_checkpoints: int = 3
    evaluate_every: int = 20
    """Iterations between measurements on the validation pairs; the last one is always measured."""
    validation_pairs: int = 64

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if self.members < 2:
            raise ValueError(
                f"members must be at least 2, a group of one says nothing, got {self.members}"
            )
        unknown = [head for head in self.heads if head not in HEAD_NAMES]
        if unknown or not self.heads:
            raise ValueError(f"heads must be some of {', '.join(HEAD_NAMES)}, got {self.heads}")
        if not all(1 <= dial <= self.num_inference_steps for dial in self.dials) or not self.dials:
            raise ValueError(
                f"dials must be 1 to num_inference_steps ({self.num_inference_steps}), got {self.dials}"
            )
        if tuple(sorted(set(self.dials))) != tuple(self.dials):
            raise ValueError(f"dials must rise, each once, got {self.dials}")
        if not 0 < self.discount <= 1:
            raise ValueError(f"discount must be above 0 and at most 1, got {self.discount}")
        if self.reward == "paper" and not self.quality and self.omega == 0:
            raise ValueError("quality must name a reward where omega is 0, got none")


_COUNTS = (
    "num_inference_steps",
    "pairs",
    "groups",
    "members",
    "iterations",
    "rollout_batch",
    "inner_epochs",
    "micro_batch",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "validation_pairs",
    "head_width",
)
_POSITIVE = ("learning_rate", "gradient_norm", "clip_low", "clip_high", "kl_stop", "failure")


def as_json(recipe: Recipe) -> dict[str, object]:
    """A recipe as plain values: what a checkpoint belongs to."""
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    return {
        k: [list(x) if isinstance(x, tuple) else x for x in v] if isinstance(v, tuple) else v
        for k, v in values.items()
    }

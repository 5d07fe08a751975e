# SPDX-License-Identifier: Apache-2.0
"""A training run as one value: every choice that decides what is learned, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from rapid3rt.types import ADAMS_BASHFORTH, AUTO, EULER
from training.rewards import known_rewards, nearest

HEAD_NAMES = ("cache", "sparse", "allocation", "step")
LEAST_PAIRS = 24
"""Of a bank that an allocation is fitted to."""


Dtype = Literal["float32", "bfloat16", "float16"]
"""Of a generator."""


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
    dtype: Dtype = "float32"
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
    """`fidelity`: -(m / M)^p / p - mu E / b. `paper`: w(K) (q + omega d)."""
    quality: tuple[tuple[str, float], ...] = (("scene", 1.0),)
    """Rewards q and their weights, for `paper`."""
    omega: float = 0.0
    """Weight of the discriminator; 0: there is none."""
    discount: float = 0.97
    """lambda of w(K)."""
    error_power: float = 1.0
    """p of the reward fidelity: 1 the mean error, 0.5 the mean of its root."""
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
    calibration_pairs: int = 384
    """Further ones, on which dials are calibrated in the end, and what was learned is left out at dials where it is no
    sure gain: plans of images' own, then what sampled heads say; heads without a prior have no dials and need none."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            sign = "above 0" if name in _POSITIVE else "of at least 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and name in _POSITIVE):
                raise ValueError(f"{name} must be a number {sign}, got {value!r}")
        for name in ("resolution", "head_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be None or at least 1, got {value!r}")
        checks = (*self._of_heads(), *self._of_rewards(), *self._of_what_is_read())
        for name, accepted, requirement in checks:
            if not accepted:
                raise ValueError(f"{name} must {requirement}, got {getattr(self, name)!r}")

    @property
    def has_rollouts(self) -> bool:
        """Whether any head is sampled; the allocation alone is fitted to the bank."""
        return any(head != "allocation" for head in self.heads)

    @property
    def teacher_dial(self) -> float:
        """Evaluations of the searched schedule that heads without a prior first repeat."""
        return self.dials[len(self.dials) // 2]

    def _of_heads(self) -> Iterator[tuple[str, bool, str]]:
        heads, dials, steps = self.heads, self.dials, self.num_inference_steps
        known = bool(heads) and set(heads) <= set(HEAD_NAMES) and len(set(heads)) == len(heads)
        yield "heads", known, f"be some of {', '.join(HEAD_NAMES)}, each once"
        stretched = self.prior or "allocation" not in heads
        yield "heads", stretched, "not hold 'allocation' without a prior, whose plan it stretches"
        few = "allocation" in heads and self.pairs < LEAST_PAIRS
        yield "pairs", not few, f"be at least {LEAST_PAIRS} to fit an allocation"
        yield "members", self.members > 1, "be at least 2, a group of one says nothing"
        within = all(1 <= dial <= steps for dial in dials)
        yield "dials", within, f"be 1 to num_inference_steps ({steps})"
        # At the limit every plan is the longest, whatever an image is worth: nothing is left to allocate.
        dealt = "allocation" not in heads or all(dial < steps for dial in dials)
        yield "dials", dealt, f"be below num_inference_steps ({steps}) with an allocation"
        rising = len(dials) > 1 and tuple(sorted(set(dials))) == tuple(dials)
        yield "dials", rising, "be at least two and rise"
        # Metrics, prices and spreads are kept by what a dial is called.
        told_apart = len({f"{dial:g}" for dial in dials}) == len(dials)
        yield "dials", told_apart, "differ within six digits"
        yield "order", self.order in (AUTO, EULER, ADAMS_BASHFORTH), "be 0, 1 or 2"
        yield "choice_entropy", self.choice_entropy <= 1, "be a share, at most 1"

    def _of_rewards(self) -> Iterator[tuple[str, bool, str]]:
        yield "discount", self.discount <= 1, "be at most 1"
        if self.reward == "fidelity":
            yield "prior", self.prior, "be True with the reward fidelity, which is measured by it"
            steps = self.num_inference_steps
            yield "num_inference_steps", steps > 4, "be at least 5 with the reward fidelity"
            return
        names = [name for name, _ in self.quality]
        yield "quality", bool(names) or self.omega > 0, "name a reward where omega is 0"
        yield "quality", len(set(names)) == len(names), "name every reward once"
        near = ", ".join(nearest(next((n for n in names if n not in known_rewards()), "")))
        yield "quality", set(names) <= set(known_rewards()), f"be some of {near}"
        weighed = all(math.isfinite(weight) and weight for _, weight in self.quality)
        yield "quality", weighed, "have weights that are finite and not 0"
        if "scene" in names:
            yield "prompts", self.prompts == "scenes", "be 'scenes' for the reward scene"
            yield "resolution", self.resolution in (None, 64), "be 64 for the reward scene"

    def _of_what_is_read(self) -> Iterator[tuple[str, bool, str]]:
        """What nobody reads must not look as if it had been asked for."""
        for names, is_read, where in (
            (("quality",), self.reward == "paper", "with the reward fidelity"),
            (("discount",), self.reward == "paper" or self.omega > 0, "with the reward fidelity"),
            (("error_power", "failure"), self.reward == "fidelity", "with the reward paper"),
            (("omega",), self.has_rollouts, "where no head is sampled"),
            (("warm_start",), not self.prior, "with a prior"),
        ):
            for name in names:
                default = self.__dataclass_fields__[name].default
                accepted = is_read or getattr(self, name) == default
                yield name, accepted, f"be {default!r} {where}, which does not read it"


_COUNTS = (
    "num_inference_steps",
    "max_sequence_length",
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
    "calibration_pairs",
    "head_width",
)
_POSITIVE = (
    "learning_rate",
    "gradient_norm",
    "clip_low",
    "clip_high",
    "kl_stop",
    "error_power",
    "failure",
    "discount",
)
_NOT_NEGATIVE = (
    "omega",
    "prior_kl",
    "step_entropy",
    "choice_entropy",
    "guidance_scale",
    "warm_start",
)


def as_json(recipe: Recipe) -> dict[str, object]:
    """A recipe as plain values: what a checkpoint belongs to."""
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    return {
        k: [list(x) if isinstance(x, tuple) else x for x in v] if isinstance(v, tuple) else v
        for k, v in values.items()
    }

# SPDX-License-Identifier: Apache-2.0
"""Rewards by name, and their weighted sum.

`make_reward` makes a new object at every call: rewards that are trained on and rewards that are evaluated share
nothing. Nothing is imported before it is asked for. A new reward is one file, one test and one line here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from training.rewards.base import Reward, Samples

__all__ = ["Reward", "Samples", "WeightedSum", "known_rewards", "make_reward", "nearest"]


_REFERENCE = "; needs the reference, to=converged or to=full"
_IMSCORE = "; needs the extra rewards"
_ENTRIES = {
    "scene": ("scene.SceneReward", "share of a tiny scene that is right, 0..1; needs scenes"),
    "mse": (
        "fidelity.make_mse",
        "minus the mean squared error, pixels in -1..1" + _REFERENCE,
    ),
    "psnr": ("fidelity.make_psnr", "peak signal-to-noise ratio in dB" + _REFERENCE),
    "ssim": ("fidelity.make_ssim", "structural similarity, at most 1" + _REFERENCE),
    "features": (
        "fidelity.FeatureFidelity",
        "minus the cosine distance of features" + _REFERENCE + ", and an encoder",
    ),
    "pickscore": (
        "clip.make_pickscore",
        "PickScore, a CLIP trained on people's choices; needs its weights",
    ),
    "clipscore": (
        "clip.make_clipscore",
        "100 times the cosine of picture and prompt; needs CLIP weights",
    ),
    "imagereward": ("preference.make_imagereward", "ImageReward, people's rankings" + _IMSCORE),
    "hpsv2": ("preference.make_hpsv2", "HPS v2.1, people's choices" + _IMSCORE),
    "hpsv3": ("preference.make_hpsv3", "HPS v3, people's choices, 7B parameters" + _IMSCORE),
    "aesthetic": (
        "preference.make_aesthetic",
        "LAION aesthetic score of the picture, whatever the prompt" + _IMSCORE,
    ),
    "http": ("http.HttpReward", "whatever a server scores; needs its url"),
}
"""Name to maker (module here, function) and what it measures and needs."""


def known_rewards() -> dict[str, str]:
    """One line for every name: what it measures and what it needs."""
    return {name: measures for name, (_, measures) in _ENTRIES.items()}


def make_reward(name: str, **options: Any) -> Reward:
    """Make a reward; options are those of its maker.

    Raises
    ------
    ValueError: the name is unknown (the known ones are listed, nearest first), or an option is unknown or missing.
    ImportError: an extra is not installed; the line names it.
    """
    if name not in _ENTRIES:
        raise ValueError(f"reward must be one of {', '.join(nearest(name))}, got {name!r}")
    module, maker = _ENTRIES[name][0].split(".")
    make = getattr(importlib.import_module(f"training.rewards.{module}"), maker)
    _check_options(name, make, options)
    reward: Reward = make(**options)
    return reward


def nearest(name: object) -> list[str]:
    """All names, those that are most like this one first."""

    def distance(known: str) -> float:
        return -difflib.SequenceMatcher(None, str(name).lower(), known).ratio()

    return sorted(_ENTRIES, key=distance)


def _check_options(name: str, make: Callable[..., Reward], options: Mapping[str, Any]) -> None:
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(make).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in parameters:
            known = ", ".join(parameters)
            raise ValueError(f"option of reward '{name}' must be one of {known}, got {option!r}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in options:
            raise ValueError(f"option {key} of reward '{name}' must be given, got nothing")


class WeightedSum:
    """Sum of rewards times weights, itself a reward.

    terms: names, made here without options, or rewards; each with a finite weight other than 0. A term's own name
    appears once. A member that any term has no value for has no sum.
    """

    name = "weighted_sum"

    def __init__(self, terms: Mapping[str | Reward, float]) -> None:
        self.weights: dict[str, float] = {}
        if not terms:
            raise ValueError(f"terms must hold a reward at least, got {terms!r}")
        for term, weight in terms.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight == 0:
                raise ValueError(
                    f"weight of {_label(term)} must be finite and not 0, got {weight!r}"
                )
        self.rewards = [make_reward(t) if isinstance(t, str) else t for t in terms]
        for reward, weight in zip(self.rewards, terms.values(), strict=True):
            if reward.name in self.weights:
                raise ValueError(f"terms must have names of their own, got '{reward.name}' twice")
            self.weights[reward.name] = float(weight)

    def __call__(self, samples: Samples) -> torch.Tensor:
        """The sum: float32 `[n]`, NaN where a term is NaN."""
        return self.combine(self.terms(samples))

    @torch.no_grad()
    def terms(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Every term before its weight, by name: float32 `[n]` each."""
        values = {reward.name: reward(samples) for reward in self.rewards}
        for name, value in values.items():
            is_right = value.dtype == torch.float32 and value.device.type == "cpu"
            if not is_right or tuple(value.shape) != (len(samples),):
                got = f"{value.dtype} {tuple(value.shape)} on {value.device}"
                raise ValueError(
                    f"reward '{name}' must give float32 ({len(samples)},) on the CPU, got {got}"
                )
        return values

    def combine(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sum of what `terms` gave, so that a caller who logs the terms need not score twice."""
        parts = [weight * terms[name] for name, weight in self.weights.items()]
        return torch.stack(parts).sum(0)


def _label(term: str | Reward) -> str:
    return repr(term if isinstance(term, str) else term.name)

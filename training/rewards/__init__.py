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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

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
_READERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: {"true": True, "false": False}.get,
}
"""Type of an option to what makes it of text; None or a `ValueError` for what is none."""


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
    make = _maker(name)
    _check_options(name, make, options)
    reward: Reward = make(**options)
    return reward


def nearest(name: object) -> list[str]:
    """All names, those that are most like this one first."""

    def distance(known: str) -> float:
        return -difflib.SequenceMatcher(None, str(name).lower(), known).ratio()

    return sorted(_ENTRIES, key=distance)


def _maker(name: str) -> Callable[..., Reward]:
    module, maker = _ENTRIES[name][0].split(".")
    make: Callable[..., Reward] = getattr(
        importlib.import_module(f"training.rewards.{module}"), maker
    )
    return make


def _parameters(make: Callable[..., Reward]) -> dict[str, inspect.Parameter]:
    """Options of a maker, their types as they are."""
    return {
        key: parameter
        for key, parameter in inspect.signature(make, eval_str=True).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _check_known(name: str, option: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    if option not in parameters:
        known = ", ".join(parameters)
        raise ValueError(f"option of reward '{name}' must be one of {known}, got {option!r}")


def _check_options(name: str, make: Callable[..., Reward], options: Mapping[str, Any]) -> None:
    parameters = _parameters(make)
    for option in options:
        _check_known(name, option, parameters)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in options:
            raise ValueError(
                f"option {key} of reward '{name}' must be given, got nothing; for a training: --reward-options "
                f"{name}.{key}=VALUE"
            )


def read_options(words: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by reward, of words such as `http.url=http://host/score`; their types are those of the maker.

    names: of the rewards that there are. Raises ValueError for a word that is none, another reward, an option that its
    maker does not have or that no text can say, and a value of another type.
    """
    options: dict[str, dict[str, Any]] = {}
    for word in words:
        target, equals, text = word.partition("=")
        name, dot, option = target.partition(".")
        if not (equals and dot and option):
            raise ValueError(f"reward_options must read REWARD.OPTION=VALUE, got {word!r}")
        if name not in names:
            there = ", ".join(names) or "none, for no reward is used"
            raise ValueError(f"reward_options must be of {there}, got {word!r}")
        parameters = _parameters(_maker(name))
        _check_known(name, option, parameters)
        value = _of_type(parameters[option].annotation, text, word)
        options.setdefault(name, {})[option] = value
    return options


def _of_type(kind: Any, text: str, word: str) -> Any:
    """Text as a value of a type; of `X | None` as an X."""
    kinds = [each for each in _READERS if each in (kind, *get_args(kind))]
    if not kinds:
        raise ValueError(f"reward_options must be of options that a text can say, got {word!r}")
    try:
        value = _READERS[kinds[0]](text)
    except ValueError:
        value = None
    if value is None:
        raise ValueError(
            f"reward_options must hold a value of type {kinds[0].__name__}, got {word!r}"
        )
    return value


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

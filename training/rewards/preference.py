# SPDX-License-Identifier: Apache-2.0
"""Rewards learned from people's ratings, through the package `imscore` (extra `rewards`).

Written against imscore 0.0.11: a class per model with `from_pretrained(id)` and `score(pixels [n, 3, H, W] in 0..1,
prompts)`, which gives `[n]` or `[n, 1]`. ImageReward and HPSv3 of that version use what transformers 5 has removed
(5.23: `additional_special_tokens_ids`, `Qwen2VLForConditionalGeneration.visual`). So a scorer is tried on a grey
picture when it is made; one that does not run here can be served from an environment of its own, see `http`.
"""

from __future__ import annotations

import importlib
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from rapid3rt.errors import UnsupportedError
from training.rewards.base import Samples, batches, check_count, score_members

_CLASSES = {
    "imagereward": ("imscore.imreward.model", "ImageReward", "RE-N-Y/ImageReward"),
    "hpsv2": ("imscore.hps.model", "HPSv2", "RE-N-Y/hpsv21"),
    "hpsv3": ("imscore.hpsv3.model", "HPSv3", "RE-N-Y/hpsv3"),
    "aesthetic": ("imscore.aesthetic.model", "LAIONAestheticScorer", "RE-N-Y/laion-aesthetic"),
}
"""Module, class and hub id of the weights."""


class PreferenceReward:
    """A frozen scorer of imscore, in float32. batch_size: pictures at a time."""

    def __init__(self, name: str, scorer: Any, *, device: str, batch_size: int) -> None:
        self.name, self.scorer, self.device = name, scorer, torch.device(device)
        self.batch_size = check_count("batch_size", batch_size)

    def __call__(self, samples: Samples) -> torch.Tensor:
        """Raises `ValueError` where the scorer does not give one number per picture."""

        def score(members: list[int]) -> torch.Tensor:
            parts = batches(members, self.batch_size)
            return torch.cat([self._score(samples, part) for part in parts])

        return score_members(samples.finite, score)

    def _score(self, samples: Samples, members: list[int]) -> torch.Tensor:
        pixels = samples.images[members].clamp(0, 1).to(self.device)
        scores: torch.Tensor = self.scorer.score(pixels, [samples.prompts[i] for i in members])
        if scores.numel() != len(members):
            raise ValueError(
                f"{self.name} must give one score per image ({len(members)}), got {tuple(scores.shape)}"
            )
        return scores.flatten()


def _make(
    name: str,
    *,
    model: str | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    strict: bool = True,
) -> PreferenceReward:
    """Load a scorer and try it. HPSv3 has 7 billion parameters, 28 GB here.

    Parameters
    ----------
    model: hub id or folder of its weights, None for the one that imscore names. strict: refuse weights that do not
    match the scorer name by name; without it imscore leaves random numbers where a name is missing.

    Raises
    ------
    ImportError: imscore, or something that it needs, is not installed.
    UnsupportedError: the scorer cannot be loaded, or does not score a grey picture.
    """
    module, class_name, checkpoint = _CLASSES[name]
    try:
        scorer_class = getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        msg = f"reward '{name}' needs imscore ({error}): pip install 'rapid3rt[rewards]'"
        raise ImportError(msg) from None
    check_count("batch_size", batch_size)
    try:
        scorer = _load(scorer_class, model or checkpoint, strict)
        scorer = scorer.to(device).float().eval().requires_grad_(False)
        reward = PreferenceReward(name, scorer, device=device, batch_size=batch_size)
        _try(reward)
    except Exception as error:  # whatever another package may raise
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise UnsupportedError(
            f"reward '{name}' does not run with {_versions()}: {reason}; a scorer in another environment can be "
            "used through the reward 'http'"
        ) from error
    return reward


def _load(scorer_class: Any, model: str, strict: bool) -> Any:
    from huggingface_hub import PyTorchModelHubMixin

    if issubclass(scorer_class, PyTorchModelHubMixin):
        return scorer_class.from_pretrained(model, strict=strict)
    scorer, info = scorer_class.from_pretrained(model, output_loading_info=True)
    if strict and info["missing_keys"]:
        raise ValueError(f"weights must hold {sorted(info['missing_keys'])[0]}, got none")
    return scorer


def _try(reward: PreferenceReward) -> None:
    grey = Samples(images=torch.full((1, 3, 64, 64), 0.5), prompts=["a grey square"])
    score = float(reward(grey))
    if score != score:
        raise ValueError("score of a grey picture must be a number, got NaN")


def _versions() -> str:
    names = []
    for package in ("imscore", "transformers"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            names.append(package)
    return " and ".join(names)


make_imagereward = partial(_make, "imagereward")
make_hpsv2 = partial(_make, "hpsv2")
make_hpsv3 = partial(_make, "hpsv3")
make_aesthetic = partial(_make, "aesthetic")

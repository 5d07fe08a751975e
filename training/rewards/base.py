# SPDX-License-Identifier: Apache-2.0
"""What every reward is told, and the one way in which it answers.

A member is one picture of a batch. A reward gives every member a number, larger is better, or NaN where it has none: a
failure is never 0, which would be a verdict. Pictures are checked here, once, and no reward needs to look again.

Shape letters: n members, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image

from rapid3rt.tiny.scenes import Scene

_ROUNDING = 1e-3
"""How far beyond 0..1 a decoder's rounding may go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One batch of pictures and what is known of each.

    images: float32 `[n, 3, H, W]` in 0..1. prompts: n of them. scenes: of the tiny world. converged: the same-noise
    converged solution (METHOD.md, section 3), full: the plain full run of the same noise, both as `images`. finite:
    bool `[n]` on the CPU, False where a pixel of the image is NaN or infinite: such a member has no reward.

    Raises `ValueError` for another type, shape or range.
    """

    images: torch.Tensor
    prompts: Sequence[str]
    scenes: Sequence[Scene] | None = None
    converged: torch.Tensor | None = None
    full: torch.Tensor | None = None
    finite: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "finite", finite_members("images", self.images))
        for name in ("converged", "full"):
            if getattr(self, name) is not None:
                self._check_reference(name)
        self._check_list("prompts", str)
        if self.scenes is not None:
            self._check_list("scenes", Scene)

    def _check_reference(self, name: str) -> None:
        reference, shape = getattr(self, name), tuple(self.images.shape)
        finite_members(name, reference)
        if tuple(reference.shape) != shape:
            got = tuple(reference.shape)
            raise ValueError(f"{name} must be of the shape of images {shape}, got {got}")

    def _check_list(self, name: str, kind: type) -> None:
        values = getattr(self, name)
        is_list = isinstance(values, Sequence) and not isinstance(values, str)
        if not is_list or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{name} must be a list of {kind.__name__}, got {repr(values)[:60]}")
        if len(values) != len(self):
            raise ValueError(f"{name} must be as many as images ({len(self)}), got {len(values)}")

    def __len__(self) -> int:
        return len(self.images)


class Reward(Protocol):
    """Something that scores pictures."""

    @property
    def name(self) -> str:
        """Under which it is logged."""

    def __call__(self, samples: Samples) -> torch.Tensor:
        """A number per member, larger is better: float32 `[n]` on the CPU, NaN where it has none."""


def finite_members(name: str, images: torch.Tensor) -> torch.Tensor:
    """Members without a NaN or infinite pixel, bool `[n]` on the CPU. Raises `ValueError` for what is no batch of
    pictures, or for finite members out of 0..1."""
    if not isinstance(images, torch.Tensor) or images.dtype != torch.float32:
        got = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{name} must be a float32 tensor, got {got}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"{name} must be of shape (n, 3, H, W), got {tuple(images.shape)}")
    if _in_range(images):
        return torch.ones(len(images), dtype=torch.bool)
    finite = images.isfinite().flatten(1).all(1)
    if not _in_range(images[finite]):
        low, high = (float(bound) for bound in images[finite].aminmax())
        raise ValueError(f"{name} must be in 0..1, got values of {low:.3g} to {high:.3g}")
    return finite.cpu()


def _in_range(images: torch.Tensor) -> bool:
    if not images.numel():
        return True
    low, high = images.aminmax()
    return bool((low >= -_ROUNDING) & (high <= 1 + _ROUNDING))  # False for NaN


@torch.no_grad()
def score_members(usable: torch.Tensor, score: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """Score the usable members alone.

    Parameters
    ----------
    usable: bool `[n]`.
    score: takes the indices of m members, m > 0, and gives m numbers on any device.

    Returns
    -------
    float32 `[n]` on the CPU, NaN for members that are not usable or whose score is not finite.
    """
    out = torch.full((len(usable),), math.nan)
    members: list[int] = usable.nonzero().flatten().tolist()
    if not members:
        return out
    scores = score(members).detach().cpu().float()
    if scores.numel() != len(members):
        raise ValueError(
            f"scores must be one per image ({len(members)}), got shape {tuple(scores.shape)}"
        )
    out[members] = scores.flatten().where(scores.flatten().isfinite(), math.nan)
    return out


def batches(members: Sequence[int], size: int) -> list[list[int]]:
    """Members in runs of at most `size`."""
    return [list(members[start : start + size]) for start in range(0, len(members), size)]


def pictures(images: torch.Tensor) -> list[Image.Image]:
    """Images as they would be saved: RGB, 8 bits per channel, rounded to nearest."""
    pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(array) for array in pixels.cpu().numpy()]


def check_count(name: str, value: int, least: int = 1) -> int:
    """`value` where it is a whole number of at least `least`, else `ValueError`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value

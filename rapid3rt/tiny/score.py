# SPDX-License-Identifier: Apache-2.0
"""Exact scoring of a picture against its scene: which objects, colours, places and ground are right.

No learned judge. Every pixel goes to the nearest colour of the palette; each cell of the board is read as empty or as
one coloured shape (the template with the best overlap over position and size); the ground is the most frequent ground
tone with the texture whose template, over all phases, fits best.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from rapid3rt.tiny import scenes as world
from rapid3rt.tiny.scenes import Scene

_CELL = 22
_MIN_AREA = 25
_ROUNDING = 1e-3


def to_tensor(images: Any) -> torch.Tensor:
    """Pictures as float32 `[n, 3, 64, 64]` in 0..1.

    images: RGB PIL images, arrays `[n, 64, 64, 3]` (uint8, or floats in 0..1) or a tensor `[n, 3, 64, 64]` of floats in
    0..1. Raises ValueError for anything else, which would only be scored as wrong.
    """
    out = images if isinstance(images, torch.Tensor) else _stack(images)
    size = (3, world.IMAGE_SIZE, world.IMAGE_SIZE)
    if out.ndim != 4 or tuple(out.shape[1:]) != size:
        raise ValueError(
            f"images must be of shape (n, {', '.join(map(str, size))}), got {tuple(out.shape)}"
        )
    if not out.is_floating_point():
        raise ValueError(f"images must be floats in 0..1, got a tensor of {out.dtype}")
    out = out.float()
    low, high = (float(bound) for bound in out.aminmax()) if out.numel() else (0.0, 1.0)
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is refused too
        raise ValueError(f"images must be in 0..1, got values of {low:.3g} to {high:.3g}")
    return out


def _stack(images: Any) -> torch.Tensor:
    """Pictures `[n, height, width, 3]` as a tensor `[n, 3, height, width]`; bytes become floats."""
    if not isinstance(images, (Sequence, np.ndarray)):
        raise ValueError(
            f"images must be a list, an array or a tensor, got {type(images).__name__}"
        )
    pictures = [np.asarray(image) for image in images]
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        got = ", ".join(map(str, sorted(shapes))) or "no picture"
        raise ValueError(f"images must be RGB pictures of one shape (height, width, 3), got {got}")
    array = np.stack(pictures)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"images must be uint8, or floats in 0..1, got {array.dtype}")
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def score(images: Any, scenes: Sequence[Scene], continuous: bool = False) -> np.ndarray:
    """Score pictures against their scenes.

    An element is an object or the ground; an object is right when its cell shows its colour and its shape, the ground
    when tone and texture are right. Score = right elements / (elements + objects shown in cells that should be empty).

    Parameters
    ----------
    images: as `to_tensor` takes them.
    scenes: n scenes.
    continuous: replace right / wrong of an object by the mean of colour share and shape overlap (a training reward).

    Returns
    -------
    float32 `[n]` in 0..1.
    """
    pictures = to_tensor(images).cpu()
    if len(pictures) != len(scenes):
        raise ValueError(f"scenes must be as many as images ({len(pictures)}), got {len(scenes)}")
    rows = [_score_one(p, s, continuous) for p, s in zip(pictures, scenes, strict=True)]
    return np.asarray(rows, dtype=np.float32)


def _score_one(picture: torch.Tensor, scene: Scene, continuous: bool) -> float:
    label = _nearest(picture)
    num_colours = len(world.COLOURS)
    expected = {o.place: o for o in scene.objects}
    right, extra = 0.0, 0
    for cell, place in enumerate(world.PLACES):
        top, left = (int(world.CELL_CENTRES[i]) - _CELL // 2 for i in (cell // 3, cell % 3))
        top, left = (min(max(v, 0), world.IMAGE_SIZE - _CELL) for v in (top, left))
        patch = label[top : top + _CELL, left : left + _CELL]
        counts = torch.bincount(patch.flatten(), minlength=num_colours + 1)[:num_colours]
        dominant = int(counts.argmax())
        shown = int(counts[dominant]) >= _MIN_AREA
        item = expected.get(place)
        if item is None:
            extra += shown
            continue
        colour = list(world.COLOURS).index(item.colour)
        centre = (world.CELL_CENTRES[cell % 3] - left, world.CELL_CENTRES[cell // 3] - top)
        overlap = _overlaps(patch == (colour if continuous else dominant), centre)
        if continuous:
            share = float(counts[colour]) / max(int(counts.sum()), 1)
            right += (
                0.5 * share + 0.5 * float(overlap[world.SHAPES.index(item.shape)])
                if counts[colour]
                else 0.0
            )
        else:
            shape = world.SHAPES[int(overlap.argmax())]
            right += shown and dominant == colour and shape == item.shape
    right += _ground_is_right(picture, label, scene)
    return float(right) / (len(scene.objects) + 1 + extra)


@cache
def _palette() -> torch.Tensor:
    """Object colours, then both tones of every ground: float32 `[6 + 2 * 4, 3]`."""
    colours = [torch.tensor(c, dtype=torch.float32) / 255 for c in world.COLOURS.values()]
    return torch.stack(colours + [t for g in world.GROUNDS for t in world.tones(g)])


def _nearest(picture: torch.Tensor) -> torch.Tensor:
    """Index of the nearest palette colour per pixel: int64 `[64, 64]`; ground tones follow the object colours."""
    distance = torch.cdist(picture.flatten(1).T, _palette())
    return distance.argmin(1).view(world.IMAGE_SIZE, world.IMAGE_SIZE)


@cache
def _templates(centre: tuple[float, float]) -> torch.Tensor:
    """Filled shapes over position and size around the cell's centre: float32 `[shapes, variants, 22 * 22]`."""
    grid = torch.arange(_CELL, dtype=torch.float32) + 0.5
    steps = torch.arange(-2.0, 2.01, 0.5)
    out = []
    for shape in world.SHAPES:
        for radius in (5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5):
            x = (grid - centre[0] - steps[:, None]) / radius
            y = (grid - centre[1] - steps[:, None]) / radius
            inside = world.shape_distance(shape, x[:, None, None, :], y[None, :, :, None]) < 0
            out.append(inside.reshape(len(steps) ** 2, -1))
    return torch.cat(out).view(len(world.SHAPES), -1, _CELL * _CELL).float()


def _overlaps(mask: torch.Tensor, centre: tuple[float, float]) -> torch.Tensor:
    """Best intersection over union of a cell's mask with each shape: float32 `[shapes]`."""
    templates = _templates(centre)
    flat = mask.flatten().float()
    both = templates @ flat
    return (both / (templates.sum(-1) + flat.sum() - both)).amax(1)


@cache
def _texture_templates(texture: str) -> torch.Tensor:
    """All phases of a texture: float32 `[phases, 64 * 64]`."""
    period = range(world.TEXTURE_PERIOD)
    return torch.stack(
        [world.texture_mask(texture, (x, y)).flatten() for x in period for y in period]
    )


def _ground_is_right(picture: torch.Tensor, label: torch.Tensor, scene: Scene) -> bool:
    """Tone: the most frequent ground among the pixels. Texture: the template of least squared error over phases."""
    ground_label = label - len(world.COLOURS)
    visible = ground_label >= 0
    if not bool(visible.any()):
        return False
    counts = torch.bincount(ground_label[visible] // 2, minlength=len(world.GROUNDS))
    if list(world.GROUNDS)[int(counts.argmax())] != scene.ground:
        return False
    first, second = world.tones(scene.ground)
    direction = second - first
    tone = ((picture - first[:, None, None]) * direction[:, None, None]).sum(
        0
    ) / direction.square().sum()
    keep = (visible & (ground_label // 2 == counts.argmax())).flatten().float()
    errors = [
        float(
            ((_texture_templates(t) - tone.flatten().clamp(-0.5, 1.5)).square() * keep)
            .sum(1)
            .amin()
        )
        for t in world.TEXTURES
    ]
    return world.TEXTURES[int(np.argmin(errors))] == scene.texture

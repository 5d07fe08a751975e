# SPDX-License-Identifier: Apache-2.0
"""Captioned scenes of very different difficulty, drawn procedurally.

A scene is one to six coloured shapes in the cells of a 3 x 3 board, on plain or textured ground, 64 x 64 pixels. The
caption names every object with its place, and the ground; exact position and size of an object within its cell and
the phase of the texture stay free, so the initial noise decides them. Half of the scenes are one object on plain
ground, a third are four to six objects on texture: difficulty must spread for adaptive compute to have a point.

Scene i of (seed, split) does not depend on how many scenes are drawn. Splits never share a random stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

IMAGE_SIZE = 64
CELL_CENTRES = (11.0, 32.0, 53.0)
PLACES = (
    "top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 190, 70),
    "blue": (60, 110, 245),
    "yellow": (245, 220, 50),
    "purple": (165, 60, 205),
    "white": (250, 250, 250),
}
GROUNDS = {
    "grey": (128, 128, 128),
    "brown": (120, 78, 45),
    "navy": (25, 30, 75),
    "teal": (15, 105, 105),
}
TEXTURES = ("plain", "striped", "checkered", "dotted")
TEXTURE_PERIOD = 8
TEXTURE_MIX = 0.35
"""How far the second tone of a texture goes from the ground's colour towards white."""
SPLITS = {"train": 1, "calibration": 2, "validation": 3, "test": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One shape: names from COLOURS, SHAPES, PLACES; centre and radius in pixels."""

    colour: str
    shape: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        """The object as the caption names it."""
        return f"a {self.colour} {self.shape} {self.place}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a picture shows. `objects` in reading order; `phase` in pixels, meaningless on plain ground."""

    objects: tuple[SceneObject, ...]
    ground: str
    texture: str
    phase: tuple[int, int]

    @property
    def caption(self) -> str:
        """The full caption: every object with its place, then the ground."""
        return (
            f"{join_words([o.words for o in self.objects])} on {self.texture} {self.ground} ground"
        )

    @property
    def difficulty(self) -> float:
        """0 (one object on plain ground) to 1 (six objects on texture)."""
        return 0.1 * (len(self.objects) - 1) + 0.5 * (self.texture != "plain")


def join_words(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sample(n: int, seed: int, split: str = "test") -> list[Scene]:
    """Draw n scenes.

    Parameters
    ----------
    n: how many, at least 1.
    seed: a non-negative int; scenes of another seed are independent.
    split: "train", "calibration", "validation" or "test".

    Raises
    ------
    ValueError: n below 1, unknown split.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return [_draw_scene(np.random.default_rng((SPLITS[split], seed, i))) for i in range(n)]


def _draw_scene(rng: np.random.Generator) -> Scene:
    kind = rng.random()
    if kind < 0.5:
        textured, num_objects = False, 1
    elif kind < 0.6:
        textured, num_objects = False, int(rng.integers(2, 4))
    elif kind < 0.7:
        textured, num_objects = True, int(rng.integers(1, 4))
    else:
        textured, num_objects = True, int(rng.integers(4, 7))
    cells = np.sort(rng.choice(9, size=num_objects, replace=False))
    objects = tuple(
        SceneObject(
            colour=str(rng.choice(list(COLOURS))),
            shape=str(rng.choice(SHAPES)),
            place=PLACES[cell],
            x=CELL_CENTRES[cell % 3] + float(rng.uniform(-1.5, 1.5)),
            y=CELL_CENTRES[cell // 3] + float(rng.uniform(-1.5, 1.5)),
            radius=float(rng.uniform(6.0, 8.0)),
        )
        for cell in cells
    )
    return Scene(
        objects=objects,
        ground=str(rng.choice(list(GROUNDS))),
        texture=str(rng.choice(TEXTURES[1:])) if textured else "plain",
        phase=(int(rng.integers(TEXTURE_PERIOD)), int(rng.integers(TEXTURE_PERIOD))),
    )


def train_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The caption as training sees it: now and then without places or ground, one in ten empty (for guidance)."""
    kind = rng.random()
    if kind < 0.1:
        return ""
    words = [o.words for o in scene.objects]
    if kind < 0.2:
        words = [f"a {o.colour} {o.shape}" for o in scene.objects]
    ground = "" if 0.15 <= kind < 0.25 else f" on {scene.texture} {scene.ground} ground"
    return join_words(words) + ground


def shape_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to a shape of radius 1 at the origin, negative inside; y points down. Any float shape."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - 1.0
    if shape == "square":
        return torch.maximum(ax, ay) - 0.88
    if shape == "diamond":
        return (ax + ay) * 0.7071 - 0.78
    if shape == "triangle":
        y = y - 0.25
        return torch.maximum(y, 0.866 * ax - 0.5 * y) - 0.6
    if shape == "cross":
        return torch.minimum(torch.maximum(ax - 1.0, ay - 0.36), torch.maximum(ax - 0.36, ay - 1.0))
    return (torch.hypot(x, y) - 0.72).abs() - 0.28


def texture_mask(texture: str, phase: tuple[int, int]) -> torch.Tensor:
    """Where the second tone of the ground shows: float32 `[64, 64]` of 0 and 1."""
    row = (torch.arange(IMAGE_SIZE) + phase[1]) % TEXTURE_PERIOD
    column = (torch.arange(IMAGE_SIZE) + phase[0]) % TEXTURE_PERIOD
    half = TEXTURE_PERIOD // 2
    if texture == "striped":
        return (column < half).float().expand(IMAGE_SIZE, IMAGE_SIZE)
    if texture == "checkered":
        return ((column < half)[None, :] ^ (row < half)[:, None]).float()
    if texture == "dotted":
        return ((column < half)[None, :] & (row < half)[:, None]).float()
    return torch.zeros(IMAGE_SIZE, IMAGE_SIZE)


def tones(ground: str) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second tone of a ground, float32 `[3]` in 0..1."""
    first = torch.tensor(GROUNDS[ground], dtype=torch.float32) / 255
    return first, first + TEXTURE_MIX * (1 - first)


def draw(scenes: list[Scene]) -> torch.Tensor:
    """Render scenes, anti-aliased: float32 `[n, 3, 64, 64]` in 0..1."""
    grid = torch.arange(IMAGE_SIZE, dtype=torch.float32) + 0.5
    images = torch.empty(len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE)
    for image, scene in zip(images, scenes, strict=True):
        first, second = (t[:, None, None] for t in tones(scene.ground))
        image.copy_(first + texture_mask(scene.texture, scene.phase) * (second - first))
        for item in scene.objects:
            x = ((grid - item.x) / item.radius)[None, :]
            y = ((grid - item.y) / item.radius)[:, None]
            coverage = (0.5 - shape_distance(item.shape, x, y) * item.radius).clamp(0, 1)
            colour = torch.tensor(COLOURS[item.colour], dtype=torch.float32)[:, None, None] / 255
            image.lerp_(colour.expand_as(image), coverage.expand_as(image))
    return images

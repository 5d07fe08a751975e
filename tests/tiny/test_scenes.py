# SPDX-License-Identifier: Apache-2.0
"""The scene world: what is drawn, said and scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rapid3rt.tiny import scenes as world
from rapid3rt.tiny.score import score, to_tensor


def test_a_scene_does_not_depend_on_how_many_are_drawn() -> None:
    assert world.sample(3, 5) == world.sample(9, 5)[:3]


def test_splits_and_seeds_never_share_scenes() -> None:
    drawn = [tuple(world.sample(20, seed, split)) for split in world.SPLITS for seed in (0, 1)]
    scenes = [scene for group in drawn for scene in group]
    assert len(set(scenes)) == len(scenes)


def test_half_of_the_world_is_easy_and_a_third_is_hard() -> None:
    scenes = world.sample(2000, 0, "train")
    easy = sum(len(s.objects) == 1 and s.texture == "plain" for s in scenes) / 2000
    hard = sum(len(s.objects) >= 4 and s.texture != "plain" for s in scenes) / 2000
    assert 0.46 < easy < 0.54
    assert 0.26 < hard < 0.34


def test_the_caption_names_every_object_and_the_ground() -> None:
    for scene in world.sample(50, 3):
        for item in scene.objects:
            assert f"a {item.colour} {item.shape} {item.place}" in scene.caption
        assert scene.caption.endswith(f"on {scene.texture} {scene.ground} ground")


def test_difficulty_orders_one_disc_before_six_objects_on_texture() -> None:
    scenes = world.sample(200, 0)
    assert min(s.difficulty for s in scenes) == 0.0
    assert max(s.difficulty for s in scenes) == 1.0


def test_objects_stay_inside_the_picture_and_their_cells() -> None:
    for scene in world.sample(200, 1):
        for item in scene.objects:
            assert item.radius * 1.2 < min(item.x, item.y, 64 - item.x, 64 - item.y)


@pytest.mark.parametrize(("n", "split"), [(0, "test"), (3, "exam")])
def test_bad_requests_are_named(n: int, split: str) -> None:
    with pytest.raises(ValueError, match=r"^(n|split) must be"):
        world.sample(n, 0, split)


def test_a_drawn_scene_scores_one_and_another_scene_does_not() -> None:
    scenes = world.sample(200, 11)
    images = world.draw(scenes)
    assert score(images, scenes).min() == 1.0
    assert score(images.roll(1, 0), scenes).mean() < 0.2


@pytest.mark.parametrize("change", ["colour", "shape", "place", "ground", "texture", "extra"])
def test_every_single_mistake_costs_something(change: str) -> None:
    item = world.SceneObject(colour="red", shape="circle", place="center", x=32, y=32, radius=7)
    other = world.SceneObject(colour="blue", shape="square", place="top", x=32, y=11, radius=7)
    right = world.Scene(objects=(item,), ground="navy", texture="striped", phase=(1, 2))
    wrong_items = {
        "colour": (
            world.SceneObject(colour="blue", shape="circle", place="center", x=32, y=32, radius=7),
        ),
        "shape": (
            world.SceneObject(colour="red", shape="ring", place="center", x=32, y=32, radius=7),
        ),
        "place": (
            world.SceneObject(colour="red", shape="circle", place="left", x=11, y=32, radius=7),
        ),
        "extra": (other, item),
    }
    wrong = world.Scene(
        objects=wrong_items.get(change, (item,)),
        ground="teal" if change == "ground" else "navy",
        texture="plain" if change == "texture" else "striped",
        phase=(1, 2),
    )
    assert score(world.draw([wrong]), [right])[0] < 1.0


def test_the_score_reads_pil_images_arrays_and_tensors_alike() -> None:
    scenes = world.sample(4, 2)
    tensor = world.draw(scenes)
    array = (tensor.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    pictures = [Image.fromarray(a) for a in array]
    assert np.array_equal(score(tensor, scenes), score(pictures, scenes))
    assert np.array_equal(score(array, scenes), score(pictures, scenes))


def test_the_continuous_score_falls_smoothly_where_the_exact_one_holds() -> None:
    scenes = world.sample(60, 4)
    images = world.draw(scenes)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    sharp, soft = (
        score(images, scenes, continuous=True).mean(),
        score(blurred, scenes, continuous=True).mean(),
    )
    assert 0.95 < sharp <= 1.0
    assert soft < sharp - 0.005


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="images must be of shape"):
        to_tensor(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="scenes must be as many"):
        score(torch.zeros(2, 3, 64, 64), world.sample(3, 0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: (x * 255).byte(), r"images must be floats in 0..1, got a tensor of torch.uint8"),
        (lambda x: x * 2 - 1, r"images must be in 0..1, got values of -0"),
        (lambda x: x * 255, r"images must be in 0..1, got values of"),
        (lambda x: x * float("nan"), r"images must be in 0..1, got values of nan"),
        (lambda x: x.permute(0, 2, 3, 1).long().numpy(), r"images must be uint8, or floats"),
        (lambda _: [Image.new("L", (64, 64))], r"images must be RGB pictures .*got \(64, 64\)"),
        (lambda _: [Image.new("P", (64, 64))], r"images must be RGB pictures .*got \(64, 64\)"),
        (lambda _: [Image.new("RGBA", (64, 64))], r"images must be of shape"),
        (lambda _: [], r"images must be RGB pictures .*got no picture"),
        (
            lambda _: [Image.new("RGB", (64, 64)), Image.new("RGB", (32, 64))],
            r"images must be RGB pictures of one shape .*got \(64, 32, 3\), \(64, 64, 3\)",
        ),
        (lambda _: Image.new("RGB", (64, 64)), r"images must be a list, an array or a tensor"),
    ],
)
def test_pictures_that_would_only_score_badly_are_refused(
    wrong: Callable[[torch.Tensor], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_tensor(wrong(world.draw(world.sample(2, 0))))

# SPDX-License-Identifier: Apache-2.0
"""Sheets of samples: every picture at its place, with its pixels and its caption."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import training.pictures as pictures
from training.pictures import Row, Sample, draw_sheet, write_sheet


def flat(colour: tuple[float, float, float], height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, height, width)


def row(*colours: tuple[float, float, float], prompt: str = "a circle", side: int = 32) -> Row:
    plain, *rest = (Sample(image=flat(c, side, side), nfe=8, reward=-0.5) for c in colours)
    return Row(prompt=prompt, plain=plain, accelerated=tuple(rest))


RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def count(sheet: Image.Image, colour: tuple[float, float, float]) -> int:
    wanted = np.array([round(255 * c) for c in colour])
    return int((np.asarray(sheet) == wanted).all(-1).sum())


def test_every_picture_has_its_place() -> None:
    sheet = draw_sheet([row(RED, GREEN), row(BLUE, RED, GREEN)])
    assert (count(sheet, RED), count(sheet, GREEN), count(sheet, BLUE)) == (
        2 * 128**2,
        2 * 128**2,
        128**2,
    )
    where = {
        name: np.argwhere((np.asarray(sheet) == np.array(c) * 255).all(-1))
        for name, c in (("red", RED), ("green", GREEN), ("blue", BLUE))
    }
    first_red = where["red"][where["red"][:, 0] < 150]
    first_green = where["green"][where["green"][:, 0] < 150]
    assert first_red[:, 1].max() < first_green[:, 1].min(), "plain comes first"
    assert where["blue"][:, 0].min() > first_red[:, 0].max(), "rows stand below each other"
    assert where["blue"][:, 1].min() == first_red[:, 1].min(), "columns stand under each other"


def test_pixels_of_small_pictures_stay_pixels() -> None:
    image = torch.rand(3, 50, 40)
    sheet = np.asarray(
        draw_sheet([Row(prompt="", plain=Sample(image=image, nfe=1), accelerated=())])
    )
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    top, left = 6 + 15, 6
    assert np.array_equal(
        sheet[top : top + 150, left : left + 120], pixels.repeat(3, 0).repeat(3, 1)
    )


def test_large_pictures_shrink_in_proportion() -> None:
    sheet = draw_sheet(
        [Row(prompt="", plain=Sample(image=flat(RED, 512, 1024), nfe=1), accelerated=())]
    )
    assert count(sheet, RED) == 384 * 192


def test_any_float_and_numbers_out_of_range(tmp_path: Path) -> None:
    image = torch.tensor([math.nan, -1.0, 2.0, math.inf])[None, None].expand(3, 4, 4).bfloat16()
    sheet = write_sheet(
        [Row(prompt="", plain=Sample(image=image, nfe=1), accelerated=())], tmp_path / "s.png"
    )
    pixels = np.asarray(sheet)[6 + 15, 6 : 6 + 128 : 32, 0]
    assert pixels.tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(
    ("sample", "caption"),
    [
        (Sample(image=flat(RED), nfe=28), "28 nfe"),
        (Sample(image=flat(RED), nfe=7.5, reward=-0.9123), "7.5 nfe  -0.912"),
        (Sample(image=flat(RED), nfe=8, reward=math.nan), "8 nfe  +nan"),
    ],
)
def test_captions(sample: Sample, caption: str) -> None:
    assert sample.caption == caption


def test_captions_and_labels_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    real = pictures.ImageDraw.ImageDraw.text

    def text(self: object, place: tuple[int, int], words: str, **style: object) -> None:
        drawn.append(words)
        real(self, place, words, **style)  # type: ignore[arg-type]

    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", text)
    fast = Sample(image=flat(GREEN), nfe=6, reward=0.25, label="dial 6")
    plain = Sample(image=flat(RED), nfe=28)
    draw_sheet([Row(prompt="two\ncircles", plain=plain, accelerated=(fast,))])
    assert drawn == ["two circles", "28 nfe", "plain", "6 nfe  +0.25", "dial 6"]


def test_a_long_prompt_ends_with_its_row() -> None:
    long = draw_sheet([row(RED, GREEN, prompt="a very long prompt " * 50)])
    assert long.size == draw_sheet([row(RED, GREEN)]).size
    margin = np.asarray(long)[:20, -4:]
    assert (margin == 255).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8), (3, 0, 8), (2, 3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    sample = Sample(image=torch.zeros(shape), nfe=1)
    with pytest.raises(ValueError, match=r"^image must be \[3, h, w\], got \("):
        draw_sheet([Row(prompt="", plain=sample, accelerated=())])


def test_no_rows_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^rows must hold at least one prompt, got none$"):
        write_sheet([], tmp_path / "deep" / "s.png")
    assert not list(tmp_path.iterdir())


def test_a_sheet_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "s.png"
    write_sheet([row(RED)], path)
    before = path.read_bytes()

    def torn(_: Image.Image, file: Path, **__: str) -> None:
        file.write_bytes(b"half")
        raise OSError("full")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match="full"):
        write_sheet([row(BLUE)], path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["s.png"]

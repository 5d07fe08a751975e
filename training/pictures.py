# SPDX-License-Identifier: Apache-2.0
"""A sheet of pictures: per prompt the plain one and accelerated ones of the same noise, NFE and reward below each."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE, _FONT = 6, 15, 12
_INK, _FAINT = "#2b2b2b", "#8a8a85"
_SMALLEST, _LARGEST = 128, 384


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture. image: `[3, h, w]`, any float dtype, 0..1. reward: None where there is none, as for plain ones.

    label: what tells it from its neighbours, such as its dial."""

    image: torch.Tensor
    nfe: float
    reward: float | None = None
    label: str = ""

    @property
    def caption(self) -> str:
        """`8 nfe  -0.91`."""
        reward = "" if self.reward is None else f"  {self.reward:+.3g}"
        return f"{self.nfe:g} nfe{reward}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All pictures of one prompt and noise, the plain one apart."""

    prompt: str
    plain: Sample
    accelerated: tuple[Sample, ...]


def draw_sheet(rows: Sequence[Row]) -> Image.Image:
    """One row of pictures per prompt, all brought to one height; small ones grow by whole numbers, pixels stay pixels.

    Raises `ValueError` without rows, and for images of other shapes.
    """
    if not rows:
        raise ValueError("rows must hold at least one prompt, got none")
    font = ImageFont.load_default(_FONT)
    pictures = [[_picture(sample) for sample in (row.plain, *row.accelerated)] for row in rows]
    wide = max(picture.width for line in pictures for picture in line) + _GAP
    heights = [max(picture.height for picture in line) + 3 * _LINE + _GAP for line in pictures]
    columns = max(map(len, pictures))
    sheet = Image.new("RGB", (wide * columns + _GAP, sum(heights) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for row, line, height in zip(rows, pictures, heights, strict=True):
        prompt = _fit(row.prompt, wide * len(line), font)
        draw.text((_GAP, top), prompt, fill=_INK, font=font)
        for i, (sample, picture) in enumerate(
            zip((row.plain, *row.accelerated), line, strict=True)
        ):
            left, below = _GAP + i * wide, top + _LINE + picture.height
            sheet.paste(picture, (left, top + _LINE))
            draw.text((left, below), sample.caption, fill=_INK, font=font)
            label = _fit(sample.label or ("" if i else "plain"), wide, font)
            draw.text((left, below + _LINE), label, fill=_FAINT, font=font)
        top += height
    return sheet


def write_sheet(rows: Sequence[Row], path: Path) -> Image.Image:
    """Draw and write a PNG, beside and then renamed; makes its folder."""
    sheet = draw_sheet(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    try:
        sheet.save(scratch, format="PNG")
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    return sheet


def _picture(sample: Sample) -> Image.Image:
    """NaN is black: it must not look like a picture, nor stop the run that shows it."""
    image = sample.image.detach().float().cpu()
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be [3, h, w], got {tuple(image.shape)}")
    pixels = (image.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    side = max(picture.size)
    if side < _SMALLEST:
        times = math.ceil(_SMALLEST / side)
        return picture.resize(
            (picture.width * times, picture.height * times), Image.Resampling.NEAREST
        )
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return picture


def _fit(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The start of a text, as much as there is room for."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    over = bisect.bisect_left(
        range(len(line)), True, key=lambda n: font.getlength(f"{line[:n]}...") > width
    )
    return f"{line[: max(over - 1, 0)]}..."

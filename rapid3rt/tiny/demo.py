# SPDX-License-Identifier: Apache-2.0
"""The demo: eight prompts in one batch, plain, plain at the same cost, a rival solver at the same cost, and ours.

Everything is measured here and now: milliseconds are the median of interleaved rounds of the whole pipeline call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from rapid3rt.pipeline import accelerate, report, restore
from rapid3rt.policies import is_rule, parse
from rapid3rt.policies.budget import with_speed
from rapid3rt.runtime.report import Report
from rapid3rt.tiny import GUIDANCE
from rapid3rt.tiny.rivals import find_solver, solver
from rapid3rt.tiny.scenes import Scene, sample
from rapid3rt.tiny.score import score

STEPS = 28
MAX_TOKENS = 32
"""A caption's tokens: the pipeline's default of 256 would only add silent ones."""
SEED = 2025
SPEED = 4.5
"""Plain steps over ours, where nothing else is asked for."""
_SCALE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to make the batch. images: float32 `[n, 3, 64, 64]` in 0..1; ms: of the whole call, median."""

    name: str
    nfe: float
    images: torch.Tensor
    ms: float

    def psnr(self, other: Row) -> np.ndarray:
        """Peak signal-to-noise ratio per image in dB, against another row's images."""
        return -10 * np.log10(np.maximum(self.error(other) / 4, 1e-12))

    def error(self, other: Row) -> np.ndarray:
        """Mean squared error per image, pixels in -1..1."""
        return ((self.images - other.images).square().mean((1, 2, 3)) * 4).numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo measured. rows: plain, plain at the same cost, the rival, ours, in this order."""

    scenes: list[Scene]
    rows: list[Row]
    report: Report

    @property
    def speedup(self) -> float:
        """Plain call's time over ours."""
        return self.rows[0].ms / self.rows[-1].ms


def run(
    pipe: Any, policy: str, speed: float | None, rival: str, rounds: int = 3, seed: int = SEED
) -> Demo:
    """Make the batch in all four ways. rounds: how often each is timed, interleaved.

    speed: as `accelerate` takes it; None is `SPEED`, for a policy that fixes its evaluations itself nothing.
    """
    find_solver(rival)
    speed = speed if speed is not None else _usual_speed(policy)
    scenes = pick_scenes(seed)
    prompts = [s.caption for s in scenes]

    def call(steps: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        images: torch.Tensor = pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
            max_sequence_length=MAX_TOKENS,
        ).images
        return images.float()

    def ours() -> torch.Tensor:
        accelerate(pipe, policy, speed=speed)
        try:
            images = call(STEPS)
            reports.append(report(pipe))
        finally:
            restore(pipe)
        return images

    def rival_call() -> torch.Tensor:
        with solver(pipe, rival):
            return call(steps)

    reports: list[Report] = []
    ours()  # warms up, and says how many evaluations the others get
    mean = sum(i.nfe for i in reports[0].images) / len(prompts)
    steps = math.ceil(mean)
    ways: list[tuple[str, float, Callable[[], torch.Tensor]]] = [
        (f"plain, {STEPS} steps", STEPS, lambda: call(STEPS)),
        (f"plain, {steps} steps", steps, lambda: call(steps)),
        (f"{rival}, {steps} steps", steps, rival_call),
        ("rapid3rt", mean, ours),
    ]
    images: list[torch.Tensor] = [torch.empty(0)] * len(ways)
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for i, (_, _, way) in enumerate(ways):
            start = time.perf_counter()
            images[i] = way()
            times[i].append(1000 * (time.perf_counter() - start))
    rows = [
        Row(name=name, nfe=nfe, images=image, ms=median(t))
        for (name, nfe, _), image, t in zip(ways, images, times, strict=True)
    ]
    return Demo(scenes=scenes, rows=rows, report=reports[-1])


def _usual_speed(policy: str) -> float | None:
    if policy == "auto" or not is_rule(policy):
        return SPEED
    rule = parse(policy)
    try:
        with_speed(rule, SPEED)
    except ValueError:
        return None
    return SPEED


def pick_scenes(seed: int) -> list[Scene]:
    """Eight test scenes from easy to hard."""
    drawn = sorted(sample(64, seed), key=lambda s: (s.difficulty, s.caption))
    return [drawn[round(i * (len(drawn) - 1) / 7)] for i in range(8)]


def tables(demo: Demo) -> tuple[list[list[str]], list[list[str]]]:
    """Cells of the two tables: per way (with a header), per image of our row (with a header)."""
    plain, ours = demo.rows[0], demo.rows[-1]
    ways = [["way", "NFE", "ms", "speed-up", "score", "MSE x1e3", "PSNR dB"]]
    for row in demo.rows:
        quality = (
            ["-", "-"]
            if row is plain
            else [f"{1000 * row.error(plain).mean():.2f}", f"{row.psnr(plain).mean():.1f}"]
        )
        points = score(row.images, demo.scenes).mean()
        ways.append(
            [
                row.name,
                f"{row.nfe:.3g}",
                f"{row.ms:.0f}",
                f"{plain.ms / row.ms:.2f}x",
                f"{points:.3f}",
                *quality,
            ]
        )
    per_image = [["scene", "NFE", "equiv. steps", "ms", "score", "MSE x1e3", "PSNR dB"]]
    points, errors, psnr = score(ours.images, demo.scenes), ours.error(plain), ours.psnr(plain)
    for i, (entry, scene) in enumerate(zip(demo.report.images, demo.scenes, strict=True)):
        milliseconds = "-" if entry.ms is None else f"{entry.ms:.0f}"
        objects = f"{len(scene.objects)} object{'s' * (len(scene.objects) > 1)}"
        cells = [f"{entry.nfe}", f"{entry.equivalent_steps:.1f}", milliseconds, f"{points[i]:.2f}"]
        name = f"{i + 1}: {objects}, {scene.texture}"
        per_image.append([name, *cells, f"{1000 * errors[i]:.2f}", f"{psnr[i]:.1f}"])
    return ways, per_image


def draw_comparison(demo: Demo, path: Path) -> None:
    """The side-by-side picture: two columns of four prompts, each plain, plain at the same cost, ours."""
    from PIL import Image, ImageDraw, ImageFont

    shown = [demo.rows[0], demo.rows[1], demo.rows[-1]]
    side, gap, foot, head = 64 * _SCALE, 8, 44, 34
    block = 3 * side + 2 * gap
    width, height = 2 * block + 3 * 3 * gap, 4 * (side + foot) + head + 3 * gap
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    small, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    psnr = shown[-1].psnr(shown[0])
    for i, scene in enumerate(demo.scenes):
        left = 3 * gap + (i // 4) * (block + 3 * gap)
        top = head + (i % 4) * (side + foot)
        for j, row in enumerate(shown):
            pixels = (row.images[i].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(picture, (left + j * (side + gap), top))
            if i % 4 == 0:
                pen.text((left + j * (side + gap), top - 24), row.name, "black", bold)
        entry = demo.report.images[i]
        spared = 1 - entry.equivalent_steps / STEPS
        words = scene.caption if len(scene.caption) <= 66 else scene.caption[:63] + "..."
        pen.text((left, top + side + 3), words, "#555555", small)
        note = f"{entry.nfe} of {STEPS} evaluations, {spared:.0%} spared, {psnr[i]:.1f} dB to plain"
        pen.text((left, top + side + 20), note, "black", small)
    canvas.save(path)

# SPDX-License-Identifier: Apache-2.0
"""What is asked of a cell of the matrix. The tests ask it, and so does the script that writes the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from cases import TICKS, Row
from makers import Arguments, Change, Images, calls_per_tick

import rapid3rt
from rapid3rt.types import COMPUTE, REUSE, ComputeDecision, DenoiseState, Run, StepDecision

TOLERANCE = 1e-5  # float32 rounding, GEMMs of other shapes included (DESIGN.md, R2)
ROUNDING = {torch.float32: TOLERANCE, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Unlike:
    """The two images never do the same: one computes where the other reuses.

    leaves_grid: the first walks the pipeline's grid and ends early, the second stands off it until the last tick;
    else both walk the grid to its end. images: whose decisions to take, so that an image alone decides as it does in
    the batch.
    """

    reuses = True
    computes = ("crcr", "crrc")
    factors = (0.8, 0.7, 0.6, 0.0)  # of the sigma that the second image is at

    def __init__(self, images: Images, leaves_grid: bool) -> None:
        self.images, self.leaves_grid = images, leaves_grid
        self.name = "unlike images"

    def begin(self, run: Run) -> None:
        assert run.images == len(self.images)
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        words = [self.computes[i % 2][state.tick % 4] for i in self.images]
        action = torch.tensor([COMPUTE if w == "c" else REUSE for w in words], dtype=torch.int8)
        return ComputeDecision(action=action, sparsity=torch.zeros(len(words), dtype=torch.int32))

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        following = self.sigmas[state.step.long() + 1]
        if self.leaves_grid:
            early = state.tick >= len(self.sigmas) - 3
            first = torch.zeros_like(following) if early else following
            second = state.sigma * self.factors[state.tick]
            odd = torch.tensor([i % 2 == 1 for i in self.images])
            following = torch.where(odd, second, first)
        return StepDecision(next_sigma=following)


@cache
def _plain(
    made: Callable[[str], Any],
    change: Change | None,
    given: Callable[[str, Images], Arguments],
    kind: str,
    images: Images,
) -> tuple[torch.Tensor, int]:
    row = Row(group="", name="", make=made, change=change, given=given)
    pipe = row.pipeline(kind)
    return row.run(pipe, kind, images), pipe.num_timesteps


def plain(row: Row, kind: str, images: Images | None = None) -> tuple[torch.Tensor, int]:
    """Latents of the plain pipeline, and the ticks of its run: a strength makes it shorter."""
    return _plain(row.make, row.change, row.given, kind, images or row.images)


@contextmanager
def accelerated(row: Row, pipe: Any, policy: Any) -> Iterator[None]:
    """The row's pipeline under a policy; it is restored whatever happens, since other rows may share it."""
    rapid3rt.accelerate(pipe, policy)
    try:
        if row.after:
            assert row.change is not None
            row.change(pipe)
        yield
    finally:
        rapid3rt.restore(pipe)


def dense_is_plain(row: Row, kind: str) -> None:
    """Told to compute everything, the accelerated pipeline equals the plain one bit for bit; so it does restored."""
    expected, _ = plain(row, kind)
    assert torch.isfinite(expected).all()
    if row.used is None:
        _check_that_it_matters(row, kind, expected)
    ours = row.pipeline(kind, is_accelerated=True)
    with accelerated(row, ours, "dense"):
        calls = row.used(ours) if row.used else [1]
        got = row.run(ours, kind)
        report = rapid3rt.report(ours)
    assert calls
    if row.per_call:
        assert len(calls) == TICKS * calls_per_tick(kind)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert [image.nfe for image in report.images] == [report.trace.ticks] * len(row.images)
    again = row.pipeline(kind) if row.wears else ours
    assert torch.equal(row.run(again, kind), expected)


def _check_that_it_matters(row: Row, kind: str, expected: torch.Tensor) -> None:
    """A row whose feature changes nothing tests nothing."""
    other = row.run_without(kind)
    moved = 1.0
    if other.shape == expected.shape:
        moved = distance(other, expected)
    assert (moved <= TOLERANCE) if row.same else (moved >= row.least), moved


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def is_refused(row: Row, kind: str) -> None:
    """One clear line instead of a wrong image, and nothing is left of the try."""
    pipe = row.pipeline(kind, is_accelerated=True)
    parts = dict(pipe.components)
    with pytest.raises(rapid3rt.UnsupportedError, match=re.escape(row.refused)) as refusal:
        _try(row, pipe, kind)
    assert "\n" not in str(refusal.value)
    assert all(part is parts[name] for name, part in pipe.components.items())


def _try(row: Row, pipe: Any, kind: str) -> None:
    with accelerated(row, pipe, "dense"):
        assert row.after or row.at_call, "accelerate must refuse"
        row.run(pipe, kind)


def unlike_images_do_not_meet(row: Row, kind: str) -> None:
    """Images that reuse, compute and end at different ticks: each ends, below the ticks, as it would alone."""
    if row.refuses_steps:
        with pytest.raises(rapid3rt.UnsupportedError, match=row.refuses_steps) as refusal:
            _unlike(row, kind, row.images, leaves_grid=True)
        assert "\n" not in str(refusal.value)
    expected, ticks = plain(row, kind)
    got, report = _unlike(row, kind, row.images)
    assert torch.isfinite(got).all()
    assert got.shape == expected.shape
    assert all(0 < image.nfe < ticks for image in report.images)
    assert all(image[-1].next_sigma == report.trace.sigmas[-1] for image in report.trace.images)
    for i in row.images if row.splits else ():
        single, _ = _unlike(row, kind, (i,))
        assert distance(single, got[i : i + 1]) <= ROUNDING[expected.dtype], i


def _unlike(
    row: Row, kind: str, images: Images, leaves_grid: bool | None = None
) -> tuple[torch.Tensor, Any]:
    pipe = row.pipeline(kind, is_accelerated=True)
    leaves_grid = not row.refuses_steps if leaves_grid is None else leaves_grid
    with accelerated(row, pipe, Unlike(images, leaves_grid)):
        return row.run(pipe, kind, images), rapid3rt.report(pipe)

# SPDX-License-Identifier: Apache-2.0
"""What policies share: the scheduler's shift, a warp of it, grids of both, batch decisions.

Grids are made once per run, on the host, in float64, and rounded to float32; per tick everything
stays on the device and nothing is read back. Shape letter: B images.
"""

from __future__ import annotations

import bisect
import itertools
import math
from array import array
from collections.abc import Sequence
from typing import TypeVar

import torch

from rapid3rt.types import (
    ADAMS_BASHFORTH,
    AUTO,
    EULER,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)

Scalar = TypeVar("Scalar", float, torch.Tensor)

# A free step below this sigma goes to 0 at once (METHOD.md, section 1).
SIGMA_MIN = 0.01
_TABLE_POINTS = 1025


def shift_sigma(u: Scalar, shift: float) -> Scalar:
    """phi(u) = s u / (1 + (s - 1) u): the scheduler's shift of the uniform time u in 0..1."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Scalar, shift: float) -> Scalar:
    """The inverse of phi: u = sigma / (s - (s - 1) sigma)."""
    return sigma / (shift - (shift - 1) * sigma)


class Warp:
    """A monotone map w of 0..1 onto itself: PCHIP through (0, 0), interior knots and (1, 1).

    No knots: the identity. Raises `ValueError` unless the knots rise strictly in both coordinates
    inside (0, 1).
    """

    def __init__(self, knots: Sequence[tuple[float, float]] = ()) -> None:
        self.knots = tuple((float(u), float(w)) for u, w in knots)
        points = ((0.0, 0.0), *self.knots, (1.0, 1.0))
        if not all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(points)):
            msg = f"knots must rise strictly in u and w inside (0, 1), got {self.knots}"
            raise ValueError(msg)
        self._x = [u for u, _ in points]
        self._y = [w for _, w in points]
        self._slope = _pchip_slopes(self._x, self._y)

    def __call__(self, u: float) -> float:
        """w(u); values outside 0..1 are clamped."""
        if not 0.0 < u < 1.0:
            return min(max(u, 0.0), 1.0)
        i = bisect.bisect_right(self._x, u) - 1
        h = self._x[i + 1] - self._x[i]
        t = (u - self._x[i]) / h
        return (
            (1 + 2 * t) * (1 - t) ** 2 * self._y[i]
            + t * (1 - t) ** 2 * h * self._slope[i]
            + t * t * (3 - 2 * t) * self._y[i + 1]
            + t * t * (t - 1) * h * self._slope[i + 1]
        )

    def inverse(self, w: float) -> float:
        """The u with w(u) = w, by bisection to float64 resolution."""
        low, high = 0.0, 1.0
        if not low < w < high:
            return min(max(w, low), high)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self(middle) < w else (low, middle)
        return high


def _pchip_slopes(x: list[float], y: list[float]) -> list[float]:
    """Slopes of Fritsch and Butland: a weighted harmonic mean inside, limited at the ends."""
    h = [b - a for a, b in itertools.pairwise(x)]
    d = [(b - a) / step for a, b, step in zip(y, y[1:], h, strict=False)]
    if len(d) == 1:
        return [d[0], d[0]]
    inner = [
        (h0 + 2 * h1 + 2 * h0 + h1) / ((h0 + 2 * h1) / d0 + (2 * h0 + h1) / d1)
        for h0, h1, d0, d1 in zip(h, h[1:], d, d[1:], strict=False)
    ]
    first, last = _end_slope(h[0], h[1], d[0], d[1]), _end_slope(h[-1], h[-2], d[-1], d[-2])
    return [first, *inner, last]


def _end_slope(h0: float, h1: float, d0: float, d1: float) -> float:
    slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
    return min(max(slope, 0.0), 3 * d0)  # within these bounds the end piece stays monotone


def round_float32(values: Sequence[float]) -> tuple[float, ...]:
    """Each value rounded to float32, as Python floats."""
    return tuple(array("f", values))


def trimmed_sigmas(k: int, run: Run, warp: Warp | None = None) -> tuple[float, ...]:
    """The grid of k even steps in u from the run's first sigma: k + 1 float32 values, the last 0.

    sigma_j = phi(w(u_0 (1 - j / k))), phi(w(u_0)) the run's first sigma, w the identity without a
    warp. Unlike the pipeline's own k-step grid it spends no evaluation on a last interval next to
    0.
    """
    start = unshift_sigma(run.sigmas[0], run.shift)
    if warp is None:
        warp = Warp()
    u_start = warp.inverse(start)
    inner = [shift_sigma(warp(u_start * (1 - j / k)), run.shift) for j in range(1, k)]
    return round_float32([run.sigmas[0], *inner, 0.0])


def device_list(values: Sequence[float], run: Run) -> torch.Tensor:
    """float32 values on the run's device, `[len(values)]`."""
    return torch.tensor(values, dtype=torch.float32, device=run.device)


def next_from_list(sigmas: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Each image's own next sigma from one list.

    sigmas: float32 `[K + 1]`, entry j where step j starts. step: int32 `[B]`. Returns float32
    `[B]`; past the end, the last entry. Stays on the device.
    """
    return sigmas[(step.long() + 1).clamp(max=sigmas.numel() - 1)]


def interpolate(x: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Piecewise linear interpolation on the device.

    x: `[B]`; xs: `[N]` rising strictly; ys: `[N]`. Outside the table the nearest end's value.
    """
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, xs.numel() - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0)).clamp(0, 1)


class WarpedTime:
    """u and sigma = phi(w(u)) of one run, each from the other, on the device; both `[B]` float32.

    w: the identity without a warp. sigma (table) and u (table): float32 `[1025]`, rising.
    """

    def __init__(self, run: Run, warp: Warp | None = None) -> None:
        warp = warp or Warp()
        u = [i / (_TABLE_POINTS - 1) for i in range(_TABLE_POINTS)]
        self.u_table = device_list(u, run)
        self.sigma_table = device_list([shift_sigma(warp(x), run.shift) for x in u], run)

    def u(self, sigma: torch.Tensor) -> torch.Tensor:
        """Where a sigma lies."""
        return interpolate(sigma, self.sigma_table, self.u_table)

    def sigma(self, u: torch.Tensor) -> torch.Tensor:
        """The sigma at u; below the smallest sensible one, 0 (METHOD.md, section 1)."""
        sigma = interpolate(u, self.u_table, self.sigma_table)
        return sigma.masked_fill(sigma < SIGMA_MIN, 0.0)


def compute_all(state: DenoiseState) -> ComputeDecision:
    """Every image computes, densely."""
    return ComputeDecision(
        action=torch.zeros_like(state.nfe, dtype=torch.int8),
        sparsity=torch.zeros_like(state.nfe, dtype=torch.int32),
    )


def step_to(next_sigma: torch.Tensor, order: int) -> StepDecision:
    """Send every image to its next sigma at one order."""
    same = None if order == EULER else torch.full_like(next_sigma, order, dtype=torch.int8)
    return StepDecision(next_sigma=next_sigma, order=same)


def evaluations_at(ticks: int, speed: float) -> int:
    """What a speed means where nothing was calibrated: max(1, floor(ticks / speed))."""
    return max(1, math.floor(ticks / speed))


def planned_evaluations(run: Run, budget: int | None, speed: float | None = None) -> int:
    """Evaluations per image: the least of the run's ticks, its budget, `budget`, ticks / `speed`.

    At least 1. A budget above the ticks is clamped here: the range is checked where the pipeline's
    own number of steps is known, and only a strength shortens a run below it.
    """
    limits = [run.ticks]
    limits += [limit for limit in (run.budget, budget) if limit is not None]
    limits += [evaluations_at(run.ticks, speed)] if speed is not None else []
    return max(1, min(limits))


def order_suffix(order: int) -> str:
    """How the name of a policy says its order; nothing for Euler."""
    return {AUTO: "/auto", EULER: "", ADAMS_BASHFORTH: "/ab2"}[order]


def check_order(order: int) -> int:
    """Return `order`. Raises `ValueError` unless it is 0 (auto), 1 (Euler) or 2 (Adams-Bashforth)."""
    if order not in (AUTO, EULER, ADAMS_BASHFORTH):
        msg = f"order must be 0 (auto), 1 (Euler) or 2 (Adams-Bashforth), got {order!r}"
        raise ValueError(msg)
    return order


def check_family(expected: str, run: Run, what: str) -> None:
    """Raise `ValueError` unless the run's model family is the one `what` was made for."""
    if run.family != expected:
        msg = f"family must be '{expected}', for which {what} was made, got '{run.family}'"
        raise ValueError(msg)

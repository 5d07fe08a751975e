# SPDX-License-Identifier: Apache-2.0
"""How strongly the evaluations of an image should follow the detail that it is going to show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rapid3rt.calibrate.measure import Bench, Stop
from rapid3rt.policies import ScheduleFamily, WarpFamily
from rapid3rt.policies.allocation import LEAST, MOST, Allocation, limits
from rapid3rt.policies.base import interpolate

TABLE_STEPS = (4, 5, 6, 8, 10, 14)
_DIAL = (5, 6, 8, 10, 12, 14)
_AIMS = (6, 8, 10)
_STRENGTHS = tuple(0.05 * i for i in range(1, 11))
_PLANNED_AT = 0.75
"""u near which the strength is chosen: a quarter of the way is gone."""
_DRAWS = 1000
_LEAST_GAIN = 0.01
"""Of the mean error, on a log scale: less is not worth a schedule that nobody can foresee."""


def allocate(bench: Bench, family: WarpFamily) -> tuple[WarpFamily, dict[str, float]]:
    """The family with an allocation, where one pays, and the mean squared error at every k under it (else empty)."""
    ks = [k for k in TABLE_STEPS if k <= bench.steps]
    errors = {k: bench.family_errors(family, k) for k in ks}
    table = fit(bench.walk(family), errors)
    if table is None:
        return family, {}
    ends = ((1.0, 1.0), (float(bench.steps), float(bench.steps)))
    guidance, lifts = bench.tilts(family)
    tilts = _lifts_at([u for u, _, _ in table], lifts)
    rows = tuple((*row, tilt) for row, tilt in zip(table, tilts, strict=True))
    allocated = replace(family, allocation=Allocation(table=rows, dial=ends, guidance=guidance))
    dial, means = [], []
    for b in (b for b in _DIAL if b <= bench.steps):
        policy = ScheduleFamily(allocated, speed=bench.steps / b)
        key = f"allocation of {LEAST} to {MOST} {table}"
        dial.append((float(b), bench.evaluations(policy, b, key)))
        means.append(float(bench.errors(policy, b, key).mean()))
    if not all(here[1] < after[1] for here, after in itertools.pairwise(dial)):
        return family, {}
    at = torch.tensor([m for _, m in dial], dtype=torch.float64)
    inside = {str(k): k for k in ks if at[0] <= k <= at[-1]}
    row = {name: _between(float(k), at, torch.tensor(means)) for name, k in inside.items()}
    return replace(
        family, allocation=Allocation(table=rows, dial=tuple(dial), guidance=guidance)
    ), row


def _lifts_at(us: Sequence[float], lifts: Sequence[tuple[float, float]]) -> list[float]:
    """Linear between the u that were measured, the nearest one's beyond them; 0 where there are none."""
    if not lifts:
        return [0.0] * len(us)
    xs, ys = (torch.tensor(column) for column in zip(*lifts, strict=True))
    return interpolate(torch.tensor(us), xs, ys).tolist()


def fit(
    stops: Sequence[Stop], errors: Mapping[int, torch.Tensor]
) -> tuple[tuple[float, float, float], ...] | None:
    """Rows (u, offset, exponent) of an `Allocation`, u rising; None where no allocation is sure to lower the error.

    errors: of every image at some numbers of evaluations, `[n]` each. At every u the log error is regressed on detail,
    shrunk by what chance could have made of it. One strength for all u is then chosen by reading the errors at the
    evaluations that it would give; it must help in 19 of 20 redraws of the images.
    """
    ks = torch.tensor(sorted(errors), dtype=torch.float64)
    logs = torch.stack([errors[int(k)].clamp(min=1e-12).log() for k in ks])
    if logs.shape[1] < 4 or len(ks) < 2:
        return None
    hardness = (logs - logs.mean(1, keepdim=True)).mean(0)
    details = [torch.tensor(stop.detail, dtype=torch.float64) for stop in stops]
    slopes = [_slope(detail, hardness) for detail in details]
    chosen = min(range(len(stops)), key=lambda i: abs(stops[i].u - _PLANNED_AT))
    expected = slopes[chosen] * (details[chosen] - details[chosen].mean())
    gains = {strength: _gain(strength * expected, ks, logs) for strength in _STRENGTHS}
    strength = max(gains, key=lambda s: float(gains[s].mean()))
    if float(gains[strength].quantile(0.05)) <= _LEAST_GAIN:
        return None
    rows = []
    for stop, detail, slope in zip(stops, details, slopes, strict=True):
        exponent = strength * slope
        # The offset keeps the mean over images of what they are given at the mean that was asked for.
        surplus = (exponent * (detail - detail.mean())).exp().mean().log()
        offset = detail.mean() + surplus / exponent if exponent else detail.mean()
        rows.append((stop.u, float(offset), float(exponent)))
    return tuple(sorted(rows))


def _slope(detail: torch.Tensor, hardness: torch.Tensor) -> float:
    """Of hardness over detail, times 1 - 1 / t^2 of its t statistic, at least 0."""
    x, y = detail - detail.mean(), hardness - hardness.mean()
    spread = float((x * x).sum())
    if spread == 0:
        return 0.0
    slope = float((x * y).sum()) / spread
    variance = float((y - slope * x).square().sum()) / (len(x) - 2) / spread
    return slope * max(0.0, 1 - variance / slope**2) if slope > 0 else 0.0


def _gain(log_factor: torch.Tensor, ks: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Log of the mean error without over that with an allocation, mean over the aims: one number for each redraw."""
    n = len(log_factor)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(n, (_DRAWS, n), generator=generator)
    gains = []
    for aim in _AIMS:
        low, high = math.log(aim) - 3, math.log(aim) + 3
        for _ in range(60):  # the setting whose clipped evaluations have this mean
            middle = (low + high) / 2
            given = (middle + log_factor).exp().clamp(*limits(aim, 10**6))
            low, high = (low, middle) if given.mean() > aim else (middle, high)
        with_it = torch.stack([_log_between(float(k), ks, logs[:, i]) for i, k in enumerate(given)])
        without = torch.stack([_log_between(float(aim), ks, logs[:, i]) for i in range(n)])
        gains.append((without.exp()[picks].mean(1) / with_it.exp()[picks].mean(1)).log())
    return torch.stack(gains).mean(0)


def _between(k: float, ks: torch.Tensor, values: torch.Tensor) -> float:
    return math.exp(float(_log_between(k, ks, values.double().log())))


def _log_between(k: float, ks: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Log error at k, linear in log k between the measured ones and beyond them."""
    right = int((ks < k).sum().clamp(1, len(ks) - 1))
    share = (math.log(k) - ks[right - 1].log()) / (ks[right] / ks[right - 1]).log()
    return logs[right - 1] + share * (logs[right] - logs[right - 1])

# SPDX-License-Identifier: Apache-2.0
"""Runs as arrays, and which of their metrics belong in one panel. Nothing here draws."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from training.metrics import DIFFICULTY, METRICS, Name, read_lines

Array = np.ndarray[Any, np.dtype[np.float64]]

COMPANIONS = ("_floor", "_prior")
"""A metric whose name ends so is drawn dotted, with the metric that it bounds or is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run wrote. iterations: `[N]`. values: name to `[N]`, NaN where a row has none. difficulty: `[M, 4]` of
    iteration, difficulty, nfe, dial."""

    name: str
    iterations: Array
    values: dict[str, Array]
    difficulty: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Metrics that share axes. keys: their names in the order of drawing. log: of the vertical axis. level: a line to
    compare with; `dial` draws one at each metric's own number."""

    title: str
    keys: tuple[str, ...]
    log: bool = False
    level: float | str | None = None


_PANELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (r"discriminator/[^@]+", "discriminator", {}),
    (r"discriminator/auc@.+", "discriminator: AUC by NFE", {"level": 0.5}),
    (r"reward/.+", "reward", {}),
    (r"cost/E(@.+)?", "equivalent steps E by dial (dotted: the dial)", {"level": "dial"}),
    (r"cost/nfe(@.+)?", "NFE by dial", {}),
    (r"quality/m(@.+)?", "error m by dial (dotted: the prior's)", {"log": True}),
    (r"quality/m_over_prior(@.+)?", "error m over the prior's, by dial", {"level": 1.0}),
    (r"entropy/.+", "entropy, nat (dotted: floor)", {}),
    (r".*dead.*", "dead groups", {"level": 0.0}),
    (r".*clip_frac.*", "clip fraction", {"level": 0.0}),
    (r"(.*[/_])?kl(_.*)?", "KL per live decision", {"level": 0.0}),
    (r".*grad(ient)?_norm.*", "gradient norm", {"log": True}),
    (r"time/.+", "seconds per iteration", {}),
)
_ORDER = tuple(title for _, title, _ in (*_PANELS[2:-1], *_PANELS[:2]))
HEADS = "heads"


def read_run(folder: Path) -> Run:
    """Raises `ValueError` in one line for a folder that holds no metrics."""
    path = folder / METRICS
    if not path.is_file():
        raise ValueError(f"RUN must be a folder with a {METRICS}, got {str(folder)!r}")
    rows = read_lines(path)
    names = dict.fromkeys(key for row in rows for key in row if key != "iteration")
    if not names:
        raise ValueError(f"{path}: content must be at least one row of metrics, got none")
    for name in names:
        Name.parse(name)
    iterations = np.array([row["iteration"] for row in rows], dtype=np.float64)
    values = {name: _column(rows, name, path) for name in names}
    return Run(
        name=folder.resolve().name,
        iterations=iterations,
        values=values | _over_prior(values),
        difficulty=_read_difficulty(folder / DIFFICULTY),
    )


def choose_panels(runs: Sequence[Run]) -> list[Panel]:
    """Panels of the metrics that are there: known ones in a fixed order, then one per unknown group, then time."""
    panels: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.values):
        name = Name.parse(key)
        if (name.group == HEADS and name.at is not None) or is_companion(key, runs):
            continue
        title, options = _place(key, name)
        panels.setdefault(title, ([], options))[0].append(key)
    last = _PANELS[-1][1]
    unknown = [title for title in panels if title not in _ORDER and title != last]
    order = [title for title in (*_ORDER, *unknown, last) if title in panels]
    return [Panel(title=t, keys=_sorted(panels[t][0]), **panels[t][1]) for t in order]


def companion(key: str, runs: Sequence[Run]) -> str | None:
    """The metric that is drawn dotted with this one, if a run has it."""
    name, at, number = key.partition("@")
    candidates = [f"{name}{ending}{at}{number}" for ending in COMPANIONS]
    return next((c for c in candidates if any(c in run.values for run in runs)), None)


def is_companion(key: str, runs: Sequence[Run]) -> bool:
    """Whether a metric is drawn with another one."""
    name, at, number = key.partition("@")
    owners = [f"{name.removesuffix(e)}{at}{number}" for e in COMPANIONS if name.endswith(e)]
    return any(owner in run.values for owner in owners for run in runs)


def common(iterations: Sequence[Array]) -> Array:
    """Iterations that all have, so that no mean jumps where a run ends; those of any where no two overlap."""
    shared = reduce(np.intersect1d, iterations)
    return np.unique(shared if len(shared) else np.concatenate(iterations))


def mean(runs: Sequence[Run], key: str) -> tuple[Array, Array]:
    """Iterations that all runs with this metric have, and its mean over those with a number there, else NaN."""
    having = [run for run in runs if key in run.values]
    iterations = common([run.iterations for run in having])
    table = np.full((len(having), len(iterations)), np.nan)
    for row, run in zip(table, having, strict=True):
        _, here, there = np.intersect1d(iterations, run.iterations, return_indices=True)
        row[here] = run.values[key][there]
    return iterations, nan_mean(table)


def joined(iterations: Array, values: Array) -> tuple[Array, Array]:
    """As given, but for what is measured now and then, in fewer than half of the rows: without the gaps between."""
    known = np.isfinite(values)
    if known.sum() * 2 >= len(values):
        return iterations, values
    return iterations[known], values[known]


def smooth(values: Array, rows: int) -> Array:
    """Mean over an odd number of rows around each, over fewer at the ends. NaN stays a gap."""
    half = rows // 2
    near = np.full((rows, len(values)), np.nan)
    for row, shift in zip(near, range(-half, half + 1), strict=True):
        there = np.arange(len(values)) + shift
        inside = (there >= 0) & (there < len(values))
        row[inside] = values[there[inside]]
    return np.where(np.isnan(values), np.nan, nan_mean(near))


def window(runs: Sequence[Run]) -> int:
    """Rows that one smoothed value is the mean of: a twentieth of the longest run, an odd number."""
    return max(len(run.iterations) for run in runs) // 40 * 2 + 1


def nan_mean(table: Array) -> Array:
    """Mean over the first axis of what is a number; NaN where nothing is."""
    count = (~np.isnan(table)).sum(0)
    total: Array = np.nansum(table, 0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def binned(rows: Array, bins: int = 5) -> Array:
    """Difficulty, mean NFE and its standard error (0 for one image) in quantiles of difficulty: `[bins, 3]`."""
    rows = rows[np.argsort(rows[:, 1], kind="stable")]
    parts = [part for part in np.array_split(rows, bins) if len(part)]
    return np.array(
        [(part[:, 1].mean(), part[:, 2].mean(), _standard_error(part[:, 2])) for part in parts]
    )


def _standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _column(rows: Iterable[dict[str, Any]], name: str, path: Path) -> Array:
    values = [row.get(name) for row in rows]
    for value in values:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not is_number:
            raise ValueError(f"{path}: {name} must be a number or null, got {value!r}")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(
                f"{path}: {name} must be a number that a float holds, got a longer one"
            )
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _read_difficulty(path: Path) -> Array:
    """Rows without a number in every field are left out: they say nothing about who gets how much."""
    if not path.is_file():
        return np.empty((0, 4))
    rows = read_lines(path)
    columns = [_column(rows, name, path) for name in ("iteration", "difficulty", "nfe", "dial")]
    table = np.stack(columns, axis=1)
    return table[~np.isnan(table).any(axis=1)]


def _over_prior(values: dict[str, Array]) -> dict[str, Array]:
    """A tenth less error is a hair on a logarithmic axis that holds all dials, and plain as a ratio."""
    ratios = {}
    for key, prior in values.items():
        if key.startswith("quality/m_prior") and (own := key.replace("_prior", "", 1)) in values:
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = values[own] / prior
            ratios[key.replace("_prior", "_over_prior", 1)] = np.where(
                np.isfinite(ratio), ratio, np.nan
            )
    return ratios


def _place(key: str, name: Name) -> tuple[str, dict[str, Any]]:
    for pattern, title, options in _PANELS:
        if re.fullmatch(pattern, key):
            return title, options
    return (name.group if name.at is None else f"{name.group}: {name.name}"), {}


def _sorted(keys: list[str]) -> tuple[str, ...]:
    """By their number where they have one, else as they came."""
    at = {key: Name.parse(key).at for key in keys}
    return tuple(sorted(keys, key=lambda key: (at[key] is not None, at[key] or 0.0)))

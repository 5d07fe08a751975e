# SPDX-License-Identifier: Apache-2.0
"""Curves of a run, or of several seeds together: `python -m training.plot RUN [RUN ...] [--out FILE]`.

Reads `metrics.jsonl` and, where it is there, `difficulty.jsonl`. Thin lines are the rows of each run, thick ones the
mean of the runs, smoothed, over the iterations that all of them have. What a run did not log is left out. No pyplot:
nothing global, no window.
"""

from __future__ import annotations

import argparse
import math
import secrets
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from training.curves import (
    HEADS,
    Panel,
    Run,
    binned,
    choose_panels,
    common,
    companion,
    joined,
    mean,
    read_run,
    smooth,
    window,
)
from training.metrics import Name

_INK, _FAINT, _GRID = "#2b2b2b", "#8a8a85", "#e8e8e4"
_HUES = ("#1f4e79", "#d1603d", "#2e7d8c", "#b08900", "#7a4fa3", "#5a8f3c", "#c2477f", "#6b6b6b")
_COLUMNS, _WIDE, _TALL = 3, 4.4, 3.1
_LITERAL = {"parse_math": False}  # names are a user's words: a dollar sign is no formula


def draw(runs: Sequence[Run], out: Path) -> None:
    """Write the picture, beside and then renamed; the ending of `out` says the format. Makes its folder.

    Raises `ImportError` in one line without matplotlib, `ValueError` if there is nothing to draw or for an ending that
    is no format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install 'rapid3rt[plot]'") from None
    panels = _painters(runs)
    if not panels:
        raise ValueError("runs must hold at least one metric, got none")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (_WIDE * columns, _TALL * rows + 0.7)
    figure = Figure(figsize=size, dpi=130, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    ending = out.suffix.removeprefix(".")
    if ending not in canvas.get_supported_filetypes():
        raise ValueError(f"--out must end in a format such as .png, .pdf or .svg, got {str(out)!r}")
    figure.suptitle(_title(runs), x=0.01, ha="left", fontsize=11, color=_INK, **_LITERAL)
    for i, paint in enumerate(panels):
        paint(figure.add_subplot(rows, columns, i + 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{secrets.token_hex(8)}")
    try:
        figure.savefig(scratch, format=ending)
        scratch.replace(out)
    finally:
        scratch.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Every error of the user is one line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.plot",
        description="Draw the curves of one run, or of several seeds.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        help="picture to write; by default curves.png in the folder, of several runs beside the first",
    )
    options = parser.parse_args(arguments)
    first = options.runs[0].resolve()
    out = options.out or (first if len(options.runs) == 1 else first.parent) / "curves.png"
    try:
        draw([read_run(folder) for folder in options.runs], out)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"plot: {error}")
    print(out)


def _painters(runs: Sequence[Run]) -> Sequence[Callable[[Any], None]]:
    """What draws each panel, in order."""
    painters = [partial(_paint_curves, panel=panel, runs=runs) for panel in choose_panels(runs)]
    names = {key: Name.parse(key) for run in runs for key in run.values}
    heads = dict.fromkeys(n.name for n in names.values() if n.group == HEADS and n.at is not None)
    painters += [partial(_paint_head, head=head, runs=runs) for head in sorted(heads)]
    if any(len(run.difficulty) for run in runs):
        painters.append(partial(_paint_difficulty, runs=runs))
    return painters


def _paint_curves(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    colours = _colours(panel.keys)
    for key, colour in zip(panel.keys, colours, strict=True):
        iterations, values = mean(runs, key)
        for run in runs:
            if key in run.values:
                rows = joined(run.iterations, run.values[key])
                axes.plot(*rows, color=colour, lw=0.7, alpha=0.35)
        axes.plot(
            *joined(iterations, smooth(values, window(runs))),
            color=colour,
            lw=1.7,
            label=_label(key, panel),
            **_dot(values),
        )
        beside = companion(key, runs)
        if beside is not None:
            axes.plot(*joined(*mean(runs, beside)), color=colour, lw=1.1, ls=":")
        if panel.level == "dial" and (dial := Name.parse(key).at) is not None:
            axes.axhline(dial, color=colour, lw=1.1, ls=":")
    if isinstance(panel.level, float):
        axes.axhline(panel.level, color=_FAINT, lw=0.8, zorder=0)
    if panel.log and any(
        (run.values[key] > 0).any() for run in runs for key in panel.keys if key in run.values
    ):
        _log_scale(axes)
    _finish(axes, panel.title, "iteration", legend=len(panel.keys) > 1)


def _paint_head(axes: Any, head: str, runs: Sequence[Run]) -> None:
    """The head's mean residual over sigma at the first, the middle and the last iteration."""
    keys = {
        Name.parse(key).at: key
        for run in runs
        for key in run.values
        if key.startswith(f"{HEADS}/{head}@")
    }
    sigmas = sorted(sigma for sigma in keys if sigma is not None)
    iterations = mean(runs, keys[sigmas[0]])[0]
    moments = list(dict.fromkeys((0, len(iterations) // 2, len(iterations) - 1)))
    for i, colour in zip(moments, ("#b9cbdc", "#6b93b8", "#1f4e79")[-len(moments) :], strict=True):
        curve = [_near(runs, keys[sigma], iterations[i]) for sigma in sigmas]
        axes.plot(
            sigmas, curve, "o-", color=colour, ms=3, lw=1.6, label=f"iteration {iterations[i]:.0f}"
        )
    axes.axhline(0, color=_FAINT, lw=0.8, zorder=0)
    axes.invert_xaxis()
    _finish(axes, f"{HEADS}: {head.replace('_', ' ')}", "sigma, from noise to image", legend=True)


def _near(runs: Sequence[Run], key: str, iteration: float) -> float:
    """The smoothed value at an iteration, NaN where the metric has no row."""
    iterations, values = mean(runs, key)
    found = smooth(values, window(runs))[iterations == iteration]
    return float(found[0]) if len(found) else math.nan


def _paint_difficulty(axes: Any, runs: Sequence[Run]) -> None:
    """Mean NFE by difficulty for each dial, over the last quarter of the iterations that all runs have."""
    tables = [run.difficulty for run in runs if len(run.difficulty)]
    iterations = common([table[:, 0] for table in tables])
    rows = np.concatenate(tables)
    since, until = iterations[-max(1, len(iterations) // 4)], iterations[-1]
    rows = rows[(rows[:, 0] >= since) & (rows[:, 0] <= until)]
    dials = np.unique(rows[:, 3])
    for dial, colour in zip(dials, _shades(len(dials)), strict=True):
        x, y, error = binned(rows[rows[:, 3] == dial]).T
        axes.errorbar(
            x, y, error, color=colour, fmt="o-", ms=3, lw=1.5, elinewidth=1, label=f"{dial:g}"
        )
    title = f"NFE by difficulty and dial, iterations {since:.0f} to {until:.0f}"
    _finish(axes, title, "difficulty (bars: standard error)", legend=True)


def _finish(axes: Any, title: str, xlabel: str, *, legend: bool) -> None:
    """Title, and the legend between it and the axes, where no curve can run into it."""
    handles, labels = axes.get_legend_handles_labels()
    pad = 6.0
    if legend:
        columns = max(1, min(len(labels), 60 // (max(map(len, labels), default=0) + 5)))
        style = {"frameon": False, "fontsize": 7, "handlelength": 1.2, "columnspacing": 1.0}
        style |= {"borderaxespad": 0.1, "borderpad": 0.2, "labelspacing": 0.3, "handletextpad": 0.4}
        box = axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **style
        )
        for text in box.get_texts():
            text.set(color=_INK, **_LITERAL)
        pad += 10.5 * -(-len(labels) // columns)
    axes.set_title(title, loc="left", fontsize=9, weight="bold", color=_INK, pad=pad, **_LITERAL)
    axes.set_xlabel(xlabel, fontsize=8, color=_INK)
    axes.tick_params(labelsize=7, colors=_INK, length=3)
    axes.grid(axis="y", color=_GRID, lw=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _log_scale(axes: Any) -> None:
    """Ticks in plain numbers, also where the axis spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _colours(keys: Sequence[str]) -> list[Any]:
    """Shades in order for numbered metrics, hues for named ones."""
    numbered = [key for key in keys if Name.parse(key).at is not None]
    if len(keys) - len(numbered) > len(_HUES):
        return _shades(len(keys))
    shades, hues = iter(_shades(len(numbered))), iter(_HUES)
    return [next(shades if key in numbered else hues) for key in keys]


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * i / max(1, count - 1)) for i in range(count)]


def _label(key: str, panel: Panel) -> str:
    """As short as it can be among the panel's others."""
    name = Name.parse(key)
    if name.at is not None:
        return f"{name.at:g}"
    text = name.name.replace("_", " ")
    groups = {Name.parse(other).group for other in panel.keys}
    return text if len(groups) == 1 else f"{name.group} {text}"


def _dot(values: Any) -> dict[str, Any]:
    """A single point is no line: it is marked."""
    return {"marker": "o", "ms": 3} if np.isfinite(values).sum() == 1 else {}


def _title(runs: Sequence[Run]) -> str:
    names = ", ".join(run.name for run in runs)
    names = names if len(names) <= 90 else f"{names[:87]}..."
    rows = window(runs)
    over = f", smoothed over {rows} rows" if rows > 1 else ""
    thick = "their mean" if len(runs) > 1 else "the same"
    return f"{names}   (thin: rows, thick: {thick}{over})"


if __name__ == "__main__":
    main()

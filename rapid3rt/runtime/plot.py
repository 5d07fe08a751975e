# SPDX-License-Identifier: Apache-2.0
"""The picture of a report: per image and tick what was done; below, each way down in sigma.

Needs matplotlib (`rapid3rt[plot]`). No pyplot: drawing touches no global state and opens no window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapid3rt.types import ACTION_NAMES, COMPUTE, REUSE

if TYPE_CHECKING:
    from rapid3rt.runtime.report import Action, Report

_DENSE = "#1f4e79"
_LEVELS = ("#2e7d8c", "#4fa39a", "#86c5a4")  # sparser is lighter
_REUSE, _FORECAST, _DONE = "#f2c879", "#e0965c", "#f1f1ee"
_INK, _FAINT = "#2b2b2b", "#8a8a85"
# Labels and policies are a user's words: a dollar sign is one, and no start of a formula.
_LITERAL = {"parse_math": False}
# Beyond this many images the rows carry no numbers and the labels thin out.
_ROWS_WITH_TEXT = 24


def draw_report(report: Report, path: Path, labels: Sequence[str] | None = None) -> None:
    """Write the picture; makes its folder.

    Raises `ImportError` without matplotlib, `ValueError` for a wrong number of labels.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        msg = "plot needs matplotlib: pip install 'rapid3rt[plot]'"
        raise ImportError(msg) from None
    images, ticks = len(report.images), report.trace.ticks
    if labels is not None and len(labels) != images:
        msg = f"labels must have one entry per image ({images}), got {len(labels)}"
        raise ValueError(msg)
    names = [_shorten(label) for label in labels] if labels else [str(i) for i in range(images)]
    margin = 0.55 + 0.068 * max(map(len, names))
    width = max(7.5, 0.3 * ticks + margin + 1.8)
    rows = min(max(0.34 * images, 0.34), 12.0)
    height = rows + 2.2 + 1.75
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def place(bottom: float, tall: float) -> Any:
        box = (margin / width, bottom / height, (width - margin - 1.7) / width, tall / height)
        return figure.add_axes(box)

    ways = place(0.5, 2.2)
    grid = place(0.5 + 2.2 + 0.45, rows)
    _draw_grid(grid, report, names)
    _draw_ways(ways, report)
    top = height - 0.2
    style: dict[str, Any] = {"color": _INK, "fontsize": 11, "weight": "bold", "va": "top"}
    style |= _LITERAL
    figure.text(0.2 / width, top / height, _title(report), **style)
    _draw_legend(figure, report, (0.12 / width, (top - 0.2) / height))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_grid(axes: Any, report: Report, names: list[str]) -> None:
    from matplotlib.patches import Rectangle

    images, ticks = len(report.images), report.trace.ticks
    text = images <= _ROWS_WITH_TEXT
    for row, image in enumerate(report.images):
        for tick, action in enumerate(image.actions):
            corner, colour = (tick + 0.04, row + 0.08), _colour(action)
            axes.add_patch(Rectangle(corner, 0.92, 0.84, facecolor=colour, linewidth=0))
            if text and action.kind != "done":
                shade = "white" if colour in (_DENSE, _LEVELS[0]) else _INK
                style = {"color": shade, "fontsize": 5.5, "ha": "center", "va": "center"}
                axes.text(tick + 0.5, row + 0.5, _sigma(action.sigma), **style)
        if text:
            share = f"{image.nfe} nfe" + ("" if image.ms is None else f"   {image.ms:.0f} ms")
            dot = {"color": _line_colour(row, images), "markersize": 4.5, "clip_on": False}
            axes.plot(ticks + 0.45, row + 0.5, "o", **dot)
            axes.text(ticks + 0.9, row + 0.5, share, color=_INK, fontsize=8, va="center")
    axes.set(xlim=(0, ticks), ylim=(images, 0))
    every = max(1, -(-images // 30))
    rows = [row + 0.5 for row in range(0, images, every)]
    axes.set_yticks(rows, names[::every], fontsize=8, **_LITERAL)
    axes.set_xticks([])
    axes.tick_params(length=0, colors=_INK)
    _frame(axes, ())


def _draw_ways(axes: Any, report: Report) -> None:
    for row, ticks in enumerate(report.trace.images):
        sigmas = [tick.sigma for tick in ticks] + [tick.next_sigma for tick in ticks[-1:]]
        colour = _line_colour(row, len(report.images))
        axes.plot(range(len(sigmas)), sigmas, color=colour, linewidth=1.3, alpha=0.85)
        computed = [t for t, tick in enumerate(ticks) if tick.action == COMPUTE]
        axes.plot(computed, [sigmas[t] for t in computed], "o", color=colour, markersize=2.8)
    axes.set(xlim=(0, report.trace.ticks), ylim=(0, None))
    axes.set_xlabel("tick", color=_INK, fontsize=9)
    axes.set_ylabel("sigma (dots: computed)", color=_INK, fontsize=9)
    axes.tick_params(labelsize=8, colors=_INK, length=3)
    axes.grid(axis="y", color="#e4e4e0", linewidth=0.6)
    axes.set_axisbelow(True)
    _frame(axes, ("left", "bottom"))


def _draw_legend(figure: Any, report: Report, corner: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    actions = [action for image in report.images for action in image.actions]
    shown = {_legend(action): _colour(action) for action in actions}
    order = sorted(shown, key=lambda name: (name == "done", not name.startswith("compute"), name))
    patches = [Patch(facecolor=shown[name], label=name) for name in order]
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=corner,
        ncols=len(patches),
        frameon=False,
        fontsize=8.5,
        handlelength=1.2,
        columnspacing=1.4,
        labelcolor=_INK,
    )


def _frame(axes: Any, keep: tuple[str, ...]) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(_FAINT)


def _colour(action: Action) -> str:
    if action.kind == ACTION_NAMES[COMPUTE]:
        return _LEVELS[min(action.level, len(_LEVELS)) - 1] if action.level else _DENSE
    return {ACTION_NAMES[REUSE]: _REUSE, "done": _DONE}.get(action.kind, _FORECAST)


def _line_colour(row: int, images: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * row / max(1, images - 1))


def _legend(action: Action) -> str:
    if action.kind == ACTION_NAMES[COMPUTE] and action.level:
        return f"compute, sparsity level {min(action.level, len(_LEVELS))}"
    return action.kind.replace("_", " ")


def _title(report: Report) -> str:
    costs = "equivalent steps (estimated)" if report.estimated else "equivalent steps"
    faster = f", {report.speedup:.2f}x faster than plain" if report.speedup is not None else ""
    steps = f"{report.equivalent_steps:.1f} {costs} of {report.trace.ticks}"
    return f"{report.policy}: {report.nfe:.1f} nfe, {steps}{faster}"


def _sigma(sigma: float) -> str:
    return (f"{sigma:.2f}" if sigma >= 0.01 else f"{sigma:.3f}").removeprefix("0")


def _shorten(label: str, limit: int = 42) -> str:
    line = " ".join(label.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."

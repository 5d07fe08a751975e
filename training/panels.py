# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation. All but the grid of images are drawn from the document alone.

Needs matplotlib (`rapid3rt[plot]`). No pyplot: drawing touches no global state and opens no window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.comparison import OURS, SEARCHED

Json = Mapping[str, Any]
_INK, _FAINT, _GRID = "#2b2b2b", "#8a8a85", "#e4e4e0"
_STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#c8452f", "linewidth": 2.4, "marker": "o", "markersize": 6, "zorder": 5},
    SEARCHED: {"color": "#1f4e79", "linewidth": 1.8, "marker": "s", "markersize": 4.5, "zorder": 4},
    "prior": {"color": "#4f8fc0", "linestyle": "--", "marker": "s", "markersize": 4},
    "controller": {"color": "#2e8c7d", "linestyle": "-", "marker": "D", "markersize": 4},
    "threshold": {"color": "#86c5a4", "linestyle": "-", "marker": "D", "markersize": 4},
    "plain": {"color": "#2b2b2b", "linestyle": ":", "marker": "o", "markersize": 4},
    "steps/trim": {"color": "#77776f", "linestyle": ":", "marker": "o", "markersize": 4},
    "steps/trim/auto": {"color": "#a58bc4", "linestyle": "--", "marker": "^", "markersize": 5},
    "steps/trim/ab2": {"color": "#cbb9dd", "linestyle": "--", "marker": "^", "markersize": 5},
    "DPM++ 2M": {"color": "#d99a2b", "linestyle": "-.", "marker": "v", "markersize": 5},
    "UniPC": {"color": "#e5bd72", "linestyle": "-.", "marker": "v", "markersize": 5},
    "DEIS": {"color": "#8f6a2a", "linestyle": "-.", "marker": "v", "markersize": 5},
    "cache-dit": {"color": "#9a3f86", "linestyle": "-", "marker": "X", "markersize": 5},
    "FirstBlockCache": {"color": "#c77fb6", "linestyle": "-", "marker": "X", "markersize": 5},
    "TaylorSeer": {"color": "#dfb3d5", "linestyle": "-", "marker": "X", "markersize": 5},
}
_OTHER = {"color": "#b0568b", "linestyle": "-", "marker": "x", "markersize": 5}
_IMAGE_SCALE = 3
_MOST = 60
"""Per cent, the right edge of the panels of differences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of the grid. images: by way, float32 `[3, h, w]` in -1..1; notes: a line under each."""

    caption: str
    images: tuple[torch.Tensor, ...]
    notes: tuple[str, ...]


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def draw_all(document: Json, folder: Path) -> list[Path]:
    """Every plot of the document that has something to show; returns the files."""
    parts: dict[str, Callable[[Json], Any]] = {
        "error": error_over_cost,
        "against": against_rivals,
        "adaptivity": adaptivity,
    }
    if _kinds(document):
        parts["strata"] = strata
    files = []
    for name, draw in parts.items():
        files.append(folder / f"{name}.png")
        _save(draw(document), files[-1])
    return files


def error_over_cost(document: Json) -> Any:
    """Error over equivalent steps of every way, with 95 % intervals, and the error of the plain full run."""
    figure = _figure(8.6, 5.4)
    axes = figure.subplots()
    curves = {n: c for n, c in document["ways"].items() if n != "full"}
    lines = {name: _rows(curve.values()) for name, curve in curves.items()}
    for i, (name, rows) in enumerate(lines.items()):
        _curve(axes, name, rows, place=i)
    full = document["ways"]["full"]["error"]["value"]
    axes.axhline(full, color=_FAINT, linewidth=1, linestyle=(0, (6, 3)), zorder=1)
    axes.annotate(
        "plain 28 steps",
        (0, full),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=8,
        color=_FAINT,
    )
    bottom = min([full, *(row[1] for rows in lines.values() for row in rows)])
    top = max(row[1] for row in lines["plain"])
    axes.set_ylim(bottom / 1.4, top * 1.8)  # a solver that breaks down leaves through the top
    _logarithmic(axes, [row[0] for rows in lines.values() for row in rows])
    axes.set_xlabel("equivalent steps, mean over images")
    axes.set_ylabel("mean squared error to the converged solution")
    _legend(axes, "center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def against_rivals(document: Json) -> Any:
    """Relative difference of the error of ours to every rival's at equal cost: a panel per dial."""
    dials = [f"{k:g}" for k in document["settings"]["dials"]]
    rivals = list(document["against"])
    figure = _figure(1.8 + 1.9 * len(dials), 1.1 + 0.32 * len(rivals))
    panels = figure.subplots(1, len(dials), sharey=True, sharex=True, squeeze=False)[0]
    for axes, dial in zip(panels, dials, strict=True):
        axes.axvline(0, color=_INK, linewidth=0.8)
        for row, name in enumerate(rivals):
            answer = document["against"][name].get(dial, {})
            if "difference" in answer:
                _difference(axes, row, answer, _style(name)["color"])
        axes.set_title(f"dial {dial}", fontsize=9, color=_INK)
        axes.set_xlim(-105, _MOST + 5)
        _plain(axes, grid="x")
    panels[0].set_yticks(range(len(rivals)), rivals)
    panels[0].set_ylim(len(rivals) - 0.4, -0.6)
    figure.supxlabel(
        "error of ours relative to it at equal cost, % (filled: holds after Holm's correction)",
        fontsize=9,
        color=_INK,
    )
    return figure


def _difference(axes: Any, row: int, answer: Json, colour: str) -> None:
    """One interval; what lies beyond the panel is an arrow at its edge."""
    value, low, high = (100 * x for x in _span(answer["difference"]))
    face = colour if answer["better"] or answer["worse"] else "white"
    axes.plot([min(low, _MOST), min(high, _MOST)], [row, row], color=colour, linewidth=1.8)
    mark = "o" if value <= _MOST else ">"
    axes.plot(min(value, _MOST), row, mark, color=colour, markerfacecolor=face, markersize=6)


def adaptivity(document: Json) -> Any:
    """Share of head-room and gain over shuffled plans per dial; cost against difficulty."""
    figure = _figure(10.5, 3.9)
    shares, gains, costs = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    dials = [f"{k:g}" for k in document["settings"]["dials"]]
    rooms = [document["head_room"][dial] for dial in dials]
    won = [room["share"] for room in rooms]
    there = [room["head_room"] for room in rooms]
    groups = [("head-room", there, "#bcd0e0"), ("share of it won", won, _style(OURS)["color"])]
    _bars(shares, groups, dials)
    shares.set_title("an oracle on the searched family", fontsize=9, color=_INK)
    shares.set_ylabel("%", color=_INK)
    whole = [document["shuffled"].get(dial, {}).get("relative_gain") for dial in dials]
    alone = [document["shuffled_allocation"].get(d, {}).get("relative_gain") for d in dials]
    groups = [("whole plan", whole, "#2e8c7d"), ("allocation, looked up", alone, "#bfe0d2")]
    _bars(gains, groups, dials)
    gains.set_title("gain of the own plan over another's", fontsize=9, color=_INK)
    _cost_over_difficulty(costs, document["difficulty"])
    return figure


def _bars(
    axes: Any, groups: Sequence[tuple[str, list[Json | None], str]], dials: list[str]
) -> None:
    """Bars with intervals side by side; what is None leaves a gap."""
    width, top, bottom = 0.8 / len(groups), 1.0, 0.0
    for i, (name, spans, colour) in enumerate(groups):
        offset = (i - (len(groups) - 1) / 2) * width
        axes.bar(0, 0, 0, color=colour, label=name)
        for x, span in enumerate(spans):
            if span is not None:
                value, low, high = (100 * v for v in _span(span))
                axes.bar(x + offset, value, 0.94 * width, color=colour)
                axes.plot([x + offset] * 2, [low, high], color=_INK, linewidth=1)
                top, bottom = max(top, high), min(bottom, low)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_xticks(range(len(dials)), dials)
    axes.set_xlabel("dial", color=_INK)
    axes.set_xlim(-0.6, len(dials) - 0.4)
    axes.set_ylim(1.1 * bottom, top + 0.28 * (top - bottom))  # room for the legend
    _plain(axes, grid="y")
    _legend(axes, "upper left")


def _cost_over_difficulty(axes: Any, difficulty: Json) -> None:
    from matplotlib import colormaps

    dials = difficulty["dials"]
    for i, (dial, answer) in enumerate(dials.items()):
        colour = colormaps["viridis"](0.85 * i / max(1, len(dials) - 1))
        x = [1000 * b["hardness"] for b in answer["bins"]]
        axes.fill_between(
            x,
            [b["tenth"] for b in answer["bins"]],
            [b["ninth"] for b in answer["bins"]],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
        ratio = answer["hardest_over_easiest"]["value"]
        label = f"dial {dial}: {ratio:.2f}x"
        axes.plot(
            x, [b["cost"] for b in answer["bins"]], "o-", color=colour, label=label, markersize=4
        )
    axes.set_xscale("log")
    axes.set_xlabel(f"error of the searched family at {difficulty['at']}, in 1e-3", color=_INK)
    axes.set_ylabel("equivalent steps", color=_INK)
    axes.set_title("cost by difficulty (hardest over easiest third)", fontsize=9, color=_INK)
    _plain(axes, grid="both")
    _legend(axes, "best")


def strata(document: Json) -> Any:
    """Error over cost within every kind of scene of which there are pairs enough."""
    kinds = _kinds(document)
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = _figure(3.4 * columns, 2.9 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, stratum in zip(panels, kinds, strict=False):
        for i, (name, points) in enumerate(stratum["curves"].items()):
            _curve(axes, name, points, place=i)
        _logarithmic(axes, [x for points in stratum["curves"].values() for x, *_ in points])
        axes.set_title(f"{stratum['name']} ({stratum['pairs']} pairs)", fontsize=9, color=_INK)
        plain = [y for _, y, _, _ in stratum["curves"].get("plain", [])]
        if plain:
            least = min(y for points in stratum["curves"].values() for _, y, _, _ in points)
            axes.set_ylim(least / 1.5, max(plain) * 2)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes in panels[: len(kinds)]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(6, len(handles)),
        frameon=False,
        fontsize=8,
    )
    figure.supxlabel("equivalent steps, mean over the images of the kind", fontsize=9, color=_INK)
    figure.supylabel("mean squared error", fontsize=9, color=_INK)
    return figure


def _kinds(document: Json) -> list[Json]:
    return [s for s in document["strata"] if s["by"] == "kind" and "curves" in s]


def draw_grid(examples: Sequence[Example], titles: Sequence[str], path: Path) -> None:
    """Images side by side, a pair to a row of the left or the right half, easy to hard."""
    from PIL import Image, ImageDraw, ImageFont

    side = _IMAGE_SCALE * examples[0].images[0].shape[-1]
    gap, foot, head, margin = 8, 46, 34, 22
    block = len(titles) * (side + gap) - gap
    rows = -(-len(examples) // 2)
    size = (2 * block + 3 * margin, head + rows * (side + foot) + margin // 2)
    canvas = Image.new("RGB", size, "white")
    pen, small, bold = (
        ImageDraw.Draw(canvas),
        ImageFont.load_default(12),
        ImageFont.load_default(15),
    )
    for i, example in enumerate(examples):
        left, top = margin + (i // rows) * (block + margin), head + (i % rows) * (side + foot)
        for j, image in enumerate(example.images):
            x = left + j * (side + gap)
            pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, top))
            if i % rows == 0:
                pen.text((x, head - 24), titles[j], _INK, bold)
            pen.text((x, top + side + 3), example.notes[j], _INK, small)
        pen.text((left, top + side + 20), _fit(example.caption, small, block), _FAINT, small)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _fit(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _style(name: str) -> dict[str, Any]:
    return {"linewidth": 1.3, **_STYLES.get(name, _OTHER)}


def _curve(axes: Any, name: str, rows: Sequence[Sequence[float]], place: int) -> None:
    """A line through [cost, error, low, high]. Intervals of rivals stand beside each other, by their place."""
    style = _style(name)
    x, y, low, high = np.array(sorted(map(list, rows))).T
    aside = 1.0 if name in (OURS, SEARCHED) else 1.002 + 0.0025 * place
    axes.vlines(aside * x, low, high, color=style["color"], linewidth=0.9, alpha=0.7)
    axes.plot(x, y, label=name, **style)


def _rows(points: Iterable[Json]) -> list[list[float]]:
    return [[point["cost"]["value"], *_span(point["error"])] for point in points]


def _span(span: Json) -> tuple[float, float, float]:
    return span["value"], span["low"], span["high"]


def _logarithmic(axes: Any, costs: Iterable[float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    seen = list(costs)
    ticks = [
        k
        for k in (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 28)
        if min(seen) * 0.97 <= k <= max(seen) * 1.03
    ]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    _plain(axes, grid="both")


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)


def _legend(axes: Any, place: str, **more: Any) -> None:
    axes.legend(loc=place, frameon=False, fontsize=8, labelcolor=_INK, **more)

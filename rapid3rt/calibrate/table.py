# SPDX-License-Identifier: Apache-2.0
"""What calibration gained: error over evaluations, as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from rapid3rt.calibrate.allocate import TABLE_STEPS
from rapid3rt.calibrate.measure import Bench
from rapid3rt.policies import Steps, WarpFamily
from rapid3rt.types import ADAMS_BASHFORTH, AUTO


def before_and_after(
    bench: Bench, family: WarpFamily, allocated: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Mean squared errors: rows of schedules, columns of k."""
    rows: dict[str, dict[str, float]] = {}
    ks = [k for k in TABLE_STEPS if k <= bench.steps]
    for k in tqdm(ks, desc="before and after", disable=not bench.progress):
        column = {
            "plain": bench.errors(Steps(k), k, "steps"),
            "trim": bench.errors(Steps(k, trim=True), k, "trim"),
            "trim/ab2": bench.errors(Steps(k, trim=True, order=ADAMS_BASHFORTH), k, "trim/ab2"),
            "trim/auto": bench.errors(Steps(k, trim=True, order=AUTO), k, "trim/auto"),
            "calibrated": bench.family_errors(family, k),
        }
        for name, errors in column.items():
            rows.setdefault(name, {})[str(k)] = float(errors.mean())
    if allocated:
        rows["calibrated, per image"] = dict(allocated)
    return rows


def format_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of schedules, columns of k, errors in 1e-3."""
    columns = list(next(iter(table.values())))  # the last row may lack some at the ends
    lines = ["mean squared error to the converged solution, in 1e-3"]
    lines.append(f"{'k':<22}" + "".join(f"{c:>9}" for c in columns))
    for name, row in table.items():
        lines.append(
            f"{name:<22}"
            + "".join(f"{1000 * row[c]:>9.3f}" if c in row else f"{'':>9}" for c in columns)
        )
    return "\n".join(lines)


def plot(table: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Error over k, if matplotlib is there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    styles = (":", "--", "-.", (0, (1, 3)), "-", "-")
    for (name, row), style in zip(table.items(), styles, strict=False):
        axes.plot(
            [int(k) for k in row], list(row.values()), linestyle=style, marker="o", label=name
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ks = [int(k) for k in next(iter(table.values()))]
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("mean evaluations of an image")
    axes.set_ylabel("mean squared error to converged")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_figure(path, dpi=130)

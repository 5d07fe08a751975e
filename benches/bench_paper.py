# SPDX-License-Identifier: Apache-2.0
"""The ablations of RAPID^3 on the tiny world: what each reward, each head and each algorithm makes of the same start.

    python benches/bench_paper.py [--out runs/paper] [--banks runs/banks] [--only NAME ...] [--seeds SEED ...]
                                  [--save NAME] [--plot FILE]

Trains `tiny-sd3-paper` once for each line and seed, all lines of a seed on the same prompts and noises: three heads
from nothing, Euler steps, the paper's reward w(K) (q + omega d), one ratio per trajectory. Runs that are there are gone
on with, so the command may be stopped. Prints a table of means over the seeds, the least and the largest in brackets,
and writes `results/NAME.json` and a picture of evaluations over iterations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from record import save

ITERATIONS = 40
SHARED = ["--dtype", "bfloat16", "--groups", "3", "--iterations", str(ITERATIONS)]
SHARED += ["--evaluate-every", "20"]
SHARED += ["--learning-rate", "5e-4", "--validation-pairs", "64"]
ABLATIONS: dict[str, tuple[str, list[str]]] = {
    "qd": ("three heads, Q + D, GRPO, lambda 0.97", []),
    "q": ("reward Q alone", ["--omega", "0"]),
    "d": ("reward D alone", ["--quality"]),
    "step": ("step head alone", ["--heads", "step"]),
    "step-cache": ("step and cache", ["--heads", "step", "cache"]),
    "step-sparse": ("step and sparse", ["--heads", "step", "sparse"]),
    "rloo": ("RLOO", ["--advantage", "rloo"]),
    "lambda90": ("lambda 0.90", ["--discount", "0.9"]),
}
ENDS = 10
"""Iterations at either end of a run whose mean is shown."""


def train(name: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one ablation to its end, unless it has come to it; its metrics, a row per iteration.

    What stops a run stops this, with its message.
    """
    out = options.out / f"{name}-{seed}"
    metrics = out / "metrics.jsonl"
    if not ((out / "policy" / "config.json").exists() and len(read(metrics)) == ITERATIONS):
        command = [sys.executable, "-m", "training.run", "tiny-sd3-paper", "--out", str(out)]
        command += ["--seed", str(seed), "--banks", str(options.banks), "--resume", "auto"]
        command += [*SHARED, *ABLATIONS[name][1]]
        if options.threads is not None:
            command += ["--threads", str(options.threads)]
        status = subprocess.run(command, check=False).returncode
        if status:
            sys.exit(status)
    return read(metrics)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the first and the last iterations, and what the validation pairs say at the end."""

    def mean(key: str, part: Sequence[dict[str, Any]]) -> float | None:
        values = [row[key] for row in part if row.get(key) is not None]
        return fmean(values) if values else None

    first, last = rows[:ENDS], rows[-ENDS:]
    measured = [row for row in rows if "quality/m" in row]
    return {
        "E_first": mean("cost/E", first),
        "E_last": mean("cost/E", last),
        "nfe_last": mean("cost/nfe", last),
        "scene_first": mean("reward/scene_continuous", first),
        "scene_last": mean("reward/scene_continuous", last),
        "realism_last": mean("reward/realism", last),
        "rollout_m_last": mean("rollout/m", last),
        "validation_m": measured[-1]["quality/m"],
        "validation_E": measured[-1]["quality/E"],
        "entropy_last": {
            head: mean(f"entropy/{head}", last)
            for head in ("step", "cache", "sparse")
            if f"entropy/{head}" in rows[-1]
        },
        "E": [round(row["cost/E"], 3) for row in rows],
    }


Results = dict[str, dict[int, dict[str, Any]]]
"""What `summarise` makes of each run: name, then seed."""


def table(results: Results) -> str:
    """Markdown: means over the seeds, the least and the largest in brackets."""

    def cell(seeds: dict[int, dict[str, Any]], key: str, digits: int, unit: float = 1.0) -> str:
        values = [unit * run[key] for run in seeds.values() if run[key] is not None]
        if not values:
            return "-"
        mean, low, high = (f"{f(values):.{digits}f}" for f in (fmean, min, max))
        return mean if len(values) == 1 else f"{mean} ({low} .. {high})"

    lines = [
        "| | E, first 10 | E, last 10 | scene score, last 10 | m on validation, 1e-3 | E there |",
        "|---|---|---|---|---|---|",
    ]
    columns = (
        ("E_first", 1, 1.0),
        ("E_last", 1, 1.0),
        ("scene_last", 3, 1.0),
        ("validation_m", 2, 1000.0),
        ("validation_E", 1, 1.0),
    )
    for name, seeds in results.items():
        cells = " | ".join(cell(seeds, *column) for column in columns)
        lines.append(f"| {ABLATIONS[name][0]} | {cells} |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Evaluations over iterations, mean and range of the seeds: rewards left, heads and algorithms right."""
    import matplotlib.pyplot as plt

    groups = ("qd", "q", "d", "lambda90"), ("qd", "step", "step-cache", "step-sparse", "rloo")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axes, names, title in zip(panels, groups, ("reward", "heads and algorithm"), strict=True):
        for name in names:
            if name not in results:
                continue
            curves = [smoothed(run["E"]) for run in results[name].values()]
            over = range(1, ITERATIONS + 1)
            at = list(zip(*curves, strict=True))
            (line,) = axes.plot(over, [fmean(values) for values in at], label=ABLATIONS[name][0])
            low, high = [min(values) for values in at], [max(values) for values in at]
            axes.fill_between(over, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="iteration", ylim=(0, None))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("equivalent steps (mean of five)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with the four before it."""
    return [fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder of the runs")
    parser.add_argument("--banks", type=Path, default=Path("runs/banks"))
    parser.add_argument("--only", nargs="+", choices=tuple(ABLATIONS), default=tuple(ABLATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--threads", type=int, default=None, help="threads of a run")
    parser.add_argument("--save", default=None, help="name of the record")
    parser.add_argument("--plot", type=Path, default=None, help="picture")
    options = parser.parse_args()
    results: Results = {name: {} for name in options.only}
    for seed in options.seeds:
        for name in options.only:
            results[name][seed] = summarise(train(name, seed, options))
    print(table(results))
    if options.plot is not None:
        draw(results, options.plot)
    if options.save is not None:
        print(save(options.save, {"shared": SHARED, "results": results}))


if __name__ == "__main__":
    main()

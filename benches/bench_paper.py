# SPDX-License-Identifier: Apache-2.0
"""The ablations of RAPID^3 on the tiny world: what each reward, each head and each algorithm makes of the same start.

    python benches/bench_paper.py [--out runs/paper] [--banks runs/banks] [--only NAME ...] [--save NAME] [--plot FILE]

Trains `tiny-sd3-paper` once for each line, on the same prompts and noises: three heads from nothing, Euler steps, the
paper's reward w(K) (q + omega d), one ratio per trajectory. Runs that are there are gone on with, so the command may be
stopped. Prints a table, and writes `results/NAME.json` and a picture of evaluations over iterations. One seed each: the
shape is what is compared, differences of a few per cent mean nothing.
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


def train(name: str, options: argparse.Namespace) -> None:
    """Run one ablation to its end; nothing where it has come to it. What stops a run stops this, with its message."""
    out = options.out / name
    done = (out / "policy" / "config.json").exists() and len(read(name, options)) == ITERATIONS
    if done:
        return
    command = [sys.executable, "-m", "training.run", "tiny-sd3-paper", "--out", str(out)]
    command += ["--banks", str(options.banks), "--resume", "auto", *SHARED, *ABLATIONS[name][1]]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def read(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A run's metrics, a row per iteration."""
    lines = (options.out / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the first and the last iterations, and what the validation pairs say at the end."""

    def mean(key: str, part: Sequence[dict[str, Any]]) -> float | None:
        values = [row[key] for row in part if row.get(key) is not None]
        return fmean(values) if values else None

    first, last = rows[:ENDS], rows[-ENDS:]
    measured = [row for row in rows if "quality/m" in row]
    return {
        "iterations": len(rows),
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


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | E, first 10 | E, last 10 | scene score, last 10 | m on validation, 1e-3 | E there |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        score = result["scene_last"]
        lines.append(
            f"| {ABLATIONS[name][0]} | {result['E_first']:.1f} | {result['E_last']:.1f} | "
            f"{'-' if score is None else f'{score:.3f}'} | {1000 * result['validation_m']:.2f} | "
            f"{result['validation_E']:.1f} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Evaluations over iterations: rewards on the left, heads and algorithms on the right."""
    import matplotlib.pyplot as plt

    groups = ("qd", "q", "d", "lambda90"), ("qd", "step", "step-cache", "step-sparse", "rloo")
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axes, names, title in zip(panels, groups, ("reward", "heads and algorithm"), strict=True):
        for name in names:
            if name not in results:
                continue
            values = results[name]["E"]
            smooth = [fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            axes.plot(range(1, len(values) + 1), smooth, label=ABLATIONS[name][0])
        axes.set(title=title, xlabel="iteration")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("equivalent steps (mean of five)")
    panels[0].set_ylim(0, 1.05 * max(max(results[name]["E"]) for name in results))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder of the runs")
    parser.add_argument("--banks", type=Path, default=Path("runs/banks"))
    parser.add_argument("--only", nargs="+", choices=tuple(ABLATIONS), default=tuple(ABLATIONS))
    parser.add_argument("--save", default=None, help="name of the record")
    parser.add_argument("--plot", type=Path, default=None, help="picture")
    options = parser.parse_args()
    results = {}
    for name in options.only:
        train(name, options)
        results[name] = summarise(read(name, options))
    print(table(results))
    if options.plot is not None:
        draw(results, options.plot)
    if options.save is not None:
        print(save(options.save, {"shared": SHARED, "results": results}))


if __name__ == "__main__":
    main()

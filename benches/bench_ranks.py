# SPDX-License-Identifier: Apache-2.0
"""How training scales over ranks: the same iterations on one process of one thread and on two, taken by turns.

    python benches/bench_ranks.py [--ranks 1 2] [--iterations 8] [--rounds 2] [--banks runs/banks] [--save NAME]

Trains `tiny-sd3` for a few iterations by torchrun and compares the seconds of an iteration: rollouts, rewards and
update of the first rank, waiting for the others included; the first iteration of each run is left out. Leave the
machine alone meanwhile: it needs as many idle cores as the largest number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from record import save

RECIPE = [
    "tiny-sd3",
    "--threads",
    "1",
    "--validation-pairs",
    "16",
    "--calibration-pairs",
    "16",
    "--evaluate-every",
    "1000",
]
PHASES = ("rollout", "reward", "update", "discriminator")


def train(ranks: int, out: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """One run; returns its metrics, a row per iteration. A run that fails ends this, with its message."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += [f"--nproc-per-node={ranks}", sys.executable, "-m", "training.run", *RECIPE]
    command += ["--dtype", options.dtype, "--iterations", str(options.iterations)]
    command += ["--banks", str(options.banks), "--out", str(out)]
    status = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=False
    )
    if status.returncode:
        sys.exit(status.returncode)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def seconds(rows: Sequence[dict[str, float]], phase: str) -> list[float]:
    """Of every iteration but the first."""
    return [row[f"time/{phase}"] for row in rows[1:]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    add("--iterations", type=int, default=8, help="of each run")
    add("--rounds", type=int, default=2, help="runs of each number")
    add("--dtype", default="float32", help="of the generator")
    add("--banks", type=Path, default=Path("runs/banks"), help="where reference banks are kept")
    add("--save", help="write benches/results/NAME.json")
    options = parser.parse_args(arguments)
    rows: dict[int, list[list[dict[str, float]]]] = {ranks: [] for ranks in options.ranks}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds):
            for ranks in options.ranks:
                print(f"round {i + 1} of {options.rounds}: {ranks} ranks", flush=True)
                rows[ranks].append(train(ranks, Path(folder) / f"{ranks}-{i}", options))
    results = summarise(rows)
    for line in results["ranks"]:
        phases = "  ".join(f"{name} {line[name]:.2f} s" for name in PHASES)
        print(
            f"{line['ranks']} ranks  {line['iteration']:.2f} s  {line['speedup']:.2f}x   {phases}"
        )
    if options.save:
        print(save(options.save, {**results, "dtype": options.dtype}))


def summarise(rows: dict[int, list[list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians over iterations and rounds, in seconds; speedup: of an iteration, over the first number of ranks."""
    lines: list[dict[str, Any]] = []
    for ranks, runs in rows.items():
        own = {name: [t for run in runs for t in seconds(run, name)] for name in PHASES}
        whole = [sum(parts) for parts in zip(*own.values(), strict=True)]
        line: dict[str, Any] = {name: median(times) for name, times in own.items()}
        line |= {"ranks": ranks, "iteration": sum(whole) / len(whole)}
        line["speedup"] = lines[0]["iteration"] / line["iteration"] if lines else 1.0
        lines.append(line)
    return {"ranks": lines}


if __name__ == "__main__":
    main()

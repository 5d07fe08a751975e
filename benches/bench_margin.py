# SPDX-License-Identifier: Apache-2.0
"""A policy against the searched family at one mean of evaluations, on as many fresh pairs as it takes.

    python benches/bench_margin.py POLICY [--model tiny-sd3] [--dial 14] [--pairs 4000] [--seed 1] [--save NAME]

`training.evaluate` meets every rival on 1,000 pairs. Where a few images hold most of the error that leaves an interval
too wide to tell "never worse" from "better"; here are these two alone, on pairs of another seed than any evaluation's.
The family is read at the policy's mean cost, between the integers below and above it. What is in the cache is not made
again, so an interrupted run goes on, and several processes may share it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import run, tiny_parser
from tqdm import tqdm

import rapid3rt
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.tiny import GUIDANCE
from training import ways
from training.runs import Outcome, Runs
from training.similarity import squared_error
from training.statistics import at_cost, bootstrap, difference, estimate, never_worse

TOKENS = 32
DRAWS = 2000


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing, compare, print."""
    folder = PolicyFolder.load(options.policy)
    if folder.schedule is None:
        raise ValueError(f"policy must hold a searched family, got none in '{options.policy}'")
    pipe = rapid3rt.load_tiny(options.model.removeprefix("tiny-"), getattr(torch, options.dtype))
    pipe.set_progress_bar_config(disable=True)
    runs = Runs(
        pipe,
        options.pairs,
        split="test",
        seed=options.seed,
        guidance=GUIDANCE,
        tokens=TOKENS,
        store=options.cache,
    )
    family, costs = replace(folder.schedule, allocation=None), folder.costs
    converged = outcome(runs, ways.converged(options.reference)).images
    ours = outcome(runs, ways.served(options.policy, options.dial))
    mean = float(ours.cost.mean()) / costs.levels[0]
    around = sorted({math.floor(mean), math.floor(mean) + 1})
    theirs = [outcome(runs, ways.searched(family, k, costs)) for k in around]

    draws = bootstrap([scene.caption for scene in runs.scenes], 1, DRAWS)
    each = [squared_error(made.images, converged).numpy() for made in (ours, *theirs)]
    largest = float(each[0].max() / each[0].sum())  # one image whose outcome flips may be the mean
    errors = [draws.mean(of_pairs[None]) for of_pairs in each]
    prices = [draws.mean(made.cost.numpy()[None]) for made in (ours, *theirs)]
    rival = at_cost(prices[0], np.stack(prices[1:]), np.stack(errors[1:]))
    relative = estimate(difference(errors[0], rival))
    print(
        f"{options.pairs} pairs at {prices[0][0]:.2f} equivalent steps: {1000 * errors[0][0]:.4f}e-3 against "
        f"{1000 * rival[0]:.4f}e-3 of the searched family: {100 * relative.value:+.1f} % "
        f"({100 * relative.low:+.1f} .. {100 * relative.high:+.1f}); never worse: {never_worse(relative)}; "
        f"one image has {largest:.0%} of ours"
    )
    return {
        "model": options.model,
        "dtype": options.dtype,
        "dial": options.dial,
        "pairs": options.pairs,
        "seed": options.seed,
        "reference": options.reference,
        "cost": estimate(prices[0]).to_dict(),
        "error": estimate(errors[0]).to_dict(),
        "searched": estimate(rival).to_dict(),
        "difference": relative.to_dict(),
        "never_worse": never_worse(relative),
        "largest_share": largest,
    }


def outcome(runs: Runs, way: ways.Way) -> Outcome:
    """Of all pairs, behind a progress bar."""
    pairs = len(runs.scenes)
    with tqdm(total=pairs, desc=way.key[:40], unit="image") as bar:
        return runs.outcome(way, pairs, bar.update)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = tiny_parser(__doc__)
    add = parser.add_argument
    add("policy", type=Path, metavar="POLICY", help="a policy folder")
    add("--dial", type=float, default=14.0, help="mean evaluations that it is asked for")
    add("--pairs", type=int, default=4000)
    add("--seed", type=int, default=1, help="of the pairs; evaluations have 0")
    add("--reference", type=int, default=80, help="steps of the converged solutions")
    add("--dtype", default="float32", help="of the generator")
    add("--cache", type=Path, default=Path("runs/margin"), help="folder of the runs")
    run(parser, measure, arguments)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What a tick costs: dense against plain, all-reuse, finished images, mixed decisions, heads. Ratios in one run.

    python benches/bench_tick.py [--rounds 7] [--batch 8] [--save NAME]

A tiny pipeline, real weights. Rounds are interleaved; every figure is the median over rounds of the median tick.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from record import save
from ticks import Script, time_ticks

import rapid3rt
from rapid3rt.pipeline import BUNDLED_POLICIES
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.learned import Heads, LearnedPolicy
from rapid3rt.tiny.scenes import sample
from rapid3rt.types import AUTO, ComputeDecision, DenoiseState, Run, StepDecision

STEPS = 14


class Timed:
    """Untrained heads of every kind, which walk as their prior does, and the milliseconds of each tick's decisions."""

    leaves_grid, reuses = True, True

    def __init__(self, model: str) -> None:
        searched = PolicyFolder.load(BUNDLED_POLICIES / model / "policy")
        if searched.schedule is None or searched.heads is None:
            raise ValueError(f"model must have a bundled policy with heads, got {model!r}")
        config = replace(
            searched.heads.config, heads=("cache", "sparse", "step"), width=32, side=16
        )
        self.learned = LearnedPolicy(Heads(config), searched.schedule, order=AUTO, budget=STEPS)
        self.ms: list[float] = []

    def begin(self, run: Run) -> None:
        self.learned.begin(run)
        self.ms = []

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        start = time.perf_counter()
        decision = self.learned.decide_compute(state)
        self.ms.append(1000 * (time.perf_counter() - start))
        return decision

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        start = time.perf_counter()
        decision = self.learned.decide_step(state, velocity)
        self.ms[-1] += 1000 * (time.perf_counter() - start)
        return decision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sd3", help="bundled tiny pipeline")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--save", default=None)
    options = parser.parse_args()
    pipe = rapid3rt.load_tiny(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = [s.caption for s in sample(options.batch, 0)]

    def ticks(policy: Any, batch: int) -> list[float]:
        noises = [torch.Generator().manual_seed(i) for i in range(batch)]
        call = {"prompt": prompts[:batch], "num_inference_steps": STEPS, "max_sequence_length": 32}
        return time_ticks(pipe, policy, {**call, "generator": noises})

    half = options.batch // 2
    heads = Timed(options.model)
    cases: dict[str, Any] = {
        "plain": (None, options.batch, slice(None)),
        "plain, half batch": (None, half, slice(None)),
        "dense": ("dense", options.batch, slice(None)),
        "all reuse": (Script(lambda i, t: 0 if t == 0 else None), options.batch, slice(1, -1)),
        "half computes, half reuses": (
            Script(lambda i, t: 0 if t == 0 or i % 2 else None),
            options.batch,
            slice(1, -1),
        ),
        "half finished": (Script(lambda i, t: 0, ends=1), options.batch, slice(2, -1)),
        "three heads": (heads, options.batch, slice(1, -1)),
    }
    times: dict[str, list[float]] = {name: [] for name in [*cases, "decisions of three heads"]}
    for _ in range(options.rounds):
        for name, (policy, batch, part) in cases.items():
            times[name].append(median(ticks(policy, batch)[part]))
        times["decisions of three heads"].append(median(heads.ms[2:-1]))
    ms = {name: median(t) for name, t in times.items()}
    ratios = {
        "dense / plain (target <= 1.03)": ms["dense"] / ms["plain"],
        "all reuse / dense (target <= 0.05)": ms["all reuse"] / ms["dense"],
        "half reuse / (half batch + half of all reuse) (target <= 1.08)": ms[
            "half computes, half reuses"
        ]
        / (ms["plain, half batch"] + ms["all reuse"] / 2),
        "half finished / half batch (target <= 1.08)": ms["half finished"]
        / ms["plain, half batch"],
        "decisions of three heads / tick (target <= 0.05)": ms["decisions of three heads"]
        / ms["three heads"],
    }
    for name, value in ms.items():
        print(
            f"{name:<32}{value:>10.2f} ms   (rounds {min(times[name]):.2f} to {max(times[name]):.2f})"
        )
    print()
    for name, value in ratios.items():
        print(f"{name:<66}{value:>8.3f}")
    if options.save:
        print(
            f"saved to {save(options.save, {'ms': ms, 'ratios': ratios, 'batch': options.batch})}"
        )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Error at equal evaluations on the tiny world: every free rival, and ours, over held-out pairs.

    python benches/bench_quality.py [--pairs 512] [--steps 6 8] [--split test] [--cache DIR] [--save NAME]

Error m: mean squared difference of decoded pixels (in -1..1) to the converged solution of the same prompt and noise
(second order, 120 steps). Intervals: 95 % bootstrap over pairs. Batches go to the cache folder, so a run resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import PLAIN, REFERENCE, Pairs, Way, accelerated, interval, ratio_interval
from record import save

import rapid3rt
from rapid3rt.tiny import GUIDANCE
from rapid3rt.tiny.rivals import SOLVERS, solver
from rapid3rt.tiny.score import score


def main() -> None:
    """Run every way over the pairs, print the tables, save them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 8])
    parser.add_argument(
        "--iso", type=int, nargs="*", default=[7, 9, 10, 11], help="further k for ours alone"
    )
    parser.add_argument(
        "--also", nargs="*", default=[], help="further policies, under budget=k for every k"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--save", default=None, help="name of the record in benches/results")
    options = parser.parse_args()
    pipe = rapid3rt.load_tiny("sd3")
    pipe.set_progress_bar_config(disable=True)
    pairs = Pairs(
        pipe,
        options.pairs,
        options.split,
        options.seed,
        options.guidance,
        options.tokens,
        options.cache,
    )
    converged = f"steps:{REFERENCE}/trim/auto"
    reference = pairs.images("reference", REFERENCE, lambda: accelerated(pipe, converged))
    plain = pairs.images(f"plain k={PLAIN}", PLAIN)
    made = {"converged": reference, f"plain k={PLAIN}": plain}

    def add(name: str, steps: int, way: Way) -> None:
        made[name] = pairs.images(name, steps, way)

    for k in options.steps:
        made[f"plain k={k}"] = pairs.images(f"plain k={k}", k)
        for s in SOLVERS:
            add(f"{s} k={k}", k, lambda s=s: solver(pipe, s))
        for rule in ("trim", "trim/ab2", "trim/auto"):
            policy = f"steps:{k}/{rule}"
            add(f"steps/{rule} k={k}", PLAIN, lambda p=policy: accelerated(pipe, p))
        for policy in options.also:
            add(
                f"{policy} k={k}",
                PLAIN,
                lambda p=policy, k=k: accelerated(pipe, p, budget=k),
            )
    for k in sorted({*options.steps, *options.iso}):
        add(f"rapid3rt k={k}", PLAIN, lambda k=k: accelerated(pipe, "auto", budget=k))
    _report(made, pairs, options)


def _report(made: dict[str, torch.Tensor], pairs: Pairs, options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    reference, plain = made.pop("converged"), made[f"plain k={PLAIN}"]
    m = {n: (x - reference).square().mean((1, 2, 3)).numpy() for n, x in made.items()}
    ways: dict[str, dict[str, Any]] = {}
    header = f"{'way':<24}{'NFE':>6}{'m x 1e3':>9}  {'95 % interval':<17}{'worst tenth':>12}"
    print(header + f"{'score':>7}{'PSNR to plain':>15}")
    for name, images in made.items():
        low, high = interval(m[name], rng)
        to_plain = (images - plain).square().mean((1, 2, 3)).clamp(min=1e-12)
        way = ways[name] = {
            "nfe": pairs.nfe[name],
            "m": float(m[name].mean()),
            "interval": [low, high],
            "worst_tenth": float(np.sort(m[name])[-max(1, len(m[name]) // 10) :].mean()),
            "score": float(score((images + 1) / 2, pairs.scenes).mean()),
            "psnr_to_plain": float((10 * torch.log10(4 / to_plain)).mean()),
        }
        span = f"{1000 * low:.3f} .. {1000 * high:.3f}"
        row = f"{name:<24}{way['nfe']:>6.2f}{1000 * way['m']:>9.3f}  {span:<17}"
        row += f"{1000 * way['worst_tenth']:>12.2f}{way['score']:>7.3f}"
        print(row + ("" if images is plain else f"{way['psnr_to_plain']:>12.1f} dB"))
    ratios: dict[str, dict[str, Any]] = {}
    print(f"\n{'error of rapid3rt over that of':<32}{'ratio':>7}  95 % interval")
    for k in options.steps:
        ours = m[f"rapid3rt k={k}"]
        for name in [n for n in m if n.endswith(f" k={k}") and not n.startswith("rapid3rt")]:
            low, high = ratio_interval(ours, m[name], rng)
            ratio = float(ours.mean() / m[name].mean())
            ratios[name] = {"ratio": ratio, "interval": [low, high]}
            print(f"{name:<32}{ratio:>7.3f}  {low:.3f} .. {high:.3f}")
    iso = _iso(m)
    print(
        f"\nevaluations for the accuracy of plain {PLAIN} steps: "
        + ("not reached" if iso is None else f"{iso:.1f}, a speed-up of {PLAIN / iso:.2f}x")
    )
    if options.save:
        results = {
            "pairs": options.pairs,
            "split": options.split,
            "guidance": options.guidance,
            "ratios": ratios,
        }
        print(f"saved to {save(options.save, {**results, 'iso_evaluations': iso, 'ways': ways})}")


def _iso(m: dict[str, np.ndarray]) -> float | None:
    """Evaluations at which ours has the error of the plain full run, log-log interpolated; None beyond the table."""
    goal = np.log(m[f"plain k={PLAIN}"].mean())
    ks = sorted(int(n.split("=")[1]) for n in m if n.startswith("rapid3rt"))
    logs = [np.log(m[f"rapid3rt k={k}"].mean()) for k in ks]
    for k0, k1, a, b in zip(ks, ks[1:], logs, logs[1:], strict=False):
        if a > goal >= b:
            share = (a - goal) / (a - b)
            return float(np.exp(np.log(k0) + share * (np.log(k1) - np.log(k0))))
    return float(ks[0]) if logs[0] <= goal else None


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Error at equal evaluations on the tiny world: every free rival, and ours, over held-out pairs.

    python benches/bench_quality.py [--pairs 512] [--steps 6 8] [--model sd3] [--split test]
        [--cache DIR] [--save NAME]

Ours is asked for a mean over images (`speed=`), which it meets on its calibration split and nearly meets elsewhere:
it is compared at exactly the rival's mean, read off its own curve of error over evaluations. `same k` is ours with
`budget=k`, the same number for every image.

Error m: mean squared difference of decoded pixels (in -1..1) to the converged solution of the same prompt and noise
(order auto, 80 steps). Intervals: 95 % bootstrap over pairs. Batches go to the cache folder, so a run resumes.
"""

from __future__ import annotations

import argparse
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import PLAIN, REFERENCE, Pairs, Way, accelerated, interval
from record import save

import rapid3rt
from rapid3rt.pipeline import BUNDLED_POLICIES
from rapid3rt.tiny import GUIDANCE
from rapid3rt.tiny.rivals import SOLVERS, solver
from rapid3rt.tiny.score import score

OURS, SAME = "rapid3rt", "rapid3rt same"


def main() -> None:
    """Run every way over the pairs, print the tables, save them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sd3", help="bundled tiny pipeline")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 8])
    parser.add_argument(
        "--iso", type=int, nargs="*", default=[5, 10, 12, 14], help="further means for ours alone"
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
    pipe = rapid3rt.load_tiny(options.model)
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

    version = _digest(BUNDLED_POLICIES / options.model / "policy")

    def add(name: str, steps: int, way: Way, version: str = "") -> None:
        made[name] = pairs.images(name, steps, way, version=version)

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
        add(f"{SAME} k={k}", PLAIN, lambda k=k: accelerated(pipe, "auto", budget=k), version)
    for k in sorted({*options.steps, *options.iso}):
        way = partial(accelerated, pipe, "auto", speed=PLAIN / k)
        add(f"{OURS} mean={k}", PLAIN, way, version)
    _report(made, pairs, options)


def _digest(folder: Path) -> str:
    """Tells what a policy made from what another one did."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


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
            "nfe": float(pairs.nfe[name].mean()),
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
    curve = [n for n in m if n.startswith(f"{OURS} mean=")]
    ours = np.stack([m[n] for n in curve])
    nfe = np.stack([pairs.nfe[n] for n in curve])
    picks = rng.integers(options.pairs, size=(2000, options.pairs))
    for k in options.steps:
        if not nfe.mean(1).min() <= k <= nfe.mean(1).max():
            print(
                f"at {k} evaluations: beyond the means that were measured, ask for others with --iso"
            )
            continue
        for name in [n for n in m if n.endswith(f" k={k}")]:
            ratio = at_mean(k, nfe.mean(1), ours.mean(1)) / m[name].mean()
            draws = [
                at_mean(k, nfe[:, p].mean(1), ours[:, p].mean(1)) / m[name][p].mean() for p in picks
            ]
            low, high = np.quantile(draws, [0.025, 0.975])
            ratios[name] = {"ratio": float(ratio), "interval": [float(low), float(high)]}
            print(f"{name:<32}{ratio:>7.3f}  {low:.3f} .. {high:.3f}")
    iso = reaching(m[f"plain k={PLAIN}"].mean(), nfe.mean(1), ours.mean(1))
    print(
        f"\nevaluations for the accuracy of plain {PLAIN} steps: "
        + ("not reached" if iso is None else f"{iso:.1f}, a speed-up of {PLAIN / iso:.2f}x")
    )
    if options.save:
        results = {
            "pairs": options.pairs,
            "split": options.split,
            "model": options.model,
            "guidance": options.guidance,
            "ratios": ratios,
        }
        print(f"saved to {save(options.save, {**results, 'iso_evaluations': iso, 'ways': ways})}")


def at_mean(k: float, nfe: np.ndarray, m: np.ndarray) -> float:
    """Error of a curve at k evaluations, log-log interpolated; a redraw that ends before k goes on along its end."""
    x, y = np.log(nfe), np.log(m)
    i = int(np.clip(np.searchsorted(x, np.log(k)), 1, len(x) - 1))
    return float(np.exp(y[i - 1] + (np.log(k) - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])))


def reaching(goal: float, nfe: np.ndarray, m: np.ndarray) -> float | None:
    """Evaluations at which a curve comes down to an error, log-log interpolated; None beyond its end."""
    for i in range(len(nfe)):
        if m[i] <= goal:
            if i == 0:
                return float(nfe[0])
            share = np.log(m[i - 1] / goal) / np.log(m[i - 1] / m[i])
            return float(nfe[i - 1] * (nfe[i] / nfe[i - 1]) ** share)
    return None


if __name__ == "__main__":
    main()

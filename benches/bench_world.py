# SPDX-License-Identifier: Apache-2.0
"""How good the tiny pipeline is, and how differently hard its prompts are.

    python benches/bench_world.py [--captions 500] [--pairs 128] [--split test] [--cache DIR] [--save NAME]

Prints the scene score of the plain 28 steps on held-out captions by kind of scene; the spread of log m(6) at order 2
(m: squared error to the converged solution); and how many plain evaluations bring an image within 30 dB PSNR of its own
28-step result, as a distribution and for the easiest and the hardest tenth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from pairs import PLAIN, REFERENCE, Pairs, accelerated, interval
from record import save

import rapid3rt
from rapid3rt.tiny import GUIDANCE
from rapid3rt.tiny.scenes import Scene
from rapid3rt.tiny.score import score

LADDER = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 22, 24, 26)
GOAL_DB = 30.0


def kind(scene: Scene) -> str:
    """The stratum of a scene."""
    ground = "plain" if scene.texture == "plain" else "textured"
    objects = len(scene.objects)
    return f"{'1' if objects == 1 else '2-3' if objects < 4 else '4-6'} on {ground}"


def main() -> None:
    """Measure and print; save where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--model", default="sd3", help="bundled tiny pipeline")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--save", default=None, help="name of the record in benches/results")
    options = parser.parse_args()
    pipe = rapid3rt.load_tiny(options.model)
    pipe.set_progress_bar_config(disable=True)
    where = (options.split, options.seed, options.guidance, options.tokens, options.cache)
    results = {"score": scores(Pairs(pipe, options.captions, *where))}
    results |= difficulty(Pairs(pipe, options.pairs, *where))
    if options.save:
        print(
            f"saved to {save(options.save, {'split': options.split, 'guidance': options.guidance, **results})}"
        )


def scores(pairs: Pairs) -> dict[str, object]:
    """Scene score at the plain 28 steps, in all and by kind."""
    points = score((pairs.images(f"plain k={PLAIN}", PLAIN) + 1) / 2, pairs.scenes)
    low, high = interval(points, np.random.default_rng(0))
    print(f"scene score at {PLAIN} steps, {len(points)} captions: {points.mean():.4f}", end="")
    print(f" ({low:.4f} .. {high:.4f}); exactly right: {(points >= 0.999).mean():.3f}")
    kinds = np.array([kind(s) for s in pairs.scenes])
    by_kind = {}
    for name in sorted(set(kinds)):
        chosen = points[kinds == name]
        by_kind[name] = {"captions": len(chosen), "score": float(chosen.mean())}
        print(f"  {name:<16}{len(chosen):>5} captions{chosen.mean():>8.4f}")
    return {"mean": float(points.mean()), "interval": [low, high], "by_kind": by_kind}


def difficulty(pairs: Pairs) -> dict[str, object]:
    """Spread of log m(6), and evaluations to 30 dB."""
    pipe = pairs.pipe

    def walk(name: str, policy: str, ticks: int) -> torch.Tensor:
        return pairs.images(name, ticks, lambda: accelerated(pipe, policy))

    converged = walk("reference", f"steps:{REFERENCE}/trim/auto", REFERENCE)
    coarse = walk("steps/trim/ab2 k=6", "steps:6/trim/ab2", PLAIN)
    m = (coarse - converged).square().mean((1, 2, 3)).numpy()
    spread = float(np.log(m).std())
    print(f"\nm(6) at order 2, {len(m)} pairs: standard deviation of its logarithm {spread:.2f}")
    print("  tenths of m x 1e3: " + " ".join(f"{1000 * q:.2f}" for q in _tenths(m)))
    goal = pairs.images(f"plain k={PLAIN}", PLAIN)
    needed = np.full(len(m), PLAIN)
    for k in reversed(LADDER):
        error = (pairs.images(f"plain k={k}", k) - goal).square().mean((1, 2, 3)).numpy()
        needed[10 * np.log10(4 / np.maximum(error, 1e-12)) >= GOAL_DB] = k
    ranked, tenth = np.sort(needed), max(1, len(needed) // 10)
    easy, hard = float(ranked[:tenth].mean()), float(ranked[-tenth:].mean())
    print(f"\nplain evaluations to {GOAL_DB:g} dB of the own {PLAIN}-step result")
    for k in sorted(set(needed)):
        share = float((needed == k).mean())
        print(f"  {k:>3} {share:>6.1%} {'#' * round(60 * share)}")
    print(f"easiest tenth {easy:.1f}, hardest tenth {hard:.1f}: {hard / easy:.2f}x")
    kinds = np.array([kind(s) for s in pairs.scenes])
    by_kind = {str(n): float(needed[kinds == n].mean()) for n in sorted(set(kinds))}
    for name, mean in by_kind.items():
        print(f"  {name:<16}{mean:>6.1f} evaluations on average")
    return {
        "pairs": len(m),
        "spread_log_m6_order2": spread,
        "tenths_m6": [float(q) for q in _tenths(m)],
        "evaluations_to_30_db": {str(k): int((needed == k).sum()) for k in sorted(set(needed))},
        "easiest_tenth": easy,
        "hardest_tenth": hard,
        "evaluations_by_kind": by_kind,
    }


def _tenths(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, np.linspace(0.1, 0.9, 9))


if __name__ == "__main__":
    main()

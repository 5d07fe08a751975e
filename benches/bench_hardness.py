# SPDX-License-Identifier: Apache-2.0
"""How hard an image will be: what its caption says, and what its first evaluations add.

    python benches/bench_hardness.py [--model tiny-sd3] [--dtype bfloat16] [--banks runs/banks] [--save NAME]

Hardness of a pair of prompt and noise: how far its log error lies above the mean of all pairs, over all numbers of
evaluations that the reference bank tabulates. A ridge regression predicts it from the conditioning of the first tick;
a second one predicts what the first leaves, from what is seen of the image up to an evaluation: logs of the mean square
of velocity, predicted image, its contrast, its detail and its channels, of their changes since the evaluation before,
and two secant estimates of the stiffness. Printed: shares of variance explained in pairs that were held out (12 folds).
What cannot be predicted cannot be allocated to, however a policy is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import run, tiny_parser

from rapid3rt.policies.allocation import detail
from rapid3rt.policies.schedule import ScheduleFamily
from rapid3rt.types import DenoiseState, Run, StepDecision
from training.allocation import predict_held_out, read_pairs
from training.bank import Bank, accelerated
from training.ranks import Ranks
from training.recipes import RECIPES
from training.subject import load_subject

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
TINY = 1e-12


class Watching(ScheduleFamily):
    """A searched family that notes what is seen at every tick: `[B, features]` each."""

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.seen: list[torch.Tensor] = []
        self._before: tuple[torch.Tensor, ...] | None = None

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        x, v = state.latents.float(), velocity.float()
        predicted = x - state.sigma[:, None, None, None] * v
        contrast = predicted - predicted.mean((2, 3), keepdim=True)
        found = [power(v), power(predicted), power(contrast), detail(x, v, state.sigma)]
        found += list(contrast.square().mean((2, 3)).add(TINY).log().T)
        if self._before is not None:
            dx, dv, change = (
                now - then for now, then in zip((x, v, predicted), self._before, strict=True)
            )
            both = (dx * dv).flatten(1).sum(1)
            found += [power(dv), power(change), detail(change, change, torch.zeros_like(both))]
            found += [both / (dx * dx).flatten(1).sum(1)]
            found += [(dv * dv).flatten(1).sum(1) / (both.abs() + TINY)]
        self._before = (x.clone(), v.clone(), predicted)
        self.seen.append(torch.stack(found, 1).cpu().double())
        return super().decide_step(state, velocity)


def power(x: torch.Tensor) -> torch.Tensor:
    """Log of the mean square of every image, `[B]`."""
    return (x.flatten(1).square().mean(1) + TINY).log()


def watch(bank: Bank, policy: Watching) -> list[torch.Tensor]:
    """What is seen at every tick of all pairs, `[n, features]` each."""
    seen = []
    for start in range(0, len(bank), bank.batch_size):
        with accelerated(bank.pipe, policy):
            bank.images(range(start, min(start + bank.batch_size, len(bank))))
        seen.append(policy.seen)
    return [torch.cat(ticks) for ticks in zip(*seen, strict=True)]


def explain(x: torch.Tensor, y: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Share of the variance of y that x explains in held-out pairs, at the best penalty, and what is left of y."""
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-9)
    _, predicted, explained = predict_held_out(x, y, PENALTIES)
    return explained, y - predicted


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, printed as it is found."""
    recipe = replace(RECIPES[options.model](), dtype=options.dtype)
    subject = load_subject(recipe, options.banks / options.model, Ranks.join())
    family, bank = subject.searched.schedule, subject.training
    if family is None:
        raise ValueError(f"model must have a bundled searched family, got {options.model!r}")
    pairs = read_pairs(bank, family)
    caption, rest = explain(pairs.conditioning.double(), pairs.hardness)
    print(f"{len(bank)} pairs; standard deviation of log error {float(pairs.hardness.std()):.2f}")
    print(f"the caption explains {caption:.2f}; of what it leaves, the evaluations up to the n-th:")
    further: dict[str, list[float]] = {}
    for k in options.plans:
        ticks = watch(bank, Watching(family, budget=k))
        further[str(k)] = [explain(torch.cat(ticks[: n + 1], 1), rest)[0] for n in range(k - 1)]
        shares = "  ".join(f"{share:5.2f}" for share in further[str(k)])
        print(f"  a plan of {k:2}   {shares}", flush=True)
    return {
        "model": options.model,
        "dtype": options.dtype,
        "pairs": len(bank),
        "spread": float(pairs.hardness.std()),
        "caption": caption,
        "left_spread": float(rest.std()),
        "evaluations": further,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = tiny_parser(__doc__)
    add = parser.add_argument
    add("--dtype", default="bfloat16", help="of the generator")
    add("--plans", type=int, nargs="+", default=[6, 8, 10], help="evaluations of an image")
    add("--banks", type=Path, default=Path("runs/banks"), help="where reference banks are kept")
    run(parser, measure, arguments)


if __name__ == "__main__":
    main()

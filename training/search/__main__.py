# SPDX-License-Identifier: Apache-2.0
"""Command line of the schedule search."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rapid3rt.calibrate.command import load_pipeline, read_prompts, stop
from rapid3rt.errors import StateError, UnsupportedError, check_number
from rapid3rt.policies import FixedPlan
from rapid3rt.tiny import bundled_names, load_tiny
from rapid3rt.tiny.policy import CALL, NUM_PROMPTS, SEED
from rapid3rt.tiny.scenes import sample
from rapid3rt.types import ACTION_NAMES
from training.machine import set_threads
from training.search import Settings, search


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, write the schedule, print what was gained. Errors of the caller's making are one line."""
    options = _parser().parse_args(arguments)
    try:
        plan = _search(options)
    except KeyboardInterrupt:
        stop("search: stopped; the same command goes on with what it has measured")
    except (ValueError, OSError, UnsupportedError, StateError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(describe(plan))
    print(f"use it with rapid3rt.accelerate(pipe, policy='schedule:{options.out}')")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.search",
        description="Search the best fixed schedule of exactly K evaluations per image.",
        epilog="The same command goes on after an interruption; with more --evaluations it searches on.",
    )
    defaults = Settings(budget=2)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("model", help="tiny-sd3, tiny-flux, or a folder or hub id of a diffusers pipeline")
    add("--budget", type=int, required=True, help="evaluations per image")
    add("--out", type=Path, required=True, help="schedule file; measurements go to OUT.search")
    add("--prompts", type=Path, help="text file, a prompt per line; tiny models have their own")
    add("--policy", type=Path, help="folder of `rapid3rt calibrate`; default: the bundled one")
    add(
        "--evaluations",
        type=int,
        default=defaults.evaluations,
        help="evaluations of single images that the search may spend (default %(default)s), references apart",
    )
    add("--steps", type=int, default=defaults.steps, help="steps of the plain pipeline")
    add("--guidance", type=float, help="guidance scale that users will call with")
    add("--levels", action=switch, default=True, help="try sparsity levels that save time here")
    add("--reuse", action=switch, default=True, help="try ticks that reuse the residual")
    add("--seed", type=int, default=defaults.seed, help="of the random moves")
    add("--batch-size", type=int, default=defaults.batch_size, help="images per pipeline call")
    add("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own number")
    return parser


def _search(options: argparse.Namespace) -> FixedPlan:
    set_threads(options.threads)
    if options.guidance is not None:
        check_number("guidance", options.guidance, lambda x: x >= 0, "a finite number, at least 0")
    name = options.model.removeprefix("tiny-")
    is_tiny = options.model.startswith("tiny-") and name in bundled_names()
    tiny = ", ".join(f"tiny-{name}" for name in bundled_names())
    if options.model.startswith("tiny-") and not is_tiny and not Path(options.model).is_dir():
        raise ValueError(
            f"model must be one of {tiny}, or a folder or hub id, got {options.model!r}"
        )
    if options.prompts is None and not is_tiny:
        raise ValueError(f"--prompts must be given for a model other than {tiny}")
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    else:
        prompts = [scene.caption for scene in sample(NUM_PROMPTS, SEED, "calibration")]
    call: dict[str, Any] = dict(CALL) if is_tiny else {}
    if options.guidance is not None:
        call["guidance_scale"] = options.guidance
    settings = Settings(
        budget=options.budget,
        evaluations=options.evaluations,
        steps=options.steps,
        seed=options.seed,
        levels=options.levels,
        reuse=options.reuse,
        batch_size=options.batch_size,
    )
    pipe = load_tiny(name) if is_tiny else load_pipeline(options.model)
    return search(pipe, prompts, options.out, settings, policy=options.policy, call=call)


def describe(plan: FixedPlan) -> str:
    """The schedule and what it gained, as lines of text."""
    facts = plan.provenance
    lines = ["   sigma  action   level  order"]
    lines += [
        f"{t.sigma:8.4f}  {ACTION_NAMES[t.action]:<8} {t.level:>4} {('auto', '1', '2')[t.order]:>6}"
        for t in plan.ticks
    ]
    lines.append("")
    lines.append("pairs          error         family   searched   change   95 % interval")
    for group in ("seen", "unseen"):
        for name, unit in (("mean_squared", 1e3), ("mean_root", 1.0)):
            lines.append(_row(group, facts[group]["pairs"], name, unit, facts[group][name]))
    steps, spent = facts["equivalent_steps"], facts["evaluations"]
    lines.append(
        f"equivalent steps {steps['family']:.2f} -> {steps['searched']:.2f}; "
        f"at equal cost errors count {facts['cost_factor']:.3f} times"
    )
    lines.append("evaluations: " + ", ".join(f"{name} {n}" for name, n in spent.items()))
    return "\n".join(lines)


def _row(group: str, pairs: int, name: str, unit: float, row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    what = "MSE, 1e-3" if name == "mean_squared" else "mean root"
    return (
        f"{group:<7}{pairs:>4}    {what:<10}{unit * row['family']:>10.4f} {unit * row['searched']:>10.4f} "
        f"{100 * row['change']:>+7.1f}%  {100 * low:>+7.1f}% .. {100 * high:+.1f}%"
    )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""From a pipeline and prompts to a schedule file: the stages of a search, and what came of them.

Half of the prompts, 64 pairs at most, decide; the others are looked at once, at the end. Every measurement lies in the
folder FILE.search, and what is done next follows from those alone: the same call goes on where one was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rapid3rt.calibrate.arguments import check_call, told_apart
from rapid3rt.calibrate.measure import REFERENCE_STEPS, Bench, family_key
from rapid3rt.errors import check_count
from rapid3rt.pipeline import accelerate, restore
from rapid3rt.policies import FixedPlan, WarpFamily, save_schedule
from rapid3rt.policies.base import Warp, trimmed_sigmas
from rapid3rt.types import COMPUTE, ActionCosts
from training.search import recording
from training.search.climb import Climber, Objective, climb, descend, probe, redraws
from training.search.error_model import ErrorModel
from training.search.finish import errors_of, finish
from training.search.folder import (
    check_claim,
    claim,
    find_policy,
    identity,
    search_family,
    take_over,
)
from training.search.lattice import FINENESS, Lattice, equivalent_steps
from training.search.local_errors import LocalErrors

MOST_SEEN, NUM_FEW = 64, 16
"""Pairs that decide, at most, and those of them that a proposal meets first, which are also those recorded."""
NUM_PROBES = 12
WORTHWHILE = 0.95
"""Cost of a sparsity level, in plain steps, from which on it is not tried (METHOD.md, section 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a search is asked for.

    budget: computing ticks of the schedule. evaluations: of single images, all guidance branches counted as one, that
    recording, probes and proposals may spend; references and the family's own search come on top. steps: of the
    pipeline that users call. seed: of the random moves. levels, reuse: whether those may be tried.
    """

    budget: int
    evaluations: int = 20_000
    steps: int = 28
    seed: int = 0
    levels: bool = True
    reuse: bool = True
    batch_size: int = 16


def search(
    pipe: Any,
    prompts: Sequence[str],
    out: str | Path,
    settings: Settings,
    *,
    policy: str | Path | None = None,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> FixedPlan:
    """Search a fixed schedule and write it.

    Parameters
    ----------
    pipe: a plain (not accelerated) pipeline of a supported family.
    prompts: at least 2; each is paired with its own noise, as `rapid3rt.calibrate` does.
    out: the schedule file; measurements go to a folder of the same name plus `.search`.
    policy: a folder that `rapid3rt.calibrate` wrote; None: the bundled one of this model, else a family is searched.
        Where it was calibrated with these prompts and arguments, its measurements and references are taken over.
    call: further arguments of the pipeline's call.

    Returns
    -------
    The schedule; its provenance holds errors before and after, on pairs that decided and on pairs that did not.

    Raises
    ------
    ValueError: wrong arguments, or a folder that holds another search.
    UnsupportedError, StateError: as `accelerate`.
    """
    _check(settings, prompts, Path(out))
    restore(accelerate(pipe, "dense"))
    arguments = dict(call or {})
    check_call(pipe, arguments)
    folder, home = find_policy(policy, pipe), Path(f"{out}.search")
    identified = identity(pipe, prompts, asdict(settings), folder, arguments)
    check_claim(home, identified)
    bench = Bench(
        pipe,
        list(prompts),
        home,
        settings.steps,
        0,
        settings.batch_size,
        arguments,
        progress,
    )
    if folder is None:
        family, costs = search_family(bench, _num_seen(prompts)), bench.costs()
    else:
        take_over(bench, folder.path)
        family, costs = folder.family, folder.costs or bench.costs()
    lattice = _lattice(bench, family, costs, settings)
    seen, other = _num_seen(prompts), _other_budget(lattice, settings)
    spent = _first_costs(lattice, seen, other, settings.evaluations)
    claim(
        home, identified
    )  # not before: a call that is refused leaves a folder that another may take
    unweighted = replace(family, fit=None)
    climber, stages = _improve(bench, unweighted, lattice, costs, settings, other, spent)
    found, even = (lattice.schedule(p, bench.family_name) for p in (climber.best, lattice.even()))
    plan = finish(bench, found, even, family, climber.order)
    stages["fit"] = float(errors_of(bench, plan, climber.order).mean())
    provenance = {
        "command": {**asdict(settings), "call": told_apart(arguments)},
        "model": bench.model,
        "prompts": len(prompts),
        "family": {"order": family.order, "knots": [list(pair) for pair in family.knots]},
        "costs": {"levels": list(costs.levels), "reuse": costs.reuse},
        "evaluations": {**spent, "references": REFERENCE_STEPS * len(prompts)},
        "equivalent_steps": {
            "family": settings.budget * costs.levels[0],
            "searched": equivalent_steps(climber.best, costs),
        },
        "fitted": any(tick.weights for tick in plan.ticks),
        "cost_factor": climber.objective.factor(climber.best),
        "seen_after": stages,
        **_compare(bench, family, plan, climber.order),
    }
    plan = replace(plan, provenance=provenance)
    save_schedule(plan, out)
    return plan


def _check(settings: Settings, prompts: Sequence[str], out: Path) -> None:
    if out.is_dir():
        raise ValueError(f"out must be a file, got the folder {str(out)!r}")
    for name in ("budget", "evaluations", "steps", "batch_size"):
        check_count(name, getattr(settings, name))
    if not 2 <= settings.budget <= settings.steps:
        raise ValueError(
            f"budget must be 2 to {settings.steps} (the steps of the pipeline), got {settings.budget}"
        )
    if isinstance(prompts, str) or len(prompts) < 2:
        got = repr(prompts) if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"prompts must be a list of at least 2, since half decide, got {got}")


def _num_seen(prompts: Sequence[str]) -> int:
    return min(MOST_SEEN, len(prompts) // 2)


def _lattice(bench: Bench, family: WarpFamily, costs: ActionCosts, settings: Settings) -> Lattice:
    """Even in the family's own time, each interval of its grid at the budget in equal parts."""
    intervals = settings.budget * math.ceil(FINENESS / settings.budget)

    def measure() -> list[float]:
        return list(trimmed_sigmas(intervals, bench.probe(), Warp(family.knots)))

    levels = [x for x, cost in enumerate(costs.levels) if x > 0 and cost < WORTHWHILE]
    return Lattice(
        sigmas=tuple(bench.remember(f"lattice of {intervals}, {family_key(family)}", measure)),
        budget=settings.budget,
        max_ticks=settings.steps,
        levels=tuple(levels) if settings.levels else (),
        reuse=settings.reuse,
    )


def _rungs(errors: torch.Tensor) -> tuple[list[int], list[int]]:
    """Few pairs that are as easy and as hard as all of them, and the others. errors: of all pairs that decide."""
    number, order = min(NUM_FEW, len(errors)), errors.argsort().tolist()
    few = sorted(order[int((i + 0.5) * len(order) / number)] for i in range(number))
    return few, [i for i in range(len(errors)) if i not in few]


def _improve(
    bench: Bench,
    family: WarpFamily,
    lattice: Lattice,
    costs: ActionCosts,
    settings: Settings,
    other: int,
    spent: dict[str, int],
) -> tuple[Climber, dict[str, float]]:
    """The search itself; also the mean squared error of the best plan after each stage.

    other: of `_other_budget`. spent: evaluations by purpose, to which are added those of every stage.
    """
    errors = bench.family_errors(family, lattice.budget)[: _num_seen(bench.prompts)]
    few, rest = _rungs(errors)
    exponent = 0.0
    if other:
        there = bench.family_errors(family, other, pairs=few)
        exponent = _exponent(errors[few], lattice.budget, there, other)
    bar = tqdm(total=settings.evaluations, desc="schedule search", disable=not bench.progress)
    bar.update(sum(spent.values()))
    records = recording.record(bench, lattice, few)
    weights = errors[few].clamp(min=1e-12) ** -0.5
    weights = weights / weights.mean()
    climber = Climber(
        objective=Objective(bench, lattice, costs, exponent, few, rest, sum(spent.values())),
        best=lattice.even(),
        few=errors[few],
        rest=errors[rest],
        weights=weights,
        limit=settings.evaluations,
        report=partial(_report, bar),
    )
    model = ErrorModel(LocalErrors(lattice, records, weights), costs)
    stages = {"family": float(climber.seen().mean())}
    for name, work in (
        ("probes", partial(probe, climber, settings.seed, NUM_PROBES)),
        ("dynamic programming", partial(descend, climber, model)),
        ("climbing", partial(climb, climber, model, settings.seed)),
    ):
        before = climber.objective.spent
        work()
        spent[name] = climber.objective.spent - before
        stages[name] = float(climber.seen().mean())
    bar.close()
    return climber, stages


def _first_costs(lattice: Lattice, seen: int, other: int, evaluations: int) -> dict[str, int]:
    """Evaluations that come before any proposal, by purpose. ValueError: they and the probes are more than allowed."""
    few = min(NUM_FEW, seen)
    spent = {
        "family": lattice.budget * seen + other * few,
        "recording": recording.cost(lattice) * few,
    }
    least = sum(spent.values()) + lattice.budget * (few * NUM_PROBES + seen)
    if evaluations < least:
        raise ValueError(
            f"evaluations must be at least {least} here (family, recording, probes), got {evaluations}"
        )
    return spent


def _report(bar: Any, climber: Climber) -> None:
    bar.update(climber.objective.spent - bar.n)
    bar.set_postfix(error=f"{climber.seen().mean():.3e}", accepted=climber.accepted)


def _other_budget(lattice: Lattice, settings: Settings) -> int:
    """Evaluations at which the family is measured too, for what a cheaper plan is worth; 0: none can be cheaper."""
    if not (lattice.levels or lattice.reuse):
        return 0
    return settings.budget + 2 if settings.budget + 2 <= settings.steps else settings.budget - 1


def _exponent(here: torch.Tensor, k: int, there: torch.Tensor, other: int) -> float:
    """p of an error k^-p, from the mean root errors of the same pairs at two k; from 0 to 4."""
    ratio = float(here.sqrt().mean().clamp(min=1e-9) / there.sqrt().mean().clamp(min=1e-9))
    return min(max(2 * math.log(ratio) / math.log(other / k), 0.0), 4.0)


def _compare(
    bench: Bench, family: WarpFamily, plan: FixedPlan, order: Sequence[int]
) -> dict[str, Any]:
    """The family and the schedule on pairs that decided, in their order, and on those that did not."""
    unseen = range(_num_seen(bench.prompts), len(bench.prompts))
    computes = sum(tick.action == COMPUTE for tick in plan.ticks)
    before = bench.family_errors(family, computes)
    return {
        name: _change(errors_of(bench, plan, pairs), before[list(pairs)])
        for name, pairs in (("seen", order), ("unseen", unseen))
    }


def _change(after: torch.Tensor, before: torch.Tensor) -> dict[str, Any]:
    """Mean squared and mean root errors of the same pairs, their relative change, and its 95 % bootstrap interval."""
    picks, found = redraws(len(after)), dict[str, Any](pairs=len(after))
    for name, new, old in (
        ("mean_squared", after, before),
        ("mean_root", after.sqrt(), before.sqrt()),
    ):
        drawn = (new[picks].mean(1) / old[picks].mean(1) - 1).quantile(
            torch.tensor([0.025, 0.975], dtype=torch.float64)
        )
        found[name] = {
            "family": float(old.mean()),
            "searched": float(new.mean()),
            "change": float(new.mean() / old.mean() - 1),
            "interval": drawn.tolist(),
        }
    return found

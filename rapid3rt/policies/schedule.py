# SPDX-License-Identifier: Apache-2.0
"""Schedule files and the policies that walk them: a fixed list of ticks, or a family for every k.

A file is JSON, `"format": "rapid3rt.schedule"`, `"version": 1`, and of one of two kinds.

`fixed`: `family` (model family), `num_ticks`, `ticks` (a list of `{sigma, action, level, order}`, with `weights` where
order is 3, fitted: sigma is where the tick starts; it steps to the sigma of the next entry, the last one to 0),
`provenance` (free object).

`family`: `family`, `num_ticks` and `shift` (the run it was searched on), `order` (1, 2, or 0: auto), `knots`
(interior `[u, w]` of a monotone warp w; phi*(u) = phi(w(u)) and the grid of k evaluations is phi*(1
- j / k)), `error_profile` (null, or `[u, value]` for `controller`: the mean over images of
`controller.local_error`), `allocation` (null, or `table`, `dial` and `guidance` of `allocation.Allocation`),
`fit` (null, or `tokens`, `guidance`, `extra_guidance` and `weights` of `fitted.Fit`, a list of `{k, rows}`),
`provenance`.

Anything else is one `ValueError` that names file and field.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rapid3rt.planning import sparsity
from rapid3rt.planning.jsonfile import Fields, read_fields, write_document
from rapid3rt.policies.allocation import Allocation, Allocator
from rapid3rt.policies.base import (
    Warp,
    WarpedTime,
    check_family,
    compute_all,
    device_list,
    next_from_list,
    planned_evaluations,
    round_float32,
    shift_sigma,
    step_to,
    trimmed_sigmas,
    unshift_sigma,
)
from rapid3rt.policies.fitted import Fit, FittedSteps
from rapid3rt.types import (
    ACTION_NAMES,
    ADAMS_BASHFORTH,
    AUTO,
    COMPUTE,
    FITTED,
    NUM_WEIGHTS,
    RUNNABLE_ACTIONS,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)

FORMAT = "rapid3rt.schedule"
VERSION = 1
# A family keeps phi*(1 / T) above this: a last interval shorter than that wastes its evaluation
# (METHOD.md, section 1).
SMALLEST_LAST_SIGMA = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleTick:
    """One tick of a fixed schedule. sigma: where it starts. level: sparsity, 0 dense. weights: where it is FITTED."""

    sigma: float
    action: int = COMPUTE
    level: int = 0
    order: int = 1
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPlan:
    """What a file of kind `fixed` holds."""

    family: str
    ticks: tuple[ScheduleTick, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarpFamily:
    """What a file of kind `family` holds; see the module for the fields."""

    family: str
    num_ticks: int
    shift: float
    order: int
    knots: tuple[tuple[float, float], ...]
    error_profile: tuple[tuple[float, float], ...] | None = None
    allocation: Allocation | None = None
    fit: Fit | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def save_schedule(schedule: FixedPlan | WarpFamily, path: str | os.PathLike[str]) -> None:
    """Write a schedule file, atomically. Raises `ValueError` where `load_schedule` would."""
    header: dict[str, Any] = {"format": FORMAT, "version": VERSION, "family": schedule.family}
    if isinstance(schedule, FixedPlan):
        body: dict[str, Any] = {
            "kind": "fixed",
            "num_ticks": len(schedule.ticks),
            "ticks": [_tick_as_json(tick) for tick in schedule.ticks],
        }
    else:
        profile = schedule.error_profile
        body = {
            "kind": "family",
            "num_ticks": schedule.num_ticks,
            "shift": schedule.shift,
            "order": schedule.order,
            "knots": [list(pair) for pair in schedule.knots],
            "error_profile": None if profile is None else [list(pair) for pair in profile],
            "allocation": _allocation_as_json(schedule.allocation),
            "fit": _fit_as_json(schedule.fit),
        }
    document = {**header, **body, "provenance": dict(schedule.provenance)}
    _read(Fields(document, str(path)))
    write_document(path, document)


def _tick_as_json(tick: ScheduleTick) -> dict[str, Any]:
    entry = {"sigma": tick.sigma, "action": ACTION_NAMES[tick.action]}
    entry |= {"level": tick.level, "order": tick.order}
    return entry if tick.weights is None else entry | {"weights": list(tick.weights)}


def load_schedule(path: str | os.PathLike[str]) -> FixedPlan | WarpFamily:
    """Read a schedule file. Raises `ValueError` naming file and field."""
    return _read(read_fields(path, kind=FORMAT, version=VERSION))


def _read(fields: Fields) -> FixedPlan | WarpFamily:
    fixed = fields.text("kind", ("fixed", "family")) == "fixed"
    return _read_fixed(fields) if fixed else _read_family(fields)


def _read_fixed(fields: Fields) -> FixedPlan:
    ticks = tuple(_read_tick(entry) for entry in fields.children("ticks"))
    if len(ticks) != fields.integer("num_ticks", 1):
        fields.fail("ticks", f"have num_ticks = {fields.get('num_ticks')} entries", len(ticks))
    if ticks[0].action != COMPUTE:
        fields.fail(
            "ticks[0].action",
            "be compute (there is nothing to reuse yet)",
            ACTION_NAMES[ticks[0].action],
        )
    sigmas = [*round_float32([tick.sigma for tick in ticks]), 0.0]
    for i, (here, after) in enumerate(itertools.pairwise(sigmas)):
        if not here > after:
            fields.fail(f"ticks[{i}].sigma", f"be above the next one, {after:g}", here)
    return FixedPlan(
        family=fields.text("family"), ticks=ticks, provenance=fields.child("provenance").data
    )


def _read_tick(entry: Fields) -> ScheduleTick:
    order = entry.integer("order", AUTO, FITTED)
    return ScheduleTick(
        sigma=entry.number("sigma", 0.0, 1.0),
        action=ACTION_NAMES.index(entry.text("action", RUNNABLE_ACTIONS)),
        level=entry.integer("level", 0, sparsity.num_levels() - 1),
        order=order,
        weights=entry.numbers("weights", length=NUM_WEIGHTS) if order == FITTED else None,
    )


def _read_family(fields: Fields) -> WarpFamily:
    knots = fields.pairs("knots")
    points = ((0.0, 0.0), *knots, (1.0, 1.0))
    if not all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(points)):
        fields.fail("knots", "rise strictly in u and in w inside (0, 1)", knots)
    shift = fields.number("shift")
    if shift <= 0:
        fields.fail("shift", "be above 0", shift)
    num_ticks = fields.integer("num_ticks", 1)
    last = shift_sigma(Warp(knots)(1 / num_ticks), shift)
    if last < SMALLEST_LAST_SIGMA:
        fields.fail(
            "knots", f"keep phi*(1 / num_ticks) at {SMALLEST_LAST_SIGMA} or above", round(last, 6)
        )
    return WarpFamily(
        family=fields.text("family"),
        num_ticks=num_ticks,
        shift=shift,
        order=fields.integer("order", AUTO, ADAMS_BASHFORTH),
        knots=knots,
        error_profile=_read_profile(fields),
        allocation=_read_allocation(fields),
        fit=_read_fit(fields),
        provenance=fields.child("provenance").data,
    )


def _read_profile(fields: Fields) -> tuple[tuple[float, float], ...] | None:
    if fields.get("error_profile") is None:
        return None
    profile = fields.pairs("error_profile")
    rising = all(a[0] < b[0] for a, b in itertools.pairwise(profile))
    inside = all(0 <= u <= 1 and value > 0 for u, value in profile)
    if len(profile) < 2 or not rising or not inside:
        fields.fail(
            "error_profile",
            "be null or at least two [u, value], u rising in 0..1, value above 0",
            profile,
        )
    return profile


def _allocation_as_json(allocation: Allocation | None) -> dict[str, Any] | None:
    if allocation is None:
        return None
    return {
        "table": [list(row) for row in allocation.table],
        "dial": [list(pair) for pair in allocation.dial],
        "guidance": allocation.guidance,
    }


def _read_allocation(fields: Fields) -> Allocation | None:
    """Files from before allocations have none."""
    if fields.data.get("allocation") is None:
        return None
    entry = fields.child("allocation")
    table, dial = entry.rows("table", 4), entry.pairs("dial")
    rising = all(a[0] < b[0] for a, b in itertools.pairwise(table))
    if len(table) < 2 or not rising or not all(0 <= u <= 1 for u, *_ in table):
        entry.fail("table", "be at least two [u, offset, exponent, tilt], u rising in 0..1", table)
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(dial))
    if len(dial) < 2 or not rising or dial[0][0] <= 0 or dial[0][1] < 1:
        entry.fail(
            "dial", "be at least two [b, evaluations], both rising, evaluations from 1 on", dial
        )
    guidance = None if entry.get("guidance") is None else entry.number("guidance", 0.0)
    return Allocation(
        table=tuple((u, o, e, t) for u, o, e, t in table), dial=dial, guidance=guidance
    )


def _fit_as_json(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    weights = [{"k": k, "rows": [list(row) for row in rows]} for k, rows in fit.weights]
    return {
        "tokens": fit.tokens,
        "guidance": fit.guidance,
        "extra_guidance": fit.extra_guidance,
        "weights": weights,
    }


def _read_fit(fields: Fields) -> Fit | None:
    """Files from before fits have none."""
    if fields.data.get("fit") is None:
        return None
    entry, tables = fields.child("fit"), []
    for table in entry.children("weights"):
        k, rows = table.integer("k", 1), table.rows("rows", NUM_WEIGHTS)
        if len(rows) != k:
            table.fail("rows", f"be k = {k} rows", len(rows))
        tables.append((k, rows))
    if not tables or any(a >= b for (a, _), (b, _) in itertools.pairwise(tables)):
        entry.fail("weights", "be tables of rising k, at least one", [k for k, _ in tables])
    guidance = None if entry.get("guidance") is None else entry.number("guidance", 0.0)
    # Files of older versions do not say: they were fitted without.
    extra = (
        None if entry.data.get("extra_guidance") is None else entry.number("extra_guidance", 0.0)
    )
    return Fit(
        weights=tuple(tables),
        tokens=entry.integer("tokens", 1),
        guidance=guidance,
        extra_guidance=extra,
    )


class FixedSchedule:
    """Every image walks the same list of ticks: its sigmas, actions, sparsity levels and orders."""

    leaves_grid = True

    def __init__(self, plan: FixedPlan, *, name: str = "schedule") -> None:
        self.plan, self.name = plan, name
        self.reuses = any(tick.action != COMPUTE for tick in plan.ticks)
        self._sigmas: torch.Tensor | None = None

    def begin(self, run: Run) -> None:
        """Raises `ValueError` if the run is of another family, too short or starts elsewhere."""
        ticks = self.plan.ticks
        check_family(self.plan.family, run, self.name)
        if len(ticks) > run.ticks:
            msg = f"{self.name} must have at most the run's {run.ticks} ticks, got {len(ticks)}"
            raise ValueError(msg)
        if abs(ticks[0].sigma - run.sigmas[0]) > 1e-4:
            start = run.sigmas[0]
            msg = f"{self.name} must start at the run's sigma {start:g}, got {ticks[0].sigma:g}"
            raise ValueError(msg)
        self._sigmas = device_list([*(tick.sigma for tick in ticks), 0.0], run)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        tick = self._now(state)
        return ComputeDecision(
            action=torch.full_like(state.nfe, tick.action, dtype=torch.int8),
            sparsity=torch.full_like(state.nfe, tick.level, dtype=torch.int32),
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert self._sigmas is not None
        tick = self._now(state)
        step = step_to(next_from_list(self._sigmas, state.step), tick.order)
        if tick.weights is None:
            return step
        return replace(
            step, weights=state.sigma.new_tensor(tick.weights).expand(len(state.sigma), -1)
        )

    def _now(self, state: DenoiseState) -> ScheduleTick:
        # All images stand at the same entry, so the host tick is the index; past the end they are
        # done.
        return self.plan.ticks[min(state.tick, len(self.plan.ticks) - 1)]


class ScheduleFamily:
    """Every image takes k computed steps on phi*(1 - j / k), at the order searched with it.

    k is the smallest of the budget, floor(ticks / speed) and the run's ticks. Where the family has an allocation and a
    speed is all that is asked for, ticks / speed is the mean over images instead, and each has its own k.
    """

    leaves_grid = True
    reuses = False

    def __init__(
        self,
        family: WarpFamily,
        *,
        name: str = "schedule",
        budget: int | None = None,
        speed: float | None = None,
    ) -> None:
        self.family, self.name, self.budget, self.speed = family, name, budget, speed
        self._planned = 0
        self._sigmas: torch.Tensor | None = None
        self._time: WarpedTime | None = None
        self._allocator: Allocator | None = None
        self._fitted: FittedSteps | None = None
        self.notes: tuple[str, ...] = ()

    @property
    def allocates(self) -> bool:
        """Whether images get numbers of their own, whose mean the speed asks for."""
        return self.family.allocation is not None and self.speed is not None and self.budget is None

    def begin(self, run: Run) -> None:
        """Raises `ValueError` if the run is of another model family."""
        check_family(self.family.family, run, self.name)
        warp, self._allocator = Warp(self.family.knots), None
        self._planned = planned_evaluations(run, self.budget, self.speed)
        self._sigmas = device_list(trimmed_sigmas(self._planned, run, warp), run)
        self._fitted = fitted_steps(self.family, run)
        self.notes = misfit_notes(self.family, run)
        if self.allocates and run.budget is None:
            assert self.family.allocation is not None
            assert self.speed is not None
            start = warp.inverse(unshift_sigma(run.sigmas[0], run.shift))
            mean = run.ticks / self.speed
            self._allocator = Allocator(self.family.allocation, mean, run, start)
            self._time = WarpedTime(run, warp)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return compute_all(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert self._sigmas is not None
        if self._allocator is None:
            left = (self._planned - state.nfe).clamp(min=1)
            following = next_from_list(self._sigmas, state.step)
        else:
            assert self._time is not None
            u = self._time.u(state.sigma)
            left = self._allocator.left(state, velocity, u)
            following = self._time.sigma(u * (1 - 1 / left))
        if self._fitted is None:
            return step_to(following, self.family.order)
        return self._fitted.decision(following, state.nfe + left, state.nfe)


def fitted_steps(family: WarpFamily, run: Run) -> FittedSteps | None:
    """The family's fit in a run, None where it has none that suits."""
    if family.fit is None or family.fit.misfit(run, family.shift) is not None:
        return None
    return FittedSteps(family.fit, run, family.order)


def misfit_notes(family: WarpFamily, run: Run, *, allocates: bool = False) -> tuple[str, ...]:
    """What the report says where fitted steps do not suit a run. allocates: whether images then get the same number."""
    misfit = None if family.fit is None else family.fit.misfit(run, family.shift)
    if misfit is None:
        return ()
    alike = " and all images get the same number" if allocates else ""
    return (
        f"the steps of this policy were fitted for other calls (here: {misfit}), so they are not taken{alike}; "
        "calibrate with the arguments that you call with",
    )


def schedule_policy(path: str | os.PathLike[str]) -> FixedSchedule | ScheduleFamily:
    """The policy of a schedule file."""
    schedule, name = load_schedule(path), f"schedule:{Path(path).name}"
    if isinstance(schedule, FixedPlan):
        return FixedSchedule(schedule, name=name)
    return ScheduleFamily(schedule, name=name)

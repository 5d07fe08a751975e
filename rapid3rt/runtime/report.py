# SPDX-License-Identifier: Apache-2.0
"""What a run did, for people: a text table, JSON, and a picture of every image's ticks.

A report is made from a trace and computes nothing but sums. Costs that no one has measured are
marked "estimated".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rapid3rt.planning.trace import Trace, TraceTick
from rapid3rt.types import ACTION_NAMES, COMPUTE, REUSE

DONE = "done"
_TITLES = ("image", "nfe", "equivalent", "reuse", "density", "ms", "timeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One tick of one image. kind: compute, reuse, ... or done, where everything else is 0."""

    sigma: float
    kind: str
    level: int = 0
    density: float = 0.0
    cost: float = 0.0

    @property
    def symbol(self) -> str:
        """C compute, 1-9 compute at that sparsity level, . reuse, f forecast, blank done."""
        if self.kind == ACTION_NAMES[COMPUTE]:
            return str(min(self.level, 9)) if self.level else "C"
        return {ACTION_NAMES[REUSE]: ".", DONE: " "}.get(self.kind, "f")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReport:
    """One image. nfe: ticks in which it computed. equivalent_steps: sum of its action costs.

    actions: one per tick. ms: its share of every tick's time, by the costs of that tick; None where
    the time was not measured.
    """

    nfe: int
    equivalent_steps: float
    actions: tuple[Action, ...]
    ms: float | None

    @property
    def timeline(self) -> str:
        """The symbols of its ticks, such as `CC.C.C  `."""
        return "".join(action.symbol for action in self.actions)

    @property
    def reuses(self) -> int:
        """Ticks in which the image reused."""
        return sum(action.kind == ACTION_NAMES[REUSE] for action in self.actions)

    @property
    def density(self) -> float:
        """Mean attention density of the computed ticks."""
        computed = [a.density for a in self.actions if a.kind == ACTION_NAMES[COMPUTE]]
        return sum(computed) / max(1, len(computed))


class Report:
    """The account of one call of the pipeline.

    trace: what was decided. notes: sentences worth telling the user ("budget clamped to 14").
    plain_tick_ms: measured time of one step of the plain pipeline on the whole batch; with it the
    report states a speed-up.
    """

    def __init__(
        self, trace: Trace, *, notes: Sequence[str] = (), plain_tick_ms: float | None = None
    ) -> None:
        self.trace, self.notes, self.plain_tick_ms = trace, tuple(notes), plain_tick_ms
        ms = _shares(trace)
        self.images = tuple(
            ImageReport(
                nfe=sum(tick.action == COMPUTE for tick in ticks),
                equivalent_steps=sum(tick.cost for tick in ticks),
                actions=_actions(ticks, trace.ticks),
                ms=None if ms is None else ms[i],
            )
            for i, ticks in enumerate(trace.images)
        )

    @property
    def policy(self) -> str:
        """Name of the policy that drove the run."""
        return self.trace.policy

    @property
    def estimated(self) -> bool:
        """Whether the costs are estimates from FLOPs."""
        return not self.trace.costs.measured

    @property
    def nfe(self) -> float:
        """Mean NFE over images."""
        return sum(image.nfe for image in self.images) / len(self.images)

    @property
    def equivalent_steps(self) -> float:
        """Mean equivalent steps over images."""
        return sum(image.equivalent_steps for image in self.images) / len(self.images)

    @property
    def ms(self) -> float | None:
        """Time of all ticks together, None where it was not measured."""
        return None if self.trace.tick_ms is None else sum(self.trace.tick_ms)

    @property
    def speedup(self) -> float | None:
        """Plain time of the run's ticks over the time they took, None where either is unknown."""
        if not self.ms or self.plain_tick_ms is None:
            return None
        return self.plain_tick_ms * self.trace.ticks / self.ms

    def __str__(self) -> str:
        """A table, one line per image, the means, and the notes."""
        rows = [_TITLES, *(_row(str(i), image) for i, image in enumerate(self.images))]
        total = "-" if self.ms is None else f"{self.ms:.1f}"
        reuses = sum(image.reuses for image in self.images) / len(self.images)
        density = sum(image.density for image in self.images) / len(self.images)
        means = (self.nfe, self.equivalent_steps, reuses, density)
        rows.append(
            ("mean", *(f"{mean:.2f}" for mean in means), total, "(ms: all)" if self.ms else "")
        )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self._headline()]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        rule = "-" * max(map(len, lines[1:]))
        lines = [lines[0], lines[1], rule, *lines[2:-1], rule, lines[-1]]
        return "\n".join([*lines, *self._remarks()])

    def to_json(self) -> str:
        """The trace as JSON text."""
        return self.trace.to_json()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as JSON, atomically; `replay:FILE` takes it."""
        self.trace.save(path)

    def plot(self, path: str | os.PathLike[str], labels: Sequence[str] | None = None) -> None:
        """Draw the timeline as a picture (PNG, or what the suffix says); see `runtime.plot`.

        labels: one per image, such as captions. Raises `ImportError` in one line where matplotlib
        is missing.
        """
        from rapid3rt.runtime.plot import draw_report

        draw_report(self, Path(path), labels)

    def _headline(self) -> str:
        trace = self.trace
        parts = [f"policy {trace.policy or '(unnamed)'}"]
        parts += [f"{len(trace.images)} images", f"{trace.ticks} ticks"]
        parts += [f"budget {trace.budget}"] if trace.budget is not None else []
        parts += [f"{self.speedup:.2f}x faster than plain"] if self.speedup is not None else []
        return ", ".join(parts)

    def _remarks(self) -> list[str]:
        remarks = ["timeline: C compute, 1-9 compute at that sparsity level, . reuse, blank done"]
        if self.estimated:
            remarks.append(
                "equivalent steps and ms shares: estimated (no costs were measured here)"
            )
        if self.trace.interrupted:
            remarks.append("interrupted: images may stand above sigma 0")
        return remarks + [f"note: {note}" for note in self.notes]


def _row(name: str, image: ImageReport) -> tuple[str, ...]:
    ms = "-" if image.ms is None else f"{image.ms:.1f}"
    numbers = (f"{image.equivalent_steps:.2f}", str(image.reuses), f"{image.density:.2f}")
    return (name, str(image.nfe), *numbers, ms, image.timeline)


def _actions(ticks: tuple[TraceTick, ...], total: int) -> tuple[Action, ...]:
    taken = [
        Action(
            sigma=tick.sigma,
            kind=ACTION_NAMES[tick.action],
            level=tick.level,
            density=tick.density if tick.action == COMPUTE else 0.0,
            cost=tick.cost,
        )
        for tick in ticks
    ]
    return (*taken, *[Action(sigma=0.0, kind=DONE)] * (total - len(taken)))


def _shares(trace: Trace) -> list[float] | None:
    """Each image's milliseconds: in every tick its cost over the costs of all images there."""
    if trace.tick_ms is None:
        return None
    shares = [0.0] * len(trace.images)
    for t, ms in enumerate(trace.tick_ms):
        costs = [ticks[t].cost if t < len(ticks) else 0.0 for ticks in trace.images]
        total = sum(costs)
        if total:  # a tick in which nothing was left to do belongs to nobody
            shares = [share + ms * cost / total for share, cost in zip(shares, costs, strict=True)]
    return shares

# SPDX-License-Identifier: Apache-2.0
"""The trace: every decision of a run, per image and tick, as data that JSON carries without loss.

It lies below policies and runtime, because both read it: the runtime writes one, `replay` walks
one, the report shows one. Values that were float32 on the device are held as Python floats and come
back bit for bit.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from rapid3rt.planning.jsonfile import Fields, parse_fields, read_fields, write_document
from rapid3rt.types import (
    ACTION_NAMES,
    ATTENTION_MODES,
    AUTO,
    FITTED,
    NUM_WEIGHTS,
    ActionCosts,
)

FORMAT = "rapid3rt.trace"
VERSION = 1


def package_version() -> str:
    """The installed version of this package, `unknown` when it runs from a bare folder."""
    try:
        return metadata.version("rapid3rt")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTick:
    """What one image did in one tick.

    sigma, next_sigma: float32 values. action: COMPUTE, REUSE, ... (a name in JSON). level: sparsity
    level, 0 dense. order: 1 Euler, 2 Adams-Bashforth, 0 auto, 3 fitted, by `weights`. density: fraction of key blocks
    kept (1 dense, 0 when nothing was computed). cost: in equivalent steps.
    """

    sigma: float
    action: int
    next_sigma: float
    level: int = 0
    order: int = 1
    density: float = 1.0
    cost: float = 1.0
    weights: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """This tick as a JSON object."""
        values = {**asdict(self), "action": ACTION_NAMES[self.action]}
        weights = values.pop("weights")
        return values if weights is None else {**values, "weights": list(weights)}

    @classmethod
    def from_fields(cls, fields: Fields) -> TraceTick:
        """Read one tick; errors name the field."""
        sigma, order = fields.number("sigma", 0.0), fields.integer("order", AUTO, FITTED)
        return cls(
            sigma=sigma,
            action=ACTION_NAMES.index(fields.text("action", ACTION_NAMES)),
            next_sigma=fields.number("next_sigma", 0.0, sigma),
            level=fields.integer("level", 0),
            order=order,
            density=fields.number("density", 0.0, 1.0),
            cost=fields.number("cost", 0.0),
            weights=fields.numbers("weights", length=NUM_WEIGHTS) if order == FITTED else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One call of the pipeline. `images[i]` holds image i's ticks until it was done.

    sigmas: the run's own grid (that of `grid_steps` where a policy asked for one), the last 0.
    ticks: iterations of the pipeline's loop. block_q, block_kv: tile sizes of the sparse kernel,
    None where nothing was sparse. attention: "exact" or "fast", what dense rows beside sparse ones
    took; None in traces from before it was kept. tick_ms: wall time of each tick, None when it was
    not measured.
    interrupted: the user stopped the run; images may stand above 0. scheduler: class name of one that stepped all
    images by itself, along sigmas that never rise; None where each image stepped on its own.
    """

    model: str
    family: str
    ticks: int
    sigmas: tuple[float, ...]
    images: tuple[tuple[TraceTick, ...], ...]
    policy: str = ""
    grid_steps: int | None = None
    budget: int | None = None
    block_q: int | None = None
    block_kv: int | None = None
    attention: str | None = None
    costs: ActionCosts = field(default_factory=ActionCosts)
    tick_ms: tuple[float, ...] | None = None
    interrupted: bool = False
    scheduler: str | None = None
    package: str = field(default_factory=package_version)

    def to_dict(self) -> dict[str, Any]:
        """The document of this trace, ready for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "package": self.package,
            "model": self.model,
            "family": self.family,
            "ticks": self.ticks,
            "grid_steps": self.grid_steps,
            "sigmas": list(self.sigmas),
            "block_q": self.block_q,
            "block_kv": self.block_kv,
            "attention": self.attention,
            "policy": self.policy,
            "budget": self.budget,
            "costs": {**asdict(self.costs), "levels": list(self.costs.levels)},
            "tick_ms": None if self.tick_ms is None else list(self.tick_ms),
            "interrupted": self.interrupted,
            "scheduler": self.scheduler,
            "images": [{"ticks": [tick.to_dict() for tick in ticks]} for ticks in self.images],
        }

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace, atomically."""
        write_document(path, self.to_dict())

    @classmethod
    def from_json(cls, text: str, file: str = "trace") -> Trace:
        """Read what `to_json` wrote. Raises `ValueError` naming `file` and the wrong field."""
        return cls._from_fields(parse_fields(text, file, kind=FORMAT, version=VERSION))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a saved trace. Raises `ValueError` naming the file and the wrong field."""
        return cls._from_fields(read_fields(path, kind=FORMAT, version=VERSION))

    @classmethod
    def _from_fields(cls, fields: Fields) -> Trace:
        ticks = fields.integer("ticks", 1)
        costs = fields.child("costs")
        trace = cls(
            model=fields.text("model"),
            family=fields.text("family"),
            ticks=ticks,
            sigmas=fields.numbers("sigmas", 0.0),
            images=tuple(_read_image(image, ticks) for image in fields.children("images")),
            policy=fields.text("policy"),
            grid_steps=fields.optional_integer("grid_steps", 1),
            budget=fields.optional_integer("budget", 1),
            block_q=fields.optional_integer("block_q", 1),
            block_kv=fields.optional_integer("block_kv", 1),
            attention=_newer_text(fields, "attention", ATTENTION_MODES),
            costs=ActionCosts(
                levels=costs.numbers("levels", 0.0),
                reuse=costs.number("reuse", 0.0),
                measured=costs.flag("measured"),
            ),
            tick_ms=None if fields.get("tick_ms") is None else fields.numbers("tick_ms", 0.0),
            interrupted=fields.flag("interrupted"),
            scheduler=_newer_text(fields, "scheduler"),
            package=fields.text("package"),
        )
        _check(trace, fields)
        return trace


def _newer_text(fields: Fields, name: str, choices: tuple[str, ...] = ()) -> str | None:
    """A string or null; null where a trace is older than the field."""
    return None if fields.data.get(name) is None else fields.text(name, choices)


def _read_image(image: Fields, ticks: int) -> tuple[TraceTick, ...]:
    entries = tuple(TraceTick.from_fields(tick) for tick in image.children("ticks"))
    if len(entries) > ticks:
        image.fail("ticks", f"have at most {ticks} entries", len(entries))
    for i, (before, after) in enumerate(itertools.pairwise(entries)):
        if before.next_sigma != after.sigma:
            image.fail(
                f"ticks[{i + 1}].sigma",
                f"be the sigma it was sent to, {before.next_sigma!r}",
                after.sigma,
            )
    return entries


def _check(trace: Trace, fields: Fields) -> None:
    if not trace.images:
        fields.fail("images", "hold at least one image", [])
    _check_grid(trace, fields)
    if not trace.costs.levels:
        fields.fail("costs.levels", "hold at least the dense cost", [])
    if trace.tick_ms is not None and len(trace.tick_ms) > trace.ticks:
        fields.fail("tick_ms", f"have at most {trace.ticks} entries", len(trace.tick_ms))
    for i, ticks in enumerate(trace.images):
        if ticks and ticks[0].sigma != trace.sigmas[0]:
            start = f"start at sigma {trace.sigmas[0]:g}"
            fields.fail(f"images[{i}].ticks", start, ticks[0].sigma)
    if trace.interrupted:
        return
    for i, ticks in enumerate(trace.images):
        if not ticks or ticks[-1].next_sigma != trace.sigmas[-1]:
            got = ticks[-1].next_sigma if ticks else "no ticks"
            end = f"end at sigma {trace.sigmas[-1]:g} (or the trace be interrupted)"
            fields.fail(f"images[{i}].ticks", end, got)


def _check_grid(trace: Trace, fields: Fields) -> None:
    steps = list(itertools.pairwise(trace.sigmas))
    if not steps or not all(a >= b for a, b in steps):
        fields.fail("sigmas", "never rise", list(trace.sigmas))
    if trace.scheduler is None and trace.sigmas[-1] != 0:
        fields.fail("sigmas", "end at 0", list(trace.sigmas))

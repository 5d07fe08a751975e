# SPDX-License-Identifier: Apache-2.0
"""`replay:FILE`: take every decision of a saved trace again, bit for bit."""

from __future__ import annotations

from typing import Any

import torch

from rapid3rt.planning import sparsity
from rapid3rt.planning.trace import Trace
from rapid3rt.types import (
    ACTION_NAMES,
    COMPUTE,
    EULER,
    NUM_WEIGHTS,
    REUSE,
    RUNNABLE_ACTIONS,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)


class Replay:
    """The decisions of a trace. Raises `ValueError` for one that was interrupted: it has no end."""

    def __init__(self, trace: Trace, *, name: str = "replay") -> None:
        if trace.interrupted:
            msg = f"{name} must be of a finished run, got a trace that was interrupted"
            raise ValueError(msg)
        _check_runnable(trace, name)
        self.trace, self.name = trace, name
        self.grid_steps = trace.grid_steps
        self.leaves_grid = _leaves_grid(trace)
        self.reuses = any(t.action != COMPUTE for ticks in trace.images for t in ticks)
        self._actions = torch.empty(0)
        self._levels = torch.empty(0)
        self._next = torch.empty(0)
        self._orders = torch.empty(0)
        self._weights: torch.Tensor | None = None

    def begin(self, run: Run) -> None:
        """Raises `ValueError` naming everything in which the run differs from the traced one."""
        differences = _differences(self.trace, run)
        if differences:
            msg = f"{self.name} must be of the same run, got another: {'; '.join(differences)}"
            raise ValueError(msg)
        images = self.trace.images
        table = [
            [ticks[t] if t < len(ticks) else None for ticks in images]
            for t in range(max(map(len, images)))
        ]

        def stack(values: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=run.device)

        # Entries of finished images are ignored, so any valid value pads them.
        self._actions = stack(
            [[t.action if t else COMPUTE for t in row] for row in table], torch.int8
        )
        self._levels = stack([[t.level if t else 0 for t in row] for row in table], torch.int32)
        self._next = stack(
            [[t.next_sigma if t else 0.0 for t in row] for row in table], torch.float32
        )
        self._orders = stack([[t.order if t else EULER for t in row] for row in table], torch.int8)
        self._weights = None
        if any(t.weights for ticks in images for t in ticks):
            none = (0.0,) * NUM_WEIGHTS
            rows = [[(t.weights if t else None) or none for t in row] for row in table]
            self._weights = stack(rows, torch.float32)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        row = self._row(state)
        return ComputeDecision(action=self._actions[row], sparsity=self._levels[row])

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        row = self._row(state)
        return StepDecision(
            next_sigma=self._next[row],
            order=self._orders[row],
            weights=None if self._weights is None else self._weights[row],
        )

    def _row(self, state: DenoiseState) -> int:
        return min(state.tick, len(self._next) - 1)


def _check_runnable(trace: Trace, name: str) -> None:
    """Raise `ValueError` for a decision that no run of this version can take, naming where it stands."""
    for i, ticks in enumerate(trace.images):
        if ticks and ticks[0].action != COMPUTE:
            msg = "must be compute (there is nothing to reuse yet)"
            raise ValueError(
                f"{name}: images[{i}].ticks[0].action {msg}, got {ACTION_NAMES[ticks[0].action]!r}"
            )
        for t, tick in enumerate(ticks):
            if tick.action not in (COMPUTE, REUSE):
                msg = f"be one of {', '.join(RUNNABLE_ACTIONS)}, got {ACTION_NAMES[tick.action]!r}"
                raise ValueError(f"{name}: images[{i}].ticks[{t}].action must {msg}")
            if tick.level >= sparsity.num_levels():
                msg = f"be 0 to {sparsity.num_levels() - 1}, got {tick.level}"
                raise ValueError(f"{name}: images[{i}].ticks[{t}].level must {msg}")


def _leaves_grid(trace: Trace) -> bool:
    """Whether any image stepped elsewhere than to the next point of the run's grid."""
    grid = trace.sigmas[1:]
    return any(
        len(ticks) > len(grid) or any(tick.next_sigma != grid[t] for t, tick in enumerate(ticks))
        for ticks in trace.images
    )


def _is_sparse(trace: Trace) -> bool:
    return any(tick.level for ticks in trace.images for tick in ticks)


def _differences(trace: Trace, run: Run) -> list[str]:
    block = (
        None if trace.block_q is None or trace.block_kv is None else (trace.block_q, trace.block_kv)
    )
    pairs: list[tuple[str, object, object]] = [
        ("family", trace.family, run.family),
        ("images", len(trace.images), run.images),
        ("ticks", trace.ticks, run.ticks),
        ("scheduler", trace.scheduler, run.scheduler),
    ]
    if run.model is not None:
        pairs.append(("model", trace.model, run.model))
    if run.block_size is not None and block is not None:
        pairs.append(("block size", block, run.block_size))
    # Where nothing was sparse both modes are the model's own attention.
    if run.attention is not None and trace.attention is not None and _is_sparse(trace):
        pairs.append(("attention", trace.attention, run.attention))
    differing = [
        f"{name} {old!r} in the trace, {new!r} in the run" for name, old, new in pairs if old != new
    ]
    if not differing and trace.sigmas != run.sigmas:
        differing.append("the grid of sigmas (another shift, size or strength)")
    return differing

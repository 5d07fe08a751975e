# SPDX-License-Identifier: Apache-2.0
"""What the generator does along the converged solution, recorded once per pair of prompt and noise.

One long run visits every point of a lattice of sigmas. From the latents x_i and velocities v_i there, the error of any
single step of the solver between lattice points follows without another evaluation; only inner products are needed, so
only they are kept. Reuse and sparse attention answer with another velocity at the same x_i: detours along the same
trajectory measure how far off it is, on a coarser lattice.

Shape letters: P pairs, B images of a batch, M intervals of the lattice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from rapid3rt.calibrate.measure import Bench, accelerated
from rapid3rt.policies.base import device_list, next_from_list, step_to
from rapid3rt.types import (
    AUTO,
    COMPUTE,
    EULER,
    REUSE,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)
from training.search.lattice import Lattice

COARSE = 24
"""Points of the lattice of detours, at least."""
WINDOW = 6
"""Coarse intervals after a compute within which its residual is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Inner products are means over the elements of a latent.

    gram: float64 `[P, 2M + 1, 2M + 1]` of x_0 .. x_M, v_0 .. v_(M-1). Mean squared distances to v of other velocities:
    levels: float64 `[P, levels, points]`, of each sparsity level that may be tried, at every second coarse point;
    reuse: `[P, points, WINDOW]`, of the residual of coarse point h reused 1, 2, ... coarse intervals later, beyond the
    end as at the nearest point before. Both may have no points.
    """

    gram: torch.Tensor
    levels: torch.Tensor
    reuse: torch.Tensor

    @property
    def size(self) -> int:
        """M."""
        return self.gram.shape[1] // 2


def stride(lattice_end: int) -> int:
    """Lattice points from one coarse point to the next."""
    return max(1, lattice_end // COARSE)


def cost(lattice: Lattice) -> int:
    """Evaluations of one image that a recording takes."""
    return sum(
        sum(step.action == COMPUTE for step in script)
        for script in (_walk(lattice), *_detours(lattice))
    )


def record(bench: Bench, lattice: Lattice, pairs: Sequence[int]) -> Recording:
    """Run walk and detours of all pairs, batch by batch; batches that lie in the bench's folder are read."""
    parts = []
    for i, batch in enumerate(bench.batches(pairs)):
        name = f"recording-{i * bench.batch_size:04d}-{len(batch)}"
        parts.append(bench.keep(name, partial(_record_batch, bench, lattice, batch)))
    return Recording(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """One tick of a recorded run: evaluate at a lattice point."""

    at: int
    action: int = COMPUTE
    level: int = 0


def _walk(lattice: Lattice) -> list[_Visit]:
    return [_Visit(at=i) for i in range(lattice.end)]


def _level_points(lattice: Lattice) -> range:
    return range(0, lattice.end, 2 * stride(lattice.end)) if lattice.levels else range(0)


def _reuse_points(lattice: Lattice) -> range:
    return range(0, lattice.end, stride(lattice.end)) if lattice.reuse else range(0)


def _detours(lattice: Lattice) -> list[list[_Visit]]:
    """Runs that evaluate otherwise. Sigma never rises in a run: residuals of neighbours are tried in different ones."""
    scripts = []
    if lattice.levels:
        scripts.append(
            [_Visit(at=i, level=x) for i in _level_points(lattice) for x in lattice.levels]
        )
    points, step = _reuse_points(lattice), stride(lattice.end)
    for first in range(min(WINDOW + 1, len(points))):
        script = [] if first == 0 else [_Visit(at=0)]
        for h in points[first :: WINDOW + 1]:
            script.append(_Visit(at=h))
            script += [
                _Visit(at=i, action=REUSE)
                for i in range(h + step, h + WINDOW * step + 1, step)
                if i < lattice.end
            ]
        scripts.append(script)
    return scripts


class _Recorder:
    """Evaluates at lattice points as a script says, wherever a callback has put the latents."""

    name, leaves_grid = "recorder", True

    def __init__(self, lattice: Lattice, script: Sequence[_Visit], keep_latents: bool) -> None:
        self.lattice, self.script, self.keep_latents = lattice, script, keep_latents
        self.reuses = any(visit.action == REUSE for visit in script)
        self.latents: list[torch.Tensor] = []
        self.velocities: list[torch.Tensor] = []
        self._targets = torch.empty(0)

    def begin(self, run: Run) -> None:
        at = [visit.at for visit in self.script[1:]] + [self.lattice.end]
        self._targets = device_list([0.0, *(self.lattice.sigmas[i] for i in at)], run)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        visit = self.script[state.tick]
        return ComputeDecision(
            action=torch.full_like(state.nfe, visit.action, dtype=torch.int8),
            sparsity=torch.full_like(state.nfe, visit.level, dtype=torch.int32),
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        self.velocities.append(velocity.clone())
        ends = state.tick == len(self.script) - 1
        if self.keep_latents:
            self.latents.append(state.latents.clone())
            if ends:  # x_M, which no policy sees: of the Euler step that this tick takes
                self.latents.append(state.latents - state.sigma.view(-1, 1, 1, 1) * velocity)
        return step_to(next_from_list(self._targets, state.step), EULER if ends else AUTO)


_Excess: TypeAlias = dict[tuple[_Visit, int], torch.Tensor]
"""Mean squared distance of a visit's velocity from the dense one, `[B]`. The number: whose residual a reuse takes."""


def _record_batch(bench: Bench, lattice: Lattice, pairs: Sequence[int]) -> dict[str, torch.Tensor]:
    truth: dict[int, torch.Tensor] = {}

    def keep(_pipe: Any, tick: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        truth[tick + 1] = values["latents"].clone()
        return values

    walk = _run(bench, lattice, pairs, _walk(lattice), keep)
    excess: _Excess = {}
    for script in _detours(lattice):
        seen, source = _run(bench, lattice, pairs, script, _put_back(truth, script)).velocities, 0
        for visit, velocity in zip(script, seen, strict=True):
            source = visit.at if visit.action == COMPUTE else source
            miss = velocity.double() - walk.velocities[visit.at].double()
            excess[visit, source] = miss.square().mean((1, 2, 3)).cpu()
    return {
        "gram": _gram(walk.latents, walk.velocities),
        "levels": _level_table(lattice, excess, len(pairs)),
        "reuse": _reuse_table(lattice, excess, len(pairs)),
    }


def _put_back(truth: Mapping[int, torch.Tensor], script: Sequence[_Visit]) -> Callable[..., Any]:
    """A callback that puts the latents back on the recorded trajectory, where the next visit is."""

    def put(_pipe: Any, tick: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        following = script[min(tick + 1, len(script) - 1)].at
        return {**values, "latents": truth.get(following, values["latents"])}

    return put


def _run(
    bench: Bench, lattice: Lattice, pairs: Sequence[int], script: list[_Visit], callback: Any
) -> _Recorder:
    recorder = _Recorder(lattice, script, keep_latents=script == _walk(lattice))
    with accelerated(bench.pipe, recorder):
        bench.images(len(script), pairs=pairs, callback_on_step_end=callback)
    return recorder


def _gram(latents: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 `[B, 2M + 1, 2M + 1]`, image by image: in float64 a large model's trajectory is large."""
    rows = []
    for image in range(len(latents[0])):
        stack = torch.stack([x[image].double().flatten() for x in (*latents, *velocities)])
        rows.append((stack @ stack.T / stack.shape[1]).cpu())
    return torch.stack(rows)


def _level_table(lattice: Lattice, excess: _Excess, pairs: int) -> torch.Tensor:
    points = _level_points(lattice)
    table = torch.zeros(pairs, len(lattice.levels), len(points), dtype=torch.float64)
    for (x, level), (p, i) in itertools.product(enumerate(lattice.levels), enumerate(points)):
        table[:, x, p] = excess[_Visit(at=i, level=level), i]
    return table


def _reuse_table(lattice: Lattice, excess: _Excess, pairs: int) -> torch.Tensor:
    points, step = _reuse_points(lattice), stride(lattice.end)
    table = torch.zeros(pairs, len(points), WINDOW, dtype=torch.float64)
    for (p, h), s in itertools.product(enumerate(points), range(WINDOW)):
        before = table[:, p, s - 1] if s else table[:, p - 1, 0]
        visit = _Visit(at=h + (s + 1) * step, action=REUSE)
        table[:, p, s] = excess.get((visit, h), before)
    return table

# SPDX-License-Identifier: Apache-2.0
"""Weights of fitted steps, by Gauss-Newton on what comes out at the end.

A step's own error, measured along the converged solution, is the wrong thing to lower: what minimises it shrinks the
latents a little at every step, and the images get worse (tiny SD3: five per cent instead of fifteen with a correction
along v - v' alone). So the unknowns of all steps of one k are fitted together to the last latents. Their Jacobian comes
from runs that are disturbed at one step and go on from there, a few hundred evaluations of an image; no gradient passes
through the model. What is lowered is the mean over images of the root of their error: the mean of the error itself
hangs on the few whose outcome flips. A fit is kept where it lowers that on other images.

Shape letters: P pairs, k evaluations, n unknowns, B images of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from rapid3rt.calibrate.measure import REFERENCE_STEPS, Bench, accelerated, family_key
from rapid3rt.policies import Steps, WarpFamily
from rapid3rt.policies.base import (
    Warp,
    compute_all,
    device_list,
    step_to,
    trimmed_sigmas,
)
from rapid3rt.policies.fitted import START_UP, Fit, Row, stretched
from rapid3rt.runtime.solver import Solver
from rapid3rt.types import (
    AUTO,
    EULER,
    FITTED,
    NUM_WEIGHTS,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)

FIT_STEPS = (4, 5, 6, 8, 10, 13, 17)
"""k that are fitted; between them weights are interpolated."""
FIT_PAIRS = 24
"""Pairs that weights are fitted on, at most; as many others say whether they are kept."""
NODES = 8
"""Steps of one k whose weights are unknowns, at most; those between are interpolated."""
_FIRST: Row = (0.0, 0.0, 0.15, 0.0)
"""Where the first fit begins: about a third of what Adams-Bashforth takes."""
_DISTURBANCE = 0.1
_ROUNDS = 2  # of the first k; every other begins at what was found before
_DAMPING = (0.03, 0.3)
_SHARES = (1.0, 0.5)
FLOOR = 0.1
"""Of the median error: what is added below the root, so that the easiest images do not decide."""
Weights: TypeAlias = torch.Tensor
Grid: TypeAlias = Callable[[Run], Sequence[float]]
"""Where the steps of a run start, and the 0 at which the last one ends."""


def fit(bench: Bench, family: WarpFamily) -> Fit | None:
    """Fit every k; None where that helps at none, or there are fewer than two prompts."""
    ks = [k for k in FIT_STEPS if k <= bench.steps]
    half = min(FIT_PAIRS, len(bench.prompts) // 2)
    if not ks or not half:
        return None
    fitted, judges = range(half), range(half, 2 * half)
    tables: dict[int, tuple[Row, ...]] = {}
    kept: list[int] = []
    bar = tqdm(ks, desc="fit of steps", disable=not bench.progress)
    for k in bar:
        start = stretched(tables[max(tables)], k) if tables else [_FIRST] * k
        rounds = 1 if tables else _ROUNDS
        key = f"fit {family_key(family)} k={k} pairs={half}"
        make = partial(fit_grid, bench, family_grid(family, k), fitted, start, rounds)
        tables[k] = as_rows(bench.remember(key, make))
        alone = replace(family, fit=_fit_of(bench, {k: tables[k]}))
        before, after = (
            float(bench.family_errors(f, k, pairs=judges).sqrt().mean()) for f in (family, alone)
        )
        bar.set_postfix_str(f"k={k}: root error {after / before:.2f} of before")
        kept += [k] if after < before else []
    run = longest_run(kept, ks)
    return _fit_of(bench, {k: tables[k] for k in run}) if run else None


def longest_run(kept: Sequence[int], ks: Sequence[int]) -> list[int]:
    """The longest stretch of ks that are all kept: between two of them weights are interpolated."""
    best: list[int] = []
    run: list[int] = []
    for k in ks:
        run = [*run, k] if k in kept else []
        best = run if len(run) > len(best) else best
    return best


def as_rows(values: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    """Rows that were kept as JSON."""
    return tuple(tuple(float(x) for x in row) for row in values)


def family_grid(family: WarpFamily, k: int) -> Grid:
    """Of a family at k evaluations."""
    return lambda run: trimmed_sigmas(k, run, Warp(family.knots))


def _fit_of(bench: Bench, tables: Mapping[int, tuple[Row, ...]]) -> Fit:
    tokens, guidance, extra = bench.remember("tokens and scales", partial(_probe, bench))
    return Fit(
        weights=tuple(tables.items()),
        tokens=int(tokens),
        guidance=guidance,
        extra_guidance=extra,
    )


def _probe(bench: Bench) -> list[Any]:
    run = bench.probe()
    return [math.prod(run.resolution), run.guidance, run.extra_guidance]


# Gauss-Newton --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unknowns:
    """Which weights are fitted. hats: `[k, nodes]`, rows of all steps are hats @ theta. live: (node, weight) each."""

    nodes: tuple[int, ...]
    hats: torch.Tensor
    live: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, k: int) -> Unknowns:
        """Start-up, last and even ones between."""
        first = list(range(min(START_UP + 1, k)))
        rest = torch.linspace(START_UP, k - 1, NODES - START_UP).round().int().tolist()
        nodes = sorted({*first, *(n for n in rest if n < k)} if k > NODES else set(range(k)))
        hats = torch.zeros(k, len(nodes), dtype=torch.float64)
        for j in range(k):
            right = next(i for i, node in enumerate(nodes) if node >= j)
            left = right if nodes[right] == j else right - 1
            share = 0.0 if left == right else (j - nodes[left]) / (nodes[right] - nodes[left])
            hats[j, left] += 1 - share
            hats[j, right] += share
        # The first step has no velocity before it, the second one no two.
        live = [(i, w) for i, node in enumerate(nodes) for w in range(min(NUM_WEIGHTS, 2 + node))]
        return cls(tuple(nodes), hats, tuple(live))

    def first_step(self, node: int) -> int:
        """That a node's weights reach."""
        return int(self.hats[:, node].nonzero()[0])


def fit_grid(
    bench: Bench, grid: Grid, pairs: Sequence[int], start: Sequence[Row], rounds: int
) -> list[list[float]]:
    """Rows of weights `[k][NUM_WEIGHTS]` for the k steps of a grid, fitted on pairs. start: where to begin, k rows."""
    unknowns, target = Unknowns.of(len(start)), last_latents(bench, pairs)
    theta = torch.tensor(start, dtype=torch.float64)[list(unknowns.nodes)]
    for _ in range(rounds):
        gram, slope, errors = normal_equations(bench, grid, unknowns, theta, pairs, target)
        floor = FLOOR * errors.median()
        weight = (errors + floor) ** -0.5
        a, b = torch.tensordot(weight, gram, 1), torch.tensordot(weight, slope, 1)
        best = (errors + floor).sqrt().mean()
        for trial in _trials(theta, unknowns, a, b):
            tried = _errors(bench, grid, unknowns, trial, pairs, target)
            score = (tried + floor).sqrt().mean()
            if score < best:
                best, theta = score, trial
    rows: list[list[float]] = (unknowns.hats @ theta).tolist()
    return rows


def _trials(
    theta: Weights, unknowns: Unknowns, a: torch.Tensor, b: torch.Tensor
) -> Iterator[Weights]:
    """Steps of several lengths and dampings from theta."""
    for damping in _DAMPING:
        damped = a + torch.diag(damping * a.diagonal() + 1e-3 * a.diagonal().mean())
        step = torch.linalg.solve(damped, b)
        for share in _SHARES:
            trial = theta.clone()
            for (node, w), change in zip(unknowns.live, step.tolist(), strict=True):
                trial[node, w] -= share * change
            yield trial


def last_latents(bench: Bench, pairs: Sequence[int]) -> torch.Tensor:
    """Last latents of the converged solutions, as the pipeline has them, float32 `[P, ...]` on the CPU; made once."""
    which = hashlib.sha256(repr(list(pairs)).encode()).hexdigest()[:8]

    def converge() -> dict[str, torch.Tensor]:
        with accelerated(bench.pipe, Steps(REFERENCE_STEPS, trim=True, order=AUTO)):
            batches = [
                bench.generate(batch, REFERENCE_STEPS, output_type="latent").float().cpu()
                for batch in bench.batches(pairs)
            ]
        return {"latents": torch.cat(batches)}

    return bench.keep(f"latents-{len(pairs)}-{which}", converge)["latents"]


def _errors(
    bench: Bench,
    grid: Grid,
    unknowns: Unknowns,
    theta: Weights,
    pairs: Sequence[int],
    target: torch.Tensor,
) -> torch.Tensor:
    """Mean squared errors of the last latents, float64 `[P]`."""
    rows, ends = unknowns.hats @ theta, []
    for batch in bench.batches(pairs):
        walk = _Walk(grid, rows.expand(len(batch), -1, -1))
        _run(bench, walk, batch)
        ends.append(walk.end())
    return (torch.cat(ends) - target).double().square().flatten(1).mean(1)


def normal_equations(
    bench: Bench,
    grid: Grid,
    unknowns: Unknowns,
    theta: Weights,
    pairs: Sequence[int],
    target: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """J J^T, J r and r^2 of every pair, means over latents, float64 `[P, n, n]`, `[P, n]` and `[P]`.

    J: of the last latents. r: what they miss by.
    """
    rows, grams, slopes, errors = unknowns.hats @ theta, [], [], []
    for batch in bench.batches(pairs):
        walk = _Walk(grid, rows.expand(len(batch), -1, -1))
        _run(bench, walk, batch)
        end = walk.end()
        columns = []
        for node in range(len(unknowns.nodes)):
            disturbed = [_disturb(unknowns, theta, node, w) for n, w in unknowns.live if n == node]
            tail = walk.again(unknowns.first_step(node), torch.stack(disturbed))
            if tail.start < walk.k:
                _run(bench, tail, list(batch) * len(disturbed))
            columns += [(part - end) / _DISTURBANCE for part in tail.end().split(len(batch))]
        jacobian = torch.stack(columns, 1).flatten(2).double()
        miss = (end - target[[pairs.index(i) for i in batch]]).flatten(1).double()
        grams.append(jacobian @ jacobian.mT / miss.shape[1])
        slopes.append((jacobian @ miss[..., None])[..., 0] / miss.shape[1])
        errors.append(miss.square().mean(1))
    return torch.cat(grams), torch.cat(slopes), torch.cat(errors)


def _disturb(unknowns: Unknowns, theta: Weights, node: int, w: int) -> Weights:
    moved = theta.clone()
    moved[node, w] += _DISTURBANCE
    return unknowns.hats @ moved


# Runs ----------------------------------------------------------------------------------------------------------------


class _Walk:
    """Takes fitted steps, every image by rows of its own, from evaluation `start` on.

    It steps by a solver of its own and a callback hands what comes out to the pipeline: so a walk can begin where
    another one passed. rows: `[B, k, NUM_WEIGHTS]`.
    """

    name, leaves_grid, reuses = "fit", True, False

    def __init__(self, grid: Grid, rows: Weights) -> None:
        self.grid, self.rows, self.k = grid, rows.float(), rows.shape[1]
        self.start = 0
        self.run: Run
        self._passed: list[tuple[Solver, torch.Tensor, torch.Tensor]] = []
        self._solver: Solver | None = None
        self._latents = torch.empty(0)
        self._sigmas = torch.empty(0)
        self._axes = 4

    def begin(self, run: Run) -> None:
        self.run = run
        self.rows = self.rows.to(run.device)
        self._sigmas = device_list(self.grid(run), run)
        if self._solver is None:
            self._solver = Solver.start(run.images, run.device)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return compute_all(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        # Where a walk goes on, the pipeline's first evaluation is of latents that are put aside.
        j = state.tick + self.start - (self.start > 0)
        if j >= self.start:
            self._take(j, state.latents, velocity)
        return step_to(self._sigmas[j + 1].expand_as(state.sigma), EULER)

    def _take(self, j: int, latents: torch.Tensor, velocity: torch.Tensor) -> None:
        assert self._solver is not None
        self._passed.append((replace(self._solver), latents.clone(), velocity.clone()))
        images = len(latents)
        self._latents = self._solver.step(
            latents.float(),
            velocity,
            self._sigmas[j].expand(images),
            self._sigmas[j + 1].expand(images),
            torch.full((images,), FITTED, dtype=torch.int8, device=latents.device),
            torch.ones(images, dtype=torch.bool, device=latents.device),
            self.rows[:, j],
        )

    def put(self, _pipe: Any, _tick: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Callback of the pipeline: its latents are those of this walk."""
        given = values["latents"]
        self._axes = given.ndim
        return {**values, "latents": _as_given(self._latents, given.ndim).to(given.dtype)}

    def again(self, j: int, rows: Weights) -> _Walk:
        """A walk that went as this one up to evaluation j and takes its step by other rows, `[R, k, NUM_WEIGHTS]`.

        R copies of all images, copy by copy.
        """
        times = len(rows)
        solver, latents, velocity = self._passed[j]
        other = _Walk(self.grid, rows.repeat_interleave(len(latents), 0).to(latents.device))
        other.run, other._sigmas, other._axes = self.run, self._sigmas, self._axes
        other._solver = _repeated(solver, times)
        other._take(j, torch.cat([latents] * times), torch.cat([velocity] * times))
        other.start = j + 1
        return other

    def end(self) -> torch.Tensor:
        """The last latents as the pipeline has them, float32 on the CPU."""
        return _as_given(self._latents, self._axes).float().cpu()


def _run(bench: Bench, walk: _Walk, pairs: Sequence[int]) -> None:
    with accelerated(bench.pipe, walk):
        bench.generate(pairs, bench.steps, output_type="latent", callback_on_step_end=walk.put)


def _as_given(latents: torch.Tensor, axes: int) -> torch.Tensor:
    """`[B, C, h, w]` as the pipeline has it: packed into tokens, `[B, h w, C]`, where it has three axes."""
    return latents if axes == latents.ndim else latents.permute(0, 2, 3, 1).flatten(1, 2)


def _repeated(solver: Solver, times: int) -> Solver:
    """Copies of all images, copy by copy."""
    names = [field.name for field in fields(solver) if getattr(solver, field.name) is not None]
    copies = {name: torch.cat([getattr(solver, name)] * times) for name in names}
    return replace(solver, **copies)

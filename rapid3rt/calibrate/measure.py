# SPDX-License-Identifier: Apache-2.0
"""Fit a pipeline's own sigma grid and order from a dozen prompts, and measure what every action costs here.

The grid is a family: one monotone warp of u, good for every number of evaluations (METHOD.md, section 6 c). The
objective is the mean squared error of decoded images to the converged solution of the same noise, at k = 6 and 8.
Nothing is trained. Every measurement goes to a file in the output folder, so an interrupted call goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from rapid3rt.pipeline import accelerate, model_id, report, restore
from rapid3rt.planning import sparsity
from rapid3rt.planning.jsonfile import write_document
from rapid3rt.policies import (
    FixedPlan,
    FixedSchedule,
    ScheduleFamily,
    ScheduleTick,
    Steps,
    Threshold,
    WarpFamily,
)
from rapid3rt.policies.base import Warp, shift_sigma, trimmed_sigmas, unshift_sigma
from rapid3rt.policies.controller import local_error
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.types import (
    ADAMS_BASHFORTH,
    AUTO,
    EULER,
    ActionCosts,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)

NUM_KNOTS = 6
SEARCH_STEPS = (6, 8)
TABLE_STEPS = (4, 5, 6, 8, 10, 14)
REFERENCE_STEPS = 120
COST_BATCH = 8
_PROFILE_STEPS = 28


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    out: str | Path,
    *,
    num_inference_steps: int = 28,
    seed: int = 0,
    batch_size: int = 8,
    evaluations: int = 40,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PolicyFolder:
    """Search the grid family of this pipeline and measure its actions; write a policy folder.

    Parameters
    ----------
    pipe: a plain (not accelerated) pipeline of a supported family.
    prompts: a dozen or more; each is paired with its own noise, drawn from `seed` and its position.
    out: folder of the policy; give the same folder again to go on after an interruption.
    num_inference_steps: steps of the pipeline that users will call. evaluations: warps to try.
    call: further arguments of the pipeline's call (guidance_scale, height, ...), the same for every measurement: give
        those that users will call with, since guidance above all decides where the steps belong.

    Returns
    -------
    The policy, also saved in `out`: `accelerate(pipe, policy=out, speed=2.5)`.

    Raises
    ------
    ValueError: no prompts, fewer than 8 steps, or a folder that holds another calibration.
    UnsupportedError, StateError: as `accelerate`.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if num_inference_steps < max(SEARCH_STEPS):
        raise ValueError(
            f"num_inference_steps must be at least {max(SEARCH_STEPS)}, got {num_inference_steps}"
        )
    bench = _Bench(
        pipe,
        list(prompts),
        Path(out),
        num_inference_steps,
        seed,
        batch_size,
        dict(call or {}),
        progress,
    )
    order, knots = _search(bench, evaluations)
    schedule = bench.family(order, knots, profile=bench.error_profile(order, knots))
    costs = bench.costs()
    table = _table(bench, order, knots)
    provenance = {
        "prompts": len(prompts),
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "call": {name: value for name, value in (call or {}).items() if _is_plain(value)},
        "torch_threads": torch.get_num_threads(),
        "mean_squared_error": table,
    }
    folder = PolicyFolder(model=bench.model, schedule=schedule, costs=costs, provenance=provenance)
    folder.save(out)
    _plot(table, Path(out) / "calibration.png")
    return folder


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def format_table(table: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of schedules, columns of k, errors in 1e-3."""
    columns = list(next(iter(table.values())))
    lines = ["mean squared error to the converged solution, in 1e-3"]
    lines.append(f"{'k':<22}" + "".join(f"{c:>9}" for c in columns))
    for name, row in table.items():
        lines.append(f"{name:<22}" + "".join(f"{1000 * row[c]:>9.3f}" for c in columns))
    return "\n".join(lines)


class _Bench:
    """Runs schedules on the calibration pairs and remembers every number in `measurements.json`."""

    def __init__(
        self,
        pipe: Any,
        prompts: list[str],
        out: Path,
        steps: int,
        seed: int,
        batch_size: int,
        call: dict[str, Any],
        progress: bool,
    ) -> None:
        self.pipe, self.prompts, self.out, self.steps, self.seed = pipe, prompts, out, steps, seed
        self.batch_size, self.call, self.progress = batch_size, call, progress
        self.model = model_id(pipe.transformer)
        out.mkdir(parents=True, exist_ok=True)
        settings = [self.model, prompts, steps, seed, sorted(map(str, call.items()))]
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.path = out / "measurements.json"
        self.values: dict[str, Any] = self._load()
        self._reference: torch.Tensor | None = None
        probed = self.remember("family and shift", self._probe)
        self.family_name, self.shift = str(probed[0]), float(probed[1])

    def _load(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"calibration": self.key}
        values: dict[str, Any] = json.loads(self.path.read_text())
        if values.get("calibration") != self.key:
            raise ValueError(
                f"out must be a new folder or one of the same calibration, got {str(self.out)!r}, whose measurements "
                "were made with other prompts, steps or arguments"
            )
        return values

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """The stored value of a key, made and stored where it is missing."""
        if key not in self.values:
            self.values[key] = make()
            write_document(self.path, self.values)
        return self.values[key]

    def _probe(self) -> list[Any]:
        """Family and shift of a run, as the runtime sees them: one tick of one image."""
        seen: list[Run] = []

        class Probe(Steps):
            def begin(self, run: Run) -> None:
                seen.append(run)
                super().begin(run)

        with _accelerated(self.pipe, Probe(1, trim=True)):
            self._call(self.prompts[:1], [0], 1, output_type="latent")
        return [seen[0].family, seen[0].shift]

    def _call(self, prompts: list[str], noises: list[int], steps: int, **kwargs: Any) -> Any:
        bars = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(disable=True)
        try:
            generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + i) for i in noises]
            arguments = {
                **self.call,
                "num_inference_steps": steps,
                "generator": generators,
                **kwargs,
            }
            return self.pipe(prompts, **arguments).images
        finally:
            self.pipe.set_progress_bar_config(**bars)

    def images(self, steps: int, description: str | None = None) -> torch.Tensor:
        """Decoded images of all pairs in -1..1, under whatever drives the pipeline now: float32 `[n, 3, H, W]`."""
        starts = range(0, len(self.prompts), self.batch_size)
        chunks = []
        for start in tqdm(starts, desc=description, disable=not (self.progress and description)):
            prompts = self.prompts[start : start + self.batch_size]
            noises = list(range(start, start + len(prompts)))
            chunks.append(
                self._call(prompts, noises, steps, output_type="pt").float().cpu() * 2 - 1
            )
        return torch.cat(chunks)

    def reference(self) -> torch.Tensor:
        """The converged solutions, made once and kept beside the measurements."""
        path = self.out / "references.safetensors"
        if self._reference is None and path.exists():
            stored = load_file(path)
            if stored["images"].shape[0] == len(self.prompts):
                self._reference = stored["images"]
        if self._reference is None:
            with _accelerated(self.pipe, Steps(REFERENCE_STEPS, trim=True, order=AUTO)):
                self._reference = self.images(REFERENCE_STEPS, "converged solutions")
            save_file({"images": self._reference.contiguous()}, path)
        return self._reference

    def family(self, order: int, knots: Sequence[float], profile: Any = None) -> WarpFamily:
        """The schedule family of some knot values at even u."""
        u = [(i + 1) / (NUM_KNOTS + 1) for i in range(NUM_KNOTS)]
        return WarpFamily(
            family=self.family_name,
            num_ticks=self.steps,
            shift=self.shift,
            order=order,
            knots=tuple(zip(u, knots, strict=True)),
            error_profile=profile,
        )

    def error(self, policy: Any, k: int, key: str) -> float:
        """Mean squared error of a policy at k evaluations to the converged solutions."""

        def measure() -> float:
            reference = self.reference()
            with _accelerated(self.pipe, policy):
                images = self.images(max(self.steps, k))
            return float((images - reference).square().mean())

        return float(self.remember(f"{key} k={k}", measure))

    def family_error(self, order: int, knots: Sequence[float], k: int) -> float:
        """`error` of a family."""
        name = f"order={order} knots=" + ",".join(f"{w:.5f}" for w in knots)
        if name + f" k={k}" in self.values:
            return float(self.values[name + f" k={k}"])
        return self.error(ScheduleFamily(self.family(order, knots), budget=k), k, name)

    def error_profile(self, order: int, knots: Sequence[float]) -> tuple[tuple[float, float], ...]:
        """Mean local error over u on the searched grid, for `controller`."""

        def measure() -> list[list[float]]:
            recorder = _ProfilePolicy(self.family(order, knots), min(_PROFILE_STEPS, self.steps))
            with _accelerated(self.pipe, recorder):
                self.images(self.steps)
            return recorder.profile()

        points = self.remember(
            f"profile order={order} " + ",".join(f"{w:.5f}" for w in knots), measure
        )
        return tuple((float(u), float(e)) for u, e in points)

    def costs(self) -> ActionCosts:
        """Every action's time over the plain pipeline's step, in a batch of 8, median over ticks."""
        stored = self.remember("costs", self._measure_costs)
        return ActionCosts(**{**stored, "levels": tuple(stored["levels"])})

    def _measure_costs(self) -> dict[str, Any]:
        prompts = [self.prompts[i % len(self.prompts)] for i in range(COST_BATCH)]
        noises, steps = list(range(COST_BATCH)), self.steps
        stamps: list[float] = []

        def stamp(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            stamps.append(time.perf_counter())
            return kwargs

        def ticks_of(policy: Any) -> float:
            with _accelerated(self.pipe, policy):
                self._call(prompts, noises, steps, output_type="latent")
                return median((report(self.pipe).trace.tick_ms or (math.nan,))[1:-1])

        sigmas = [shift_sigma(1 - j / steps, self.shift) for j in range(steps)]
        scripts = [
            FixedSchedule(
                FixedPlan(
                    family=self.family_name,
                    ticks=tuple(ScheduleTick(sigma=s, level=level) for s in sigmas),
                )
            )
            for level in range(sparsity.num_levels())
        ]
        policies = [*scripts, Threshold(1e9)]
        times: list[list[float]] = [[] for _ in range(len(policies) + 1)]
        bar = tqdm(range(3), desc="cost of actions", disable=not self.progress)
        for _ in bar:
            stamps.clear()
            self._call(prompts, noises, steps, output_type="latent", callback_on_step_end=stamp)
            gaps = [1000 * (b - a) for a, b in itertools.pairwise(stamps)]
            times[0].append(median(gaps))
            for i, policy in enumerate(policies):
                times[i + 1].append(ticks_of(policy))
        plain, *others = (median(t) for t in times)
        relative = [t / plain for t in others]
        return {
            "levels": [max(1.0, relative[0]), *relative[1:-1]],
            "reuse": relative[-1],
            "measured": True,
        }


@contextmanager
def _accelerated(pipe: Any, policy: Any) -> Iterator[None]:
    accelerate(pipe, policy)
    try:
        yield
    finally:
        restore(pipe)


class _ProfilePolicy:
    """Walks a family at k steps and records the local error of every step."""

    name, leaves_grid = "profile", True

    def __init__(self, family: WarpFamily, k: int) -> None:
        self._walk = ScheduleFamily(family, budget=k)
        self._warp, self._k = Warp(family.knots), k
        self._sums: list[tuple[float, torch.Tensor]] = []
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._u: list[float] = []

    def begin(self, run: Run) -> None:
        self._walk.begin(run)
        sigmas = trimmed_sigmas(self._k, run, self._warp)
        self._u = [self._warp.inverse(unshift_sigma(s, run.shift)) for s in sigmas]
        self._last = None

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return self._walk.decide_compute(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        if self._last is not None and state.tick < self._k:
            before, after = self._u[state.tick - 1], self._u[state.tick]
            du = torch.full_like(state.sigma, before - after)
            error = local_error(velocity, self._last[0], state.sigma, self._last[1], du)
            self._sums.append(((before + after) / 2, error.mean()))
        self._last = (velocity, state.sigma)
        return self._walk.decide_step(state, velocity)

    def profile(self) -> list[list[float]]:
        """[u, mean error], u rising."""
        by_u: dict[float, list[float]] = {}
        for u, error in self._sums:
            by_u.setdefault(round(u, 9), []).append(float(error))
        return [[u, sum(e) / len(e)] for u, e in sorted(by_u.items())]


def _search(bench: _Bench, evaluations: int) -> tuple[int, list[float]]:
    """Order and knots. First one number (a change of shift), then the knots by coordinate steps that shrink."""
    spent = 0
    bar = tqdm(total=evaluations, desc="grid search", disable=not bench.progress)

    def objective(order: int, knots: Sequence[float]) -> float:
        nonlocal spent
        if not _is_valid(knots, bench):
            return math.inf
        spent += 1
        bar.update()
        return sum(math.log(bench.family_error(order, knots, k)) for k in SEARCH_STEPS) / len(
            SEARCH_STEPS
        )

    bench.reference()
    # Adams-Bashforth everywhere is no candidate: where it wins here it may still explode at another guidance scale.
    scores: dict[tuple[int, float], float] = {}

    def try_shift(order: int, ratio: float) -> None:
        scores[order, ratio] = objective(order, _shifted(ratio))

    for ratio, order in itertools.product((1.0, 0.7, 1.4, 0.5, 2.0, 0.35, 2.8), (AUTO, EULER)):
        if spent < evaluations:
            try_shift(order, ratio)
    order, ratio = min(scores, key=lambda key: scores[key])
    for factor in (0.84, 1.19):
        try_shift(order, ratio * factor)
    order, ratio = min(scores, key=lambda key: scores[key])
    knots, best = _shifted(ratio), scores[order, ratio]
    width = 0.25
    while spent < evaluations and width > 0.02:
        moved: set[int] = set()
        for i, sign in itertools.product(range(NUM_KNOTS), (1, -1)):
            if i in moved or spent >= evaluations:
                continue
            trial = _moved(knots, i, sign * width)
            score = objective(order, trial)
            if score < best:
                knots, best = trial, score
                moved.add(i)
        width *= 1.0 if moved else 0.5
        bar.set_postfix(error=f"{math.exp(best):.2e}")
    bar.close()
    return order, knots


def _shifted(ratio: float) -> list[float]:
    """Knots of the warp that multiplies the scheduler's shift by a ratio."""
    return [shift_sigma((i + 1) / (NUM_KNOTS + 1), ratio) for i in range(NUM_KNOTS)]


def _moved(knots: Sequence[float], i: int, share: float) -> list[float]:
    """Knot i moved by a share of the distance to its neighbour on that side."""
    padded = [0.0, *knots, 1.0]
    neighbour = padded[i + 2] if share > 0 else padded[i]
    out = list(knots)
    out[i] = padded[i + 1] + abs(share) * (neighbour - padded[i + 1])
    return out


def _is_valid(knots: Sequence[float], bench: _Bench) -> bool:
    """Strictly rising, and the grid of all steps ends no lower than what a schedule file allows."""
    rising = all(b - a > 1e-3 for a, b in zip([0.0, *knots], [*knots, 1.0], strict=True))
    if not rising:
        return False
    u = [(i + 1) / (NUM_KNOTS + 1) for i in range(NUM_KNOTS)]
    last = shift_sigma(Warp(tuple(zip(u, knots, strict=True)))(1 / bench.steps), bench.shift)
    return last >= 0.02


def _table(bench: _Bench, order: int, knots: Sequence[float]) -> dict[str, dict[str, float]]:
    """Before and after, over k."""
    rows: dict[str, dict[str, float]] = {}
    ks = [k for k in TABLE_STEPS if k <= bench.steps]
    for k in tqdm(ks, desc="before and after", disable=not bench.progress):
        column = {
            "plain": bench.error(Steps(k), k, "steps"),
            "trim": bench.error(Steps(k, trim=True), k, "trim"),
            "trim/ab2": bench.error(Steps(k, trim=True, order=ADAMS_BASHFORTH), k, "trim/ab2"),
            "trim/auto": bench.error(Steps(k, trim=True, order=AUTO), k, "trim/auto"),
            "calibrated": bench.family_error(order, knots, k),
        }
        for name, value in column.items():
            rows.setdefault(name, {})[str(k)] = value
    return rows


def _plot(table: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Error over k, if matplotlib is there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, row), style in zip(table.items(), (":", "--", "-.", (0, (1, 3)), "-"), strict=True):
        axes.plot(
            [int(k) for k in row], list(row.values()), linestyle=style, marker="o", label=name
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ks = [int(k) for k in next(iter(table.values()))]
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("evaluations per image")
    axes.set_ylabel("mean squared error to converged")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_figure(path, dpi=130)

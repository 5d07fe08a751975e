# SPDX-License-Identifier: Apache-2.0
"""The measurements of a calibration, each made once and kept in its folder."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from rapid3rt.calibrate.arguments import fingerprint, told_apart
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
from rapid3rt.policies.allocation import detail, log_ratio
from rapid3rt.policies.base import Warp, shift_sigma, trimmed_sigmas, unshift_sigma
from rapid3rt.policies.controller import local_error
from rapid3rt.types import (
    AUTO,
    ActionCosts,
    ComputeDecision,
    DenoiseState,
    Policy,
    Run,
    StepDecision,
)

REFERENCE_STEPS = 120
COST_BATCH = 8
_WALK_STEPS, _TILT_STEPS = 28, 10
_VERSION = 3
"""Of what the measurements mean: those of another version are not gone on with."""


class Bench:
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
        settings = [_VERSION, self.model, prompts, steps, seed, told_apart(call)]
        settings += [dict(pipe.scheduler.config), fingerprint(pipe.transformer)]
        if getattr(pipe, "controlnet", None) is not None:
            settings.append(fingerprint(pipe.controlnet))
        text = json.dumps(settings, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = out / "measurements.json"
        self.values: dict[str, Any] = self._load()
        self._reference: torch.Tensor | None = None
        described = self.remember("family and shift", self._describe)
        self.family_name, self.shift = str(described[0]), float(described[1])

    def _load(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"calibration": self.key}
        try:
            values = json.loads(self.path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{self.path} must be the measurements of a calibration, got {error}; remove it to measure again"
            ) from None
        if not isinstance(values, dict) or values.get("calibration") != self.key:
            raise ValueError(
                f"out must be a new folder or one of the same calibration, got {str(self.out)!r}, whose measurements "
                "were made with another model, other weights, scheduler, prompts, steps or arguments"
            )
        return values

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """The stored value of a key, made and stored where it is missing."""
        if key not in self.values:
            self.values[key] = make()
            write_document(self.path, self.values)
        return self.values[key]

    def keep(
        self, name: str, make: Callable[[], Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Tensors of a file of this name, made where there is none of this calibration."""
        path = self.out / f"{name}.safetensors"
        # A file that was cut off is made again.
        with suppress(FileNotFoundError, SafetensorError), safe_open(path, "pt") as stored:
            if (stored.metadata() or {}).get("calibration") == self.key:
                return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        tensors = {key: tensor.contiguous() for key, tensor in make().items()}
        scratch = path.with_name(f".{path.name}")
        save_file(tensors, scratch, metadata={"calibration": self.key})
        scratch.replace(path)
        return tensors

    def _describe(self) -> list[Any]:
        run = self.probe()
        return [run.family, run.shift]

    def probe(self) -> Run:
        """A run of these calls as policies see it: one tick of one image."""
        seen: list[Run] = []

        class Probe(Steps):
            def begin(self, run: Run) -> None:
                seen.append(run)
                super().begin(run)

        with accelerated(self.pipe, Probe(1, trim=True)):
            self.generate([0], self.steps, output_type="latent")
        return seen[0]

    def batches(self, pairs: Sequence[int]) -> list[Sequence[int]]:
        """Pairs as they are called."""
        size = self.batch_size
        return [pairs[start : start + size] for start in range(0, len(pairs), size)]

    def generate(self, pairs: Sequence[int], steps: int, **kwargs: Any) -> Any:
        """What the pipeline makes of pairs in one batch. kwargs: beside, and in place of, the calibration's own."""
        bars = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(disable=True)
        try:
            generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + i) for i in pairs]
            arguments = {
                **self.call,
                "num_inference_steps": steps,
                "generator": generators,
                **kwargs,
            }
            prompts = [self.prompts[i % len(self.prompts)] for i in pairs]
            return self.pipe(prompts, **arguments).images
        finally:
            self.pipe.set_progress_bar_config(**bars)

    def images(
        self,
        steps: int,
        description: str | None = None,
        pairs: Sequence[int] | None = None,
        **call: Any,
    ) -> tuple[torch.Tensor, list[int]]:
        """Decoded images of pairs in -1..1, float32 `[n, 3, H, W]`, and the evaluations that each one took.

        Under whatever policy drives the pipeline now. pairs: which ones, None for all. call: arguments in place of the
        calibration's own.
        """
        wanted = list(range(len(self.prompts)) if pairs is None else pairs)
        batches = self.batches(wanted)
        chunks: list[torch.Tensor] = []
        spent: list[int] = []
        for batch in tqdm(batches, desc=description, disable=not (self.progress and description)):
            chunks.append(
                self.generate(batch, steps, output_type="pt", **call).float().cpu() * 2 - 1
            )
            spent += [image.nfe for image in report(self.pipe).images]
        return torch.cat(chunks), spent

    def reference(self) -> torch.Tensor:
        """The converged solutions, made once and kept beside the measurements."""
        if self._reference is None:
            self._reference = self.keep("references", self._converge)["images"]
        return self._reference

    def _converge(self) -> dict[str, torch.Tensor]:
        with accelerated(self.pipe, Steps(REFERENCE_STEPS, trim=True, order=AUTO)):
            return {"images": self.images(REFERENCE_STEPS, "converged solutions")[0]}

    def errors(
        self, policy: Policy, k: int, key: str, *, pairs: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Squared error of every image to its converged solution, under a policy of k evaluations: float64 `[n]`.

        pairs: which ones, None for all.
        """
        return torch.tensor(self._run(policy, k, key, pairs)["errors"], dtype=torch.float64)

    def evaluations(self, policy: Policy, k: int, key: str) -> float:
        """The mean number that the run behind `errors` of the same arguments took."""
        return float(self._run(policy, k, key)["evaluations"])

    def _run(
        self, policy: Policy, k: int, key: str, pairs: Sequence[int] | None = None
    ) -> Mapping[str, Any]:
        chosen = list(range(len(self.prompts)) if pairs is None else pairs)

        def measure() -> dict[str, Any]:
            reference = self.reference()[chosen]
            with accelerated(self.pipe, policy):
                images, spent = self.images(max(self.steps, k), pairs=chosen)
            errors = (images - reference).square().mean((1, 2, 3))
            return {"errors": errors.tolist(), "evaluations": sum(spent) / len(spent)}

        run: Mapping[str, Any] = self.remember(f"{key} k={k}{self._which(chosen)}", measure)
        return run

    def _which(self, pairs: list[int]) -> str:
        """What tells measurements on some pairs from those on all."""
        if pairs == list(range(len(self.prompts))):
            return ""
        if pairs == list(range(len(pairs))):
            return f" first={len(pairs)}"
        return " pairs=" + ",".join(map(str, pairs))

    def family_errors(
        self, family: WarpFamily, k: int, *, pairs: Sequence[int] | None = None
    ) -> torch.Tensor:
        """`errors` of a family, every image at k."""
        return self.errors(ScheduleFamily(family, budget=k), k, family_key(family), pairs=pairs)

    def walk(self, family: WarpFamily) -> list[Stop]:
        """Where the images of a family's long walk stop, u falling."""

        def measure() -> list[Any]:
            recorder = _Recorder(family, min(_WALK_STEPS, self.steps))
            with accelerated(self.pipe, recorder):
                self.images(self.steps)
            return recorder.stops()

        return [Stop(*stop) for stop in self.remember(f"walk {family_key(family)}", measure)]

    def tilts(self, family: WarpFamily) -> tuple[float | None, list[tuple[float, float]]]:
        """The calls' guidance scale, and by how much its logarithm lifts the mean detail: pairs (u, lift), u rising.

        Two short walks, the second at twice the scale. None and no pairs where the pipeline has no guidance scale.
        """

        def walk(**call: Any) -> _Recorder:
            recorder = _Recorder(family, min(_TILT_STEPS, self.steps))
            with accelerated(self.pipe, recorder):
                self.images(self.steps, **call)
            return recorder

        def measure() -> list[Any]:
            if "guidance_scale" not in inspect.signature(type(self.pipe).__call__).parameters:
                return [None, []]
            weak = walk()
            if weak.guidance is None:
                return [None, []]
            strong = walk(guidance_scale=2 * weak.guidance)
            ratio = log_ratio(strong.guidance, weak.guidance)
            lifts = [
                (a.u, (fmean(b.detail) - fmean(a.detail)) / ratio if ratio else 0.0)
                for a, b in zip(weak.stops(), strong.stops(), strict=True)
            ]
            return [weak.guidance, sorted(lifts)]

        scale, lifts = self.remember(f"tilts {family_key(family)}", measure)
        return scale, [(u, lift) for u, lift in lifts]

    def costs(self) -> ActionCosts:
        """Every action's time over the plain pipeline's step, in a batch of 8, median over ticks."""
        stored = self.remember("costs", self._measure_costs)
        return ActionCosts(**{**stored, "levels": tuple(stored["levels"])})

    def _measure_costs(self) -> dict[str, Any]:
        pairs, steps = range(COST_BATCH), self.steps
        stamps: list[float] = []

        def stamp(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            stamps.append(time.perf_counter())
            return kwargs

        def ticks_of(policy: Any) -> float:
            with accelerated(self.pipe, policy):
                self.generate(pairs, steps, output_type="latent")
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
            self.generate(pairs, steps, output_type="latent", callback_on_step_end=stamp)
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
def accelerated(pipe: Any, policy: Any) -> Iterator[None]:
    """The pipeline under a policy while the context is open."""
    accelerate(pipe, policy)
    try:
        yield
    finally:
        restore(pipe)


class Stop(NamedTuple):
    """One tick of a walk. u: where; local_error and detail: of every image, none at the first tick for the former."""

    u: float
    local_error: list[float]
    detail: list[float]


def error_profile(stops: Sequence[Stop]) -> tuple[tuple[float, float], ...]:
    """Mean local error over u, u rising: of the step that led to every stop, at the u midway. For `controller`."""
    pairs = [
        ((before.u + after.u) / 2, sum(after.local_error) / len(after.local_error))
        for before, after in itertools.pairwise(stops)
    ]
    return tuple(sorted(pairs))


class _Recorder:
    """Walks a family at k steps and records what policies can see."""

    name, leaves_grid, reuses = "walk", True, False

    def __init__(self, family: WarpFamily, k: int) -> None:
        self._family = ScheduleFamily(family, budget=k)
        self._warp, self._k = Warp(family.knots), k
        self._u: list[float] = []
        self._errors: list[list[float]] = [[] for _ in range(k)]
        self._details: list[list[float]] = [[] for _ in range(k)]
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        self.guidance: float | None = None

    def begin(self, run: Run) -> None:
        self.guidance = run.guidance
        self._family.begin(run)
        sigmas = trimmed_sigmas(self._k, run, self._warp)
        self._u = [self._warp.inverse(unshift_sigma(s, run.shift)) for s in sigmas]
        self._last = None

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return self._family.decide_compute(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        if state.tick < self._k:
            self._details[state.tick] += detail(state.latents, velocity, state.sigma).tolist()
            if self._last is not None:
                du = torch.full_like(state.sigma, self._u[state.tick - 1] - self._u[state.tick])
                error = local_error(velocity, self._last[0], state.sigma, self._last[1], du)
                self._errors[state.tick] += error.tolist()
        self._last = (velocity, state.sigma)
        return self._family.decide_step(state, velocity)

    def stops(self) -> list[Stop]:
        """Of all runs so far."""
        return [Stop(*stop) for stop in zip(self._u, self._errors, self._details, strict=False)]


def family_key(family: WarpFamily) -> str:
    """What tells the measurements of one family from those of another."""
    key = f"order={family.order} knots=" + ",".join(f"{w:.5f}" for _, w in family.knots)
    if family.fit is not None:
        key += f" fit={hashlib.sha256(repr(family.fit).encode()).hexdigest()[:12]}"
    return key

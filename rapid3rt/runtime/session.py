# SPDX-License-Identifier: Apache-2.0
"""One accelerated pipeline: its runs, ticks and calls. The walk of a tick is `forward`, then `step`.

A run begins when the pipeline sets its timesteps and ends with its last tick, or with an exception out of a call of
ours, and lets go of its tensors. An exception elsewhere in the pipeline (a callback, the VAE) is seen by nobody: then
they stay until the next run, which discards whatever an older one left, or until `close`. The session knows policies
and adapters by protocol only.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rapid3rt.adapters.base import Adapter
from rapid3rt.cache import ResidualCache
from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.planning import planner, sparsity
from rapid3rt.planning.costs import with_estimates
from rapid3rt.runtime.answers import check_compute, check_step
from rapid3rt.runtime.deferred import Deferred, DeferredCall, deferred_call
from rapid3rt.runtime.executor import Executor
from rapid3rt.runtime.frames import pipeline_call
from rapid3rt.runtime.images import Images
from rapid3rt.runtime.report import Report
from rapid3rt.runtime.trace import Trace, TraceTick
from rapid3rt.types import (
    COMPUTE,
    EULER,
    FITTED,
    REUSE,
    ActionCosts,
    ComputeDecision,
    Policy,
    Run,
    StepDecision,
)

_FOREIGN_CALL = (
    "the {} of an accelerated pipeline must be called by that pipeline's own loop, after its own scheduler's "
    "set_timesteps; where a component was exchanged: restore, then accelerate again"
)


_OTHER_THREAD = (
    "pipe must be called by one thread at a time, got a second call before the first one had ended; give each thread a "
    "pipeline of its own: pipe = type(pipe).from_pipe(pipe), before rapid3rt.accelerate"
)
_DRIVEN: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
"""Id of a policy to the session that let it begin last: a policy remembers one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What drives one run. reuses: whether residuals must be kept.

    limit: from the ticks that the run has, which a strength shortens, to the cap on the evaluations of every image and
    sentences for the report.
    """

    policy: Policy
    name: str
    reuses: bool
    limit: Callable[[int], tuple[int | None, tuple[str, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The scheduler's side of a run. ticks: loop iterations; sigmas, timesteps: the grid that images walk.

    stay_on_grid: something counts in ticks. time_scale: timestep over sigma, off the grid. scheduler: class name of one
    that steps all images by itself, None where each image steps on its own. watched: a callback of the user's own sees
    every tick.
    """

    ticks: int
    sigmas: torch.Tensor
    timesteps: torch.Tensor
    shift: float
    stay_on_grid: bool
    grid_steps: int | None
    time_scale: float = 1000.0
    scheduler: str | None = None
    watched: bool = False

    @property
    def why_stay(self) -> str:
        """Why images may not leave the grid, empty where they may."""
        if self.scheduler is not None:
            return f"{self.scheduler} steps all images alike"
        if self.stay_on_grid:
            return (
                "this call counts something in steps (skip-layer guidance, an adaptive PAG scale, a ControlNet window "
                "or a pipeline callback)"
            )
        return ""


@dataclass(slots=True)
class _Frame:
    """One tick on the device, kept for the trace."""

    sigma: torch.Tensor
    action: tuple[int, ...]
    level: tuple[int, ...]
    cost: tuple[float, ...]
    next_sigma: torch.Tensor | None = None
    order: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    ms: float = 0.0


@dataclass(slots=True)
class _RunState:
    """Everything that lives for one run."""

    choice: Choice
    grid: Grid
    begin: int = 0
    start: int = 0
    images: Images | None = None
    num_images: int = 0
    cache: ResidualCache | None = None
    reference: torch.Tensor | None = None
    plan: planner.Plan | None = None
    computes: torch.Tensor | None = None
    state: Any = None
    tick: int = 0
    calls: int = 0
    started: float = 0.0
    frames: list[_Frame] = field(default_factory=list)
    run: Run | None = None
    budget: int | None = None
    costs: ActionCosts = field(default_factory=ActionCosts)
    notes: tuple[str, ...] = ()
    ended: bool = False
    resolution: tuple[int, int] = (0, 0)
    block: int = 0
    output: tuple[int, ...] = ()
    thread: int = field(default_factory=threading.get_ident)

    @property
    def last_tick(self) -> bool:
        return self.begin + self.tick + 1 >= self.grid.ticks


class Session:
    """Shared by the twins of one pipeline object.

    Parameters
    ----------
    pipe: the pipeline. adapter, executor: of its transformer's family. choose: makes the policy of a run, given its
    ticks; raises ValueError for a budget outside the ticks. costs: of the actions. model: name for the trace.
    """

    def __init__(
        self,
        pipe: Any,
        adapter: Adapter,
        executor: Executor,
        choose: Callable[[int], Choice],
        costs: ActionCosts,
        model: str,
    ) -> None:
        self.pipe, self.adapter, self.executor = pipe, adapter, executor
        self.choose, self.costs, self.model = choose, costs, model
        self.real: tuple[Any, ...] = ()
        self.scheduler: Any = None
        self._state: _RunState | None = None

    # Begin and end -------------------------------------------------------------------------------------------------

    def begin(self, choice: Choice, grid: Grid) -> None:
        """Start a run on a grid. Called by the scheduler's twin before the first tick."""
        leaves_grid = getattr(choice.policy, "leaves_grid", True)
        regrids = grid.grid_steps is not None and grid.grid_steps != grid.ticks
        if grid.why_stay and (leaves_grid or regrids):
            raise UnsupportedError(
                f"policy {choice.name!r} moves images off the pipeline's grid, but {grid.why_stay}; use a policy that "
                "stays on it, such as 'dense' or 'threshold:0.1' without budget and speed (a policy object says so "
                "with leaves_grid = False)"
            )
        if grid.scheduler is not None and getattr(choice.policy, "order", EULER) != EULER:
            raise UnsupportedError(
                f"policy {choice.name!r} sets the order of the step, but {grid.why_stay}; leave the order away"
            )
        self._state = _RunState(choice=choice, grid=grid)
        if grid.watched and (leaves_grid or regrids):
            self._state.notes = (
                "callback_on_step_end is called at every tick of the loop, when images may be at steps of their own or "
                "done: what it does at a certain step may come too late",
            )

    @property
    def begins(self) -> bool:
        """Whether a run has begun whose images nobody has seen."""
        return self._state is not None and self._state.images is None

    def discard(self) -> None:
        """Forget the run before, whether it ended or not."""
        self._state = None

    @property
    def regrid_steps(self) -> int | None:
        """Steps of the images' grid where the policy sets another number than the pipeline's; else None."""
        grid = None if self._state is None else self._state.grid
        return None if grid is None or grid.grid_steps == grid.ticks else grid.grid_steps

    def set_begin_index(self, index: int, start: int) -> None:
        """The pipeline starts at this tick of its list, images at `start` of their grid (img2img)."""
        if self._state is not None:
            self._state.begin, self._state.start = index, start

    @property
    def begin_sigma(self) -> torch.Tensor | None:
        """The sigma at which images start, `[1]`, where their grid is not the pipeline's; else None."""
        if self._state is None or self.regrid_steps is None:
            return None
        return self._state.grid.sigmas[self._state.start : self._state.start + 1]

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around a call of ours: an exception out of one that the pipeline's own loop made ends the run."""
        try:
            yield
        except BaseException:
            if self._has_run(is_called=True):
                assert self._state is not None
                self._state.ended = True
                self._release(self._state)
            raise

    # The forward half of a tick ------------------------------------------------------------------------------------

    def defer(self, net: Any, arguments: dict[str, Any]) -> Deferred | tuple[Deferred, ...]:
        """A ControlNet call, which the pipeline makes before the transformer's: kept until rows are planned."""
        self._require_run("ControlNet", is_called=True)
        return DeferredCall(net, arguments, self.adapter.controlnet).handles()

    def forward(self, transformer: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """One transformer call: velocity of all rows, `[R, C, h, w]`."""
        run = self._require_run(is_called=True)
        call, run.calls = run.calls, run.calls + 1
        frame = pipeline_call(self.pipe)
        assert frame is not None  # else the call was refused
        branches = self.adapter.branches(self.pipe, call, kwargs, frame.f_locals)
        # Tensors of another ControlNet are refused before anything is computed.
        deferred_call(kwargs, self.adapter.controlnet.outputs)
        hidden: torch.Tensor = kwargs["hidden_states"]
        if run.images is None:
            self._start_images(run, transformer, kwargs, len(hidden), branches, frame.f_locals)
        if len(hidden) != run.num_images * len(branches):
            raise StateError(
                f"hidden_states must have {run.num_images} images x {len(branches)} branches "
                f"({', '.join(branches)}), got {len(hidden)} rows: the batch may not change during a run"
            )
        if run.plan is not None and run.plan.finished:
            return self._blank(run, hidden)
        self._check_prompt(transformer, kwargs, len(hidden))
        assert run.images is not None
        assert run.cache is not None
        known = None if run.plan is None else run.plan.active
        rows, position = self._active_rows(known, run.num_images, len(branches), hidden.device)
        timestep = run.images.timestep().repeat(len(branches))
        embedded = self.adapter.embed(
            transformer, kwargs, timestep if rows is None else timestep[rows], rows
        )
        if call == 0:
            self._decide(run, transformer, kwargs, embedded, known)
            assert run.plan is not None
            if run.plan.finished:
                return self._blank(run, hidden)
        assert run.plan is not None
        row_plan = run.plan.rows(branches, run.cache.holds)
        self._charge_forced(run, row_plan.forced, len(branches))
        velocity = self.executor.run(
            transformer,
            kwargs,
            embedded,
            position,
            timestep,
            row_plan,
            branches,
            run.num_images,
            run.cache,
            run.block,
        )
        run.output = velocity.shape[1:]
        return velocity

    def _check_prompt(self, transformer: Any, kwargs: Mapping[str, Any], rows: int) -> None:
        """A row of the prompt for each row of latents: fewer would be repeated, or rows taken from another image."""
        for name, option in self.adapter.widths:
            value, width = kwargs.get(name), transformer.config[option]
            if value is not None and (value.shape[0], value.shape[-1]) != (rows, width):
                raise ValueError(
                    f"{name} must have {rows} rows of width {width}, got {tuple(value.shape)}"
                )

    def _blank(self, run: _RunState, hidden: torch.Tensor) -> torch.Tensor:
        """The output of a call in which nothing is left to do."""
        return hidden.new_zeros(len(hidden), *run.output)

    def _start_images(
        self,
        run: _RunState,
        transformer: Any,
        kwargs: Mapping[str, Any],
        rows: int,
        branches: tuple[str, ...],
        arguments: Mapping[str, Any],
    ) -> None:
        if hasattr(self.pipe.transformer, "_orig_mod"):
            raise UnsupportedError(
                "compiling the whole transformer hides its blocks; compile them instead, block by block"
            )
        if rows % len(branches):
            raise UnsupportedError(
                f"{rows} rows cannot be {len(branches)} guidance branches ({', '.join(branches)})"
            )
        run.num_images = rows // len(branches)
        run.resolution = self.adapter.resolution(transformer, kwargs)
        latents = self.adapter.observe(transformer, kwargs, run.num_images, run.resolution)
        run.block = sparsity.block_size(math.prod(run.resolution), latents.device.type)
        grid = run.grid
        run.images = Images.start(grid.sigmas, grid.timesteps, grid.time_scale, latents, run.start)
        run.cache = ResidualCache(run.num_images, self.executor.backend, keep=run.choice.reuses)
        run.costs = with_estimates(
            self.costs,
            self.adapter.image_attention_share(transformer, kwargs),
            -(-math.prod(run.resolution) // run.block),
        )
        ticks = run.grid.ticks - run.begin
        run.budget, notes = run.choice.limit(ticks)
        run.run = Run(
            images=run.num_images,
            ticks=ticks,
            sigmas=tuple(run.grid.sigmas[run.start :].tolist()),
            budget=run.budget,
            family=self.adapter.family,
            resolution=run.resolution,
            shift=run.grid.shift,
            costs=run.costs,
            device=latents.device,
            stay_on_grid=bool(run.grid.why_stay),
            scheduler=run.grid.scheduler,
            guidance=_guidance(self.pipe),
            extra_guidance=self.adapter.extra_guidance(self.pipe, arguments),
            model=self.model,
            block_size=(run.block, run.block),
            attention=self.executor.attention,
        )
        run.started = time.perf_counter()
        run.choice.policy.begin(run.run)
        _DRIVEN[id(run.choice.policy)] = self
        run.notes = (*notes, *run.notes, *getattr(run.choice.policy, "notes", ()))

    def _active_rows(
        self, known: list[int] | None, images: int, branches: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows of images that were not done at the last plan, and where each row sits among them. None: all."""
        if known is None or len(known) == images:
            return None, None
        rows = [b * images + i for b in range(branches) for i in known]
        place = [0] * (images * branches)
        for position, row in enumerate(rows):
            place[row] = position
        both = torch.tensor(
            [rows + [0] * (len(place) - len(rows)), place], dtype=torch.int64, device=device
        )
        return both[0, : len(rows)], both[1]

    def _decide(
        self,
        run: _RunState,
        transformer: Any,
        kwargs: Mapping[str, Any],
        embedded: Any,
        known: list[int] | None,
    ) -> None:
        """Observe, ask the policy, enforce budget and first compute, plan: the one host read of the tick."""
        images = run.images
        assert images is not None
        latents = self.adapter.observe(transformer, kwargs, run.num_images, run.resolution)
        active = run.num_images if known is None else len(known)
        # References that Kontext appends never move: drift is of the noise tokens.
        noise = math.prod(run.resolution)
        seen, temb = embedded.image[-active:, :noise], embedded.temb[-active:]
        index = (
            None
            if active == run.num_images
            else torch.tensor(known, dtype=torch.int64, device=latents.device)
        )
        drift, conditioning = self._drift(run, seen, index), _put(temb, index, run.num_images)
        run.state = images.view(run.tick, latents, drift, conditioning)
        answer = run.choice.policy.decide_compute(run.state)
        decision = self._enforce(
            run, check_compute(answer, run.num_images, run.choice.name, latents.device)
        )
        run.plan = planner.plan(decision, images.done, images.bad, run.choice.name)
        assert run.cache is not None
        if not run.cache.keep and REUSE in run.plan.action:
            image = run.plan.action.index(REUSE)
            raise ValueError(
                f"action of policy {run.choice.name!r} for image {image} must be 0 (compute), since the policy says "
                "reuses = False, got 1 (reuse)"
            )
        if any(run.plan.level) and (reason := self.adapter.dense_only(transformer, kwargs)):
            run.plan = replace(run.plan, level=(0,) * run.num_images)
            note = f"sparse levels ran dense: {reason}"
            run.notes += () if note in run.notes else (note,)
        cost = _costs(run.plan, run.costs)
        run.frames.append(
            _Frame(sigma=images.sigma, action=run.plan.action, level=run.plan.level, cost=cost)
        )
        if run.plan.finished:
            run.frames.pop()
            return
        on_device = torch.tensor(cost, dtype=torch.float32, device=latents.device)
        run.computes = images.count(decision, latents, on_device)
        run.state = replace(run.state, computes=run.computes)
        self._refer(run, seen, index)

    def _enforce(self, run: _RunState, decision: ComputeDecision) -> ComputeDecision:
        images = run.images
        assert images is not None
        action = decision.action
        if run.budget is not None:
            action = torch.where(images.nfe >= run.budget, REUSE, action)
        action = torch.where(images.nfe == 0, COMPUTE, action)
        return ComputeDecision(action=action, sparsity=decision.sparsity)

    def _drift(
        self, run: _RunState, seen: torch.Tensor, index: torch.Tensor | None
    ) -> torch.Tensor:
        """Relative L1 change of the embedded latents since each image's last compute; 0 where undefined."""
        if run.reference is None:
            return torch.zeros(run.num_images, dtype=torch.float32, device=seen.device)
        reference = run.reference if index is None else run.reference[index]
        change = (seen - reference).abs().mean((1, 2), dtype=torch.float32)
        size = reference.abs().mean((1, 2), dtype=torch.float32)
        return _put(change / size.clamp(min=1e-20), index, run.num_images)

    def _refer(self, run: _RunState, seen: torch.Tensor, index: torch.Tensor | None) -> None:
        """Make the embedded latents of the images that compute their new reference."""
        assert run.computes is not None
        assert run.plan is not None
        if index is None and all(a == COMPUTE for a in run.plan.action):
            # A view of some rows or tokens would keep those of all branches and references alive.
            is_part = seen.nbytes < seen.untyped_storage().nbytes()
            run.reference = seen.clone() if is_part else seen
            return
        assert run.reference is not None  # at the first tick all images compute
        if index is None:
            run.reference = torch.where(run.computes.view(-1, 1, 1), seen, run.reference)
        else:
            mask = run.computes[index].view(-1, 1, 1)
            run.reference = run.reference.index_copy(
                0, index, torch.where(mask, seen, run.reference[index])
            )

    def _charge_forced(self, run: _RunState, forced: tuple[int, ...], branches: int) -> None:
        """A branch that computed for itself costs its share of a dense step."""
        if forced:
            frame = run.frames[-1]
            cost = list(frame.cost)
            for row in forced:
                cost[row % run.num_images] += run.costs.levels[0] / max(branches, 2)
            frame.cost = tuple(cost)

    # The step half of a tick ---------------------------------------------------------------------------------------

    def step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Move every image to its own next sigma; returns the new latents in the velocity's dtype."""
        run = self._begin_step()
        assert run.images is not None
        assert run.plan is not None
        assert run.computes is not None
        if run.plan.finished:
            run.tick += 1
            return sample.to(velocity.dtype)
        if len(run.plan.active) < run.num_images:
            # What a pipeline makes of zeros need not be zero: Qwen-Image divides by their norm.
            done = run.images.done.view(-1, *([1] * (velocity.ndim - 1)))
            velocity = velocity.masked_fill(done, 0)
        decision = self._decide_step(run, velocity)
        latents, target = run.images.step_latents(
            decision, sample, velocity, run.computes, run.last_tick, bool(run.grid.why_stay)
        )
        self._end_step(run, target, decision)
        return latents

    def follow(self, velocity: torch.Tensor) -> None:
        """The scheduler moves all images itself, along its own list: hear the policy and book the step."""
        run = self._begin_step()
        assert run.images is not None
        target = run.images.follow(self._decide_step(run, velocity), run.last_tick)
        self._end_step(run, target, None)

    def _begin_step(self) -> _RunState:
        run = self._require_run()
        if run.images is None or run.plan is None or run.calls == 0:
            raise StateError("scheduler.step must come after a transformer call of the same tick")
        run.calls = 0
        run.ended = run.last_tick
        return run

    def _decide_step(self, run: _RunState, velocity: torch.Tensor) -> StepDecision:
        seen = self.adapter.as_grid(velocity, run.resolution)
        answer = run.choice.policy.decide_step(run.state, seen)
        return check_step(answer, run.num_images, run.choice.name, velocity.device)

    def _end_step(
        self, run: _RunState, target: torch.Tensor, decision: StepDecision | None
    ) -> None:
        assert run.images is not None
        frame = run.frames[-1]
        frame.next_sigma = target
        # A policy may fill buffers of its own again and again.
        if decision is not None and decision.order is not None:
            frame.order = decision.order.clone()
            frame.weights = None if decision.weights is None else decision.weights.float().clone()
        now = time.perf_counter()
        frame.ms, run.started = 1000 * (now - run.started), now
        if run.last_tick:
            planner.raise_if_bad(run.images.bad.tolist(), run.choice.name)
            self._release(run)
        run.tick += 1

    def release(self) -> None:
        """The pipeline's call is over, interrupted or not."""
        if self._state is not None:
            self._release(self._state)

    def _release(self, run: _RunState) -> None:
        """Nothing but the trace outlives a run."""
        # A traceback may hold the cache itself.
        if run.cache is not None:
            run.cache.clear()
        run.reference = run.state = None

    def sigma_now(self) -> torch.Tensor | None:
        """Each image's sigma, float32 `[B]`; None before the first tick."""
        return (
            None if self._state is None or self._state.images is None else self._state.images.sigma
        )

    def _require_run(self, what: str = "transformer", is_called: bool = False) -> _RunState:
        """The run that goes on. is_called: where the pipeline's own call must be the innermost one too."""
        run = self._state
        if run is not None and not run.ended and run.thread != threading.get_ident():
            raise StateError(_OTHER_THREAD)
        if run is None or run.ended or not self._has_run(is_called):
            raise StateError(_FOREIGN_CALL.format(what))
        if run.images is not None and _DRIVEN.get(id(run.choice.policy)) is not self:
            raise StateError(
                f"policy {run.choice.name!r} must serve one run at a time, got begun by another pipeline meanwhile; "
                "give each pipeline a policy object of its own"
            )
        return run

    def _has_run(self, is_called: bool) -> bool:
        """Whether there is a run of this thread's, and this pipeline still is what it began with."""
        if self._state is None or self._state.thread != threading.get_ident():
            return False
        own = self.pipe is not None and self.pipe.scheduler is self.scheduler
        return own and not (is_called and pipeline_call(self.pipe) is None)

    def close(self) -> None:
        """Let go of the pipeline: twins may outlive it in the hooks of others."""
        self.pipe = self.scheduler = self._state = None

    # What happened -------------------------------------------------------------------------------------------------

    def trace(self) -> Trace:
        """The decisions of the last run. Raises StateError before the first."""
        run = self._state
        if run is None or run.run is None:
            raise StateError("no run to report: call the pipeline first")
        per_image: list[list[TraceTick]] = [[] for _ in range(run.num_images)]
        for frame in run.frames:
            if frame.next_sigma is None:
                continue
            sigma, target = frame.sigma.tolist(), frame.next_sigma.tolist()
            order = [EULER] * run.num_images if frame.order is None else frame.order.tolist()
            weights = None if frame.weights is None else frame.weights.tolist()
            for i, action in enumerate(frame.action):
                if action >= 0:
                    per_image[i].append(
                        TraceTick(
                            sigma=sigma[i],
                            action=action,
                            level=frame.level[i],
                            next_sigma=target[i],
                            order=order[i],
                            weights=tuple(weights[i]) if weights and order[i] == FITTED else None,
                            density=sparsity.density(frame.level[i]) if action == COMPUTE else 0.0,
                            cost=frame.cost[i],
                        )
                    )
        return Trace(
            model=self.model,
            family=self.adapter.family,
            ticks=run.run.ticks,
            grid_steps=run.grid.grid_steps,
            sigmas=run.run.sigmas,
            block_q=run.block,
            block_kv=run.block,
            attention=self.executor.attention,
            policy=run.choice.name,
            budget=run.budget,
            costs=run.costs,
            images=tuple(tuple(ticks) for ticks in per_image),
            tick_ms=tuple(f.ms for f in run.frames if f.next_sigma is not None),
            interrupted=any(
                not ticks or ticks[-1].next_sigma > run.run.sigmas[-1] for ticks in per_image
            ),
            scheduler=run.grid.scheduler,
        )

    def report(self) -> Report:
        """The last run as a table, a file or a picture."""
        trace = self.trace()
        return Report(trace, notes=() if self._state is None else self._state.notes)


def _guidance(pipe: Any) -> float | None:
    """The guidance scale of the pipeline's call, which pipelines keep as a property."""
    scale = getattr(pipe, "guidance_scale", None)
    return float(scale) if isinstance(scale, int | float) else None


def _costs(plan: planner.Plan, costs: ActionCosts) -> tuple[float, ...]:
    return tuple(
        0.0 if a < 0 else costs.levels[level] if a == COMPUTE else costs.reuse
        for a, level in zip(plan.action, plan.level, strict=True)
    )


def _put(rows: torch.Tensor, index: torch.Tensor | None, total: int) -> torch.Tensor:
    """Rows of some images among zeros for all."""
    if index is None:
        return rows
    return rows.new_zeros(total, *rows.shape[1:]).index_copy(0, index, rows)

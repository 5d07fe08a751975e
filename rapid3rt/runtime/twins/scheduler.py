# SPDX-License-Identifier: Apache-2.0
"""The scheduler's twin: owns a copy of the real one, begins runs, and steps every image to its own next sigma.

Where the real one is not plain flow-matching Euler, its twin is that of `lockstep`.

Signatures are the real ones, because pipelines inspect them. `timesteps` stays the pipeline's own list: one tick each.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)

from rapid3rt.errors import UnsupportedError, check_count
from rapid3rt.runtime.frames import counts_in_ticks, is_watched, own_call, pipeline_call
from rapid3rt.runtime.session import Grid, Session
from rapid3rt.runtime.twins.base import real_class, twin_class
from rapid3rt.runtime.twins.lockstep import LOCKSTEP, make_lockstep_twin

_STEP, _SCALE_NOISE = (
    FlowMatchEulerDiscreteScheduler.step,
    FlowMatchEulerDiscreteScheduler.scale_noise,
)


def make_scheduler_twin(real: Any, session: Session) -> Any:
    """A twin of a scheduler: one that steps every image on its own where the real one is plain flow-matching Euler,
    else one that lets the real one step all images alike.

    Raises
    ------
    UnsupportedError: an unknown scheduler or option.
    """
    check_scheduler(real)
    if not steps_per_image(real):
        return make_lockstep_twin(real, session)
    overrides = {"set_timesteps": set_timesteps, "step": step, "scale_noise": scale_noise}
    overrides |= {"set_begin_index": set_begin_index, "_reset_stateful_cache": end_call}
    overrides |= {"set_shift": set_shift}
    twin = copy.copy(real)
    twin.__class__ = twin_class(type(real), session, overrides)
    return twin


def steps_per_image(real: Any) -> bool:
    """Whether images of one batch may stand at noise levels of their own under this scheduler."""
    is_euler = isinstance(real, FlowMatchEulerDiscreteScheduler)
    return is_euler and not real.config.get("stochastic_sampling")


def check_scheduler(real: Any) -> None:
    """Refuse what is neither flow-matching Euler nor known to step all images alike, with what to set instead."""
    if not isinstance(real, (FlowMatchEulerDiscreteScheduler, *LOCKSTEP)):
        others = ", ".join(cls.__name__ for cls in LOCKSTEP)
        raise UnsupportedError(
            f"scheduler must be a FlowMatchEulerDiscreteScheduler or one of {others}, got {type(real).__name__}; "
            "set pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config) first"
        )
    if steps_per_image(real):
        for name, own in (("step", _STEP), ("scale_noise", _SCALE_NOISE)):
            # On the instance, or of a class of the user's: ours would go past it.
            if name in vars(real) or getattr(real_class(real), name) is not own:
                raise UnsupportedError(
                    f"the scheduler's {name} must be FlowMatchEulerDiscreteScheduler's own, which moves every image by "
                    f"itself here, got another one in {type(real).__name__}"
                )
    if real.config.get("invert_sigmas"):
        raise UnsupportedError(
            "scheduler option invert_sigmas must be off, got True; set pipe.scheduler = "
            f"{type(real).__name__}.from_config(pipe.scheduler.config, invert_sigmas=False) first"
        )


def set_timesteps(
    self: Any,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    sigmas: list[float] | None = None,
    mu: float | None = None,
    timesteps: list[float] | None = None,
) -> None:
    """Set the pipeline's grid as the real scheduler does, and begin a run."""
    session: Session = type(self)._rapid3rt_session
    frame = own_call(session.pipe)
    session.discard()
    _check_falls("sigmas", sigmas)
    _check_falls("timesteps", timesteps)
    real: Any = real_class(self)
    real.set_timesteps(
        self, num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps
    )
    ticks = len(self.timesteps)
    choice = session.choose(ticks)
    steps = getattr(choice.policy, "grid_steps", None)
    if steps is not None:
        check_count(f"grid_steps of policy {choice.name!r}", steps)
    grid, shift = self, _shift(self, mu)
    if steps is not None and steps != ticks:
        if steps > ticks:
            raise ValueError(
                f"steps of policy {choice.name!r} must be at most num_inference_steps ({ticks}), got {steps}"
            )
        if steps == 1 and self.config.get("shift_terminal"):
            raise ValueError(
                f"steps of policy {choice.name!r} must be at least 2 where the scheduler has a shift_terminal, got 1; "
                "'steps:1/trim' is one step"
            )
        if timesteps is not None or (sigmas is not None and not _is_even(sigmas)):
            raise UnsupportedError(
                f"policy {choice.name!r} sets its own grid and cannot follow sigmas= or timesteps="
            )
        grid = copy.copy(self)
        own = None if sigmas is None else np.linspace(1.0, 1 / steps, steps)
        mu = session.adapter.mu(frame.f_locals, mu, steps)
        real.set_timesteps(grid, steps, device=device, sigmas=own, mu=mu)
        shift = _shift(self, mu)
    session.begin(
        choice,
        Grid(
            ticks=ticks,
            sigmas=grid.sigmas,
            timesteps=grid.timesteps,
            shift=shift,
            stay_on_grid=counts_in_ticks(frame),
            grid_steps=steps,
            time_scale=float(self.config.num_train_timesteps),
            watched=is_watched(frame),
        ),
    )


def set_shift(self: Any, shift: float) -> None:
    """The real one's, also on the scheduler itself that the twin is a copy of: `restore` puts that one back."""
    real_class(self).set_shift(self, shift)  # type: ignore[attr-defined]
    session: Session = type(self)._rapid3rt_session
    if self is session.scheduler:
        _, real, _ = session.real
        real.set_shift(shift)


def end_call(self: Any) -> None:
    """Let go of the run's tensors. Pipelines call this at their end on every component that has it."""
    type(self)._rapid3rt_session.release()


def _check_falls(name: str, values: Any) -> None:
    """Refuse a list of the user's that rises somewhere: images only ever go down."""
    rises = [] if values is None else [(a, b) for a, b in pairwise(values) if b > a]
    if rises:
        raise UnsupportedError(
            f"{name} must never rise, got {rises[0][0]:g} before {rises[0][1]:g}; rapid3rt.restore runs it as it is"
        )


def _is_even(sigmas: Any) -> bool:
    """Whether these are the sigmas that FLUX and Qwen pipelines pass by themselves, and not a user's own."""
    n = len(sigmas)
    return np.array_equal(np.asarray(sigmas), np.linspace(1.0, 1 / n, n))


def _shift(scheduler: Any, mu: float | None) -> float:
    """s of phi(u) = s u / (1 + (s - 1) u), static or from the resolution's mu."""
    if not scheduler.config.use_dynamic_shifting or mu is None:
        return float(scheduler.shift)
    linear = scheduler.config.get("time_shift_type", "exponential") == "linear"
    return float(mu) if linear else math.exp(mu)


def set_begin_index(self: Any, begin_index: int = 0) -> None:
    """Remember where the pipeline starts, on its own grid and on the images' grid of another length."""
    self._begin_index = begin_index
    session: Session = type(self)._rapid3rt_session
    steps = session.regrid_steps
    session.set_begin_index(
        begin_index, begin_index if steps is None else _begin_at(session, steps, begin_index)
    )


def _begin_at(session: Session, steps: int, begin_index: int) -> int:
    """Where the plain pipeline of so many steps would start: the pipelines' own arithmetic with their strength."""
    frame = pipeline_call(session.pipe)
    strength = None if frame is None else frame.f_locals.get("strength")
    if strength is None:
        if begin_index:
            raise UnsupportedError(
                f"a pipeline that starts at step {begin_index} without a strength cannot follow a grid of {steps} steps"
            )
        return 0
    return int(max(steps - min(steps * strength, steps), 0))


def scale_noise(
    self: Any,
    sample: torch.Tensor,
    timestep: float | torch.Tensor,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Noise clean latents: to the run's first sigma before the first tick, afterwards to each image's own."""
    session: Session = type(self)._rapid3rt_session
    sigma = session.sigma_now()
    if sigma is None or self._step_index is None:
        sigma = session.begin_sigma
    if sigma is None:
        real: Any = real_class(self)
        noised: torch.Tensor = real.scale_noise(self, sample, timestep, noise)
        return noised
    assert noise is not None
    sigma = sigma.to(sample.dtype).view(-1, *([1] * (sample.ndim - 1)))
    return sigma * noise + (1.0 - sigma) * sample


def step(
    self: Any,
    model_output: torch.Tensor,
    timestep: float | torch.Tensor,
    sample: torch.Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: torch.Generator | None = None,
    per_token_timesteps: torch.Tensor | None = None,
    return_dict: bool = True,
) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
    """Move every image to its own next sigma. Churn arguments do nothing in the real scheduler either."""
    del s_churn, s_tmin, s_tmax, s_noise, generator
    session: Session = type(self)._rapid3rt_session
    with session.guard():
        if per_token_timesteps is not None:
            raise UnsupportedError("per_token_timesteps cannot be combined with per-image sigmas")
        if self._step_index is None:
            self._init_step_index(timestep)
        moved = session.step(model_output, sample)
    self._step_index += 1
    if not return_dict:
        return (moved,)
    return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=moved)

# SPDX-License-Identifier: Apache-2.0
"""The twin of a scheduler that keeps its own step: all images move alike, on its own list of noise levels.

Multistep solvers, Heun and stochastic sampling have a state, or noise, for the whole batch, so an image cannot leave
the list. What each image computes and how sparsely stays its own.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from rapid3rt.runtime.frames import counts_in_ticks, own_call
from rapid3rt.runtime.session import Grid, Session
from rapid3rt.runtime.twins.base import twin_class

LOCKSTEP = (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
)


def make_lockstep_twin(real: Any, session: Session) -> Any:
    """A twin that owns a copy of `real`, state included, and tells the session what it does."""
    cls: Any = type(real)
    name = cls.__name__

    # Pipelines look at signatures; `wraps` shows them the real ones.
    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        frame = own_call(session.pipe)
        session.discard()
        cls.set_timesteps(self, *args, **kwargs)
        ticks = len(self.timesteps)
        choice = session.choose(ticks)
        session.begin(
            choice,
            Grid(
                ticks=ticks,
                sigmas=torch.as_tensor(self.sigmas, dtype=torch.float32),
                timesteps=self.timesteps,
                shift=1.0,
                stay_on_grid=counts_in_ticks(frame),
                grid_steps=getattr(choice.policy, "grid_steps", None),
                scheduler=name,
            ),
        )

    @functools.wraps(cls.step)
    def step(
        self: Any, model_output: torch.Tensor, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with session.guard():
            session.follow(model_output)
            return cls.step(self, model_output, timestep, sample, *args, **kwargs)

    @functools.wraps(cls.set_begin_index)
    def set_begin_index(self: Any, begin_index: int = 0) -> None:
        cls.set_begin_index(self, begin_index)
        session.set_begin_index(begin_index, begin_index)

    overrides: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step}
    overrides |= {
        "set_begin_index": set_begin_index,
        "_reset_stateful_cache": lambda _: session.release(),
    }
    twin = copy.copy(real)
    for attribute, value in vars(twin).items():
        if isinstance(value, list):  # solvers shift their past inside lists
            vars(twin)[attribute] = list(value)
    twin.__class__ = twin_class(cls, session, overrides)
    return twin

# SPDX-License-Identifier: Apache-2.0
"""What the rooms of the house say to each other: run, state, decisions, costs, the policy protocol.

Shape letters: B images, R rows (image x guidance branch), C latent channels, D model width. Every tensor lies on the
run's device and is indexed by image in the order of the pipeline's batch. Nothing here computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

COMPUTE, REUSE, FORECAST_1, FORECAST_2 = 0, 1, 2, 3
ACTION_NAMES = ("compute", "reuse", "forecast_1", "forecast_2")
RUNNABLE_ACTIONS = ACTION_NAMES[:2]
AUTO, EULER, ADAMS_BASHFORTH, FITTED = 0, 1, 2, 3
NUM_WEIGHTS = 4
"""Of a fitted step: of v, x, v - v' and v' - v''."""
ATTENTION_MODES = ("exact", "fast")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionCosts:
    """Cost of each action in units of one step of the plain pipeline (METHOD.md, section 1).

    `levels[0]` is the dense step, `levels[j]` a step at sparsity level j; levels that are missing are estimated from
    FLOPs when a run begins. measured: whether what is listed was measured.
    """

    levels: tuple[float, ...] = (1.0,)
    reuse: float = 0.02
    measured: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a policy learns at `begin`: one call of the pipeline.

    sigmas: the run's own grid as float32 values, `ticks + 1` of them, falling, the last 0. A policy with `grid_steps`
    sees the grid of that many steps. shift: s of the scheduler's phi(u) = s u / (1 + (s - 1) u).
    stay_on_grid: something counts in ticks (skip-layer guidance, a cutoff callback), so every image must step to the
    next grid point. resolution: image tokens as (rows, columns). model: an id of the model, block_size: (query, key)
    tile of the sparse kernel, attention: "exact" or "fast"; a replay compares them with its trace where they are known.
    scheduler: class name of one that steps all images by itself (then sigmas need not fall strictly nor end at 0), None
    where steps are per image. guidance: the pipeline's guidance scale, None where it has none. extra_guidance: of what
    guides besides (true CFG beside a guidance embedding or alone, perturbed attention), None where nothing does.
    """

    images: int
    ticks: int
    sigmas: tuple[float, ...]
    budget: int | None
    family: str
    resolution: tuple[int, int]
    shift: float
    costs: ActionCosts
    device: torch.device
    stay_on_grid: bool = False
    model: str | None = None
    block_size: tuple[int, int] | None = None
    scheduler: str | None = None
    guidance: float | None = None
    extra_guidance: float | None = None
    attention: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseState:
    """Where every image stands at the beginning of a tick. To be read only: the tensors are the session's own.

    sigma, drift, equivalent_steps: float32 `[B]`. nfe, since_compute: int32 `[B]`. done, has_reference: bool `[B]`.
    latents, reference: `[B, C, h, w]` in the latents' dtype; reference is the latent at the last compute (undefined
    where `has_reference` is False). drift: relative L1 change of the embedded latents of the conditional branch since
    the last compute, 0 where undefined. conditioning: `[B, D]`, the model's modulation embedding of that branch.
    step: int32 `[B]`, how many step decisions the image has taken. tick: host int, the same for the whole batch.
    """

    tick: int
    sigma: torch.Tensor
    step: torch.Tensor
    nfe: torch.Tensor
    since_compute: torch.Tensor
    equivalent_steps: torch.Tensor
    done: torch.Tensor
    has_reference: torch.Tensor
    latents: torch.Tensor
    reference: torch.Tensor
    drift: torch.Tensor
    conditioning: torch.Tensor
    computes: torch.Tensor | None = None
    """bool `[B]`: what this tick really does, budget and forced computes applied. None before it is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeDecision:
    """Before the forward. action: int8 `[B]` (COMPUTE, REUSE, ...). sparsity: int32 `[B]` level, 0 is dense."""

    action: torch.Tensor
    sparsity: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDecision:
    """After the forward. next_sigma: float32 `[B]`.

    order: int8 `[B]`, 1 Euler (also when None), 2 Adams-Bashforth, 0 (AUTO) as much of order 2 as is stable for the
    image here, 3 (FITTED) by `weights` (`runtime.solver`). weights: float32 `[B, NUM_WEIGHTS]`,
    read where order is FITTED, which asks for it.
    """

    next_sigma: torch.Tensor
    order: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@runtime_checkable
class Policy(Protocol):
    """Structural: any object with these three methods. No base class is required.

    Six optional attributes are read where they exist: `name` (str, shown in the report), `grid_steps` (int: the
    scheduler is set to that many steps instead of the pipeline's number), `leaves_grid` (bool, default True: may
    answer a next_sigma other than the next grid point), `reuses` (bool, default True: may answer REUSE; False
    saves the memory of the residuals), `costs` (`ActionCosts`, of the actions, where they were measured) and `notes`
    (sentences for the report, of the run that has begun).
    """

    def begin(self, run: Run) -> None:
        """Start a run; forget every older one."""

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        """Say, for all B images, whether to compute and how sparsely."""

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        """Say, for all B images, where to go next. velocity: `[B, C, h, w]`, guided."""

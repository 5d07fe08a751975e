# SPDX-License-Identifier: Apache-2.0
"""Where every image stands: sigma, counters, the reference, and where it goes next.

All state is on the device and is only ever moved by whole-batch tensor operations; the host never looks.
Grid points are indices into the scheduler's own sigmas and timesteps, so that dense runs are the plain ones bit for
bit; an image off the grid has index -1 and timestep sigma * time_scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rapid3rt.planning.planner import BAD_ORDER, BAD_POINT, BAD_SIGMA, BAD_WEIGHTS
from rapid3rt.runtime.solver import Solver
from rapid3rt.types import (
    AUTO,
    COMPUTE,
    EULER,
    FITTED,
    ComputeDecision,
    DenoiseState,
    StepDecision,
)


@dataclass(slots=True)
class Images:
    """Per-image state of one run; see `DenoiseState` for the fields that policies see.

    bad: int32 `[B]`, what was wrong with the last step decision, 0 for nothing; the next plan reads it.
    sigmas: float32 `[n + 1]`, timesteps: float32 `[n]`, the scheduler's. index: int64 `[B]` into them, -1 off grid.
    time_scale: the scheduler's number of training timesteps.
    solver: the past that a step of order 2 needs.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    time_scale: float
    sigma: torch.Tensor
    index: torch.Tensor
    step: torch.Tensor
    nfe: torch.Tensor
    since_compute: torch.Tensor
    equivalent_steps: torch.Tensor
    done: torch.Tensor
    bad: torch.Tensor
    reference: torch.Tensor
    solver: Solver

    @classmethod
    def start(
        cls,
        sigmas: torch.Tensor,
        timesteps: torch.Tensor,
        time_scale: float,
        latents: torch.Tensor,
        begin: int,
    ) -> Images:
        """All images at grid index `begin`. latents: `[B, C, h, w]`, for shape, dtype and device."""
        num, device = len(latents), latents.device
        sigmas, timesteps = sigmas.to(device), timesteps.to(device)

        def integers() -> torch.Tensor:
            return torch.zeros(num, dtype=torch.int32, device=device)

        def numbers() -> torch.Tensor:
            return torch.zeros(num, dtype=torch.float32, device=device)

        def flags() -> torch.Tensor:
            return torch.zeros(num, dtype=torch.bool, device=device)

        return cls(
            sigmas=sigmas,
            timesteps=timesteps,
            time_scale=time_scale,
            sigma=sigmas[begin].expand(num).clone(),
            index=torch.full((num,), begin, dtype=torch.int64, device=device),
            step=integers(),
            nfe=integers(),
            since_compute=integers(),
            equivalent_steps=numbers(),
            done=flags(),
            bad=integers(),
            reference=torch.zeros_like(latents),
            solver=Solver.start(num, device),
        )

    def timestep(self) -> torch.Tensor:
        """The model's time of each image: float32 `[B]`."""
        on_grid = self.timesteps[self.index.clamp(0, len(self.timesteps) - 1)]
        return torch.where(self.index >= 0, on_grid, self.sigma * self.time_scale)

    def view(
        self, tick: int, latents: torch.Tensor, drift: torch.Tensor, conditioning: torch.Tensor
    ) -> DenoiseState:
        """What policies see at this tick."""
        return DenoiseState(
            tick=tick,
            sigma=self.sigma,
            step=self.step,
            nfe=self.nfe,
            since_compute=self.since_compute,
            equivalent_steps=self.equivalent_steps,
            done=self.done,
            has_reference=self.nfe > 0,
            latents=latents,
            reference=self.reference,
            drift=drift,
            conditioning=conditioning,
        )

    def count(
        self, decision: ComputeDecision, latents: torch.Tensor, cost: torch.Tensor
    ) -> torch.Tensor:
        """Book a tick's decision; returns bool `[B]`, which images compute. cost: float32 `[B]`."""
        computes = (decision.action == COMPUTE) & ~self.done
        self.nfe = self.nfe + computes.int()
        self.since_compute = torch.where(computes, 0, self.since_compute + 1)
        self.equivalent_steps = self.equivalent_steps + torch.where(self.done, 0.0, cost)
        self.reference = torch.where(_spread(computes, latents), latents, self.reference)
        return computes

    def step_latents(
        self,
        decision: StepDecision,
        sample: torch.Tensor,
        velocity: torch.Tensor,
        computes: torch.Tensor,
        last: bool,
        stay: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move every image to its own next sigma.

        Parameters
        ----------
        decision: the policy's answer for all B images.
        sample, velocity: `[B, ...]`, latents and guided velocity. computes: bool `[B]`, from `count`.
        last: whether this is the run's last tick, which steps everybody to 0. stay: whether another step than to the
        next grid point is an error.

        Returns
        -------
        New latents `[B, ...]` in the velocity's dtype, and the sigma each image moved to, float32 `[B]`.
        """
        wanted = decision.next_sigma.to(torch.float32)
        # A NaN is an error at the next plan; until then the image stands still.
        nan = torch.isnan(wanted)
        self.bad = torch.where(nan, BAD_SIGMA, 0)
        if decision.order is not None:
            unknown = (decision.order < AUTO) | (decision.order > FITTED)
            self.bad = torch.where(unknown, BAD_ORDER, self.bad)
            fitted = decision.order == FITTED
            if decision.weights is not None:
                fitted = fitted & ~decision.weights.isfinite().all(1)
            self.bad = torch.where(fitted, BAD_WEIGHTS, self.bad)
        if stay:
            following = self.sigmas[(self.index + 1).clamp(max=len(self.sigmas) - 1)]
            self.bad = torch.where((wanted != following) & (self.bad == 0), BAD_POINT, self.bad)
        self.bad = torch.where(self.done, 0, self.bad)
        target = torch.where(nan, self.sigma, wanted).clamp(min=0.0)
        target = torch.minimum(target, self.sigma)
        if last:
            target = torch.zeros_like(target)
        target = torch.where(self.done, self.sigma, target)
        moved = self.solver.step(
            sample, velocity, self.sigma, target, decision.order, computes, decision.weights
        )
        moved = torch.where(_spread(self.done, moved), sample.to(velocity.dtype), moved)
        hits = target[:, None] == self.sigmas[None, :]
        index = torch.where(hits.any(1), hits.int().argmax(1), -1)
        self.index = torch.where(self.done, self.index, index)
        self.sigma = target
        self.step = self.step + (~self.done).int()
        self.done = self.done | (target <= 0)
        return moved, target

    def follow(self, decision: StepDecision, last: bool) -> torch.Tensor:
        """The scheduler steps all images itself: book it. Returns the sigma they moved to, float32 `[B]`.

        decision: must be that very step. last: whether this is the run's last tick.
        """
        self.index = self.index + 1
        target = self.sigmas[self.index]
        other = decision.next_sigma.to(torch.float32) != target  # NaN is another too
        if decision.order is not None:
            other = other | (decision.order != EULER)
        self.bad = torch.where(other, BAD_POINT, 0)
        self.sigma, self.step = target, self.step + 1
        self.done = torch.full_like(self.done, last)
        return target


def _spread(per_image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[B]` to `[B, 1, ...]` of as many axes as `like`."""
    return per_image.view(-1, *([1] * (like.ndim - 1)))

# SPDX-License-Identifier: Apache-2.0
"""Where every image stands: sigma, counters, references and velocities, and the per-image Euler step.

All state is on the device and is only ever moved by whole-batch tensor operations; the host never looks.
Grid points are indices into the scheduler's own sigmas and timesteps, so that dense runs are the plain ones bit for
bit; an image off the grid has index -1 and timestep sigma * 1000.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rapid3rt.planning.planner import BAD_ORDER, BAD_SIGMA
from rapid3rt.types import COMPUTE, ComputeDecision, DenoiseState, StepDecision

NUM_TRAIN_TIMESTEPS = 1000
MAX_STEP_RATIO = 8.0
"""Cap of d / (sigma - sigma_p) in the second-order step (METHOD.md, section 1)."""


@dataclass(slots=True)
class Images:
    """Per-image state of one run; see `DenoiseState` for the fields that policies see.

    bad: int32 `[B]`, what was wrong with the last step decision, 0 for nothing; the next plan reads it.
    sigmas: float32 `[n + 1]`, timesteps: float32 `[n]`, the scheduler's. index: int64 `[B]` into them, -1 off grid.
    v_last, v_before: guided velocities of the last two computes as the pipeline has them (None before the first step),
    sigma_last, sigma_before where they were taken;
    computes: int32 `[B]`, how many of them there are.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    sigma: torch.Tensor
    index: torch.Tensor
    step: torch.Tensor
    nfe: torch.Tensor
    since_compute: torch.Tensor
    equivalent_steps: torch.Tensor
    done: torch.Tensor
    bad: torch.Tensor
    reference: torch.Tensor
    sigma_last: torch.Tensor
    sigma_before: torch.Tensor
    v_last: torch.Tensor | None = None
    v_before: torch.Tensor | None = None

    @classmethod
    def start(
        cls, sigmas: torch.Tensor, timesteps: torch.Tensor, latents: torch.Tensor, begin: int
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
            sigma=sigmas[begin].expand(num).clone(),
            index=torch.full((num,), begin, dtype=torch.int64, device=device),
            step=integers(),
            nfe=integers(),
            since_compute=integers(),
            equivalent_steps=numbers(),
            done=flags(),
            bad=integers(),
            reference=torch.zeros_like(latents),
            sigma_last=numbers(),
            sigma_before=numbers(),
        )

    def timestep(self) -> torch.Tensor:
        """The model's time of each image: float32 `[B]`."""
        on_grid = self.timesteps[self.index.clamp(0, len(self.timesteps) - 1)]
        return torch.where(self.index >= 0, on_grid, self.sigma * NUM_TRAIN_TIMESTEPS)

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move every image to its own next sigma.

        Parameters
        ----------
        decision: the policy's answer for all B images.
        sample, velocity: `[B, ...]`, latents and guided velocity. computes: bool `[B]`, from `count`.
        last: whether this is the run's last tick, which steps everybody to 0.

        Returns
        -------
        New latents `[B, ...]` in the velocity's dtype, and the sigma each image moved to, float32 `[B]`.
        """
        wanted = decision.next_sigma.to(torch.float32)
        # A NaN is an error at the next plan; until then the image stands still.
        nan = torch.isnan(wanted)
        self.bad = torch.where(nan, BAD_SIGMA, 0)
        if decision.order is not None:
            order = decision.order
            self.bad = torch.where((order < 1) | (order > 2), BAD_ORDER, self.bad)
        self.bad = torch.where(self.done, 0, self.bad)
        target = torch.where(nan, self.sigma, wanted).clamp(min=0.0)
        target = torch.minimum(target, self.sigma)
        if last:
            target = torch.zeros_like(target)
        target = torch.where(self.done, self.sigma, target)
        if self.v_last is None or self.v_before is None:
            self.v_last = self.v_before = torch.zeros_like(velocity)
        moved = self._move(sample, velocity, target, decision.order, computes)
        moved = torch.where(_spread(self.done, moved), sample.to(velocity.dtype), moved)
        self._remember(velocity, computes)
        hits = target[:, None] == self.sigmas[None, :]
        index = torch.where(hits.any(1), hits.int().argmax(1), -1)
        self.index = torch.where(self.done, self.index, index)
        self.sigma = target
        self.step = self.step + (~self.done).int()
        self.done = self.done | (target <= 0)
        return moved, target

    def _move(
        self,
        sample: torch.Tensor,
        velocity: torch.Tensor,
        target: torch.Tensor,
        order: torch.Tensor | None,
        computes: torch.Tensor,
    ) -> torch.Tensor:
        """Euler as diffusers has it (difference rounded to the velocity's dtype first), or the second-order step."""
        x, d = sample.float(), target - self.sigma
        euler = (x + _spread(d.to(velocity.dtype), x) * velocity).to(velocity.dtype)
        if order is None:
            return euler
        assert self.v_last is not None
        assert self.v_before is not None
        v = velocity.float()
        # A computed tick extrapolates from the last compute, a reused one from the last two.
        gap = torch.where(
            computes, self.sigma - self.sigma_last, self.sigma_last - self.sigma_before
        )
        ahead = torch.where(computes, d / 2, self.sigma + d / 2 - self.sigma_last)
        # `nfe` already counts this tick's compute, so both cases need two of them.
        known = (self.nfe > 1) & (gap != 0) & (order > 1)
        limit = (gap * MAX_STEP_RATIO / 2).abs()
        slope_length = torch.where(
            known, ahead.clamp(-limit, limit) / torch.where(gap == 0, 1.0, gap), 0.0
        )
        newest = torch.where(_spread(computes, v), v, self.v_last.float())
        older = torch.where(_spread(computes, v), self.v_last.float(), self.v_before.float())
        second = (x + _spread(d, x) * (newest + _spread(slope_length, x) * (newest - older))).to(
            velocity.dtype
        )
        return torch.where(_spread(known, x), second, euler)

    def _remember(self, velocity: torch.Tensor, computes: torch.Tensor) -> None:
        assert self.v_last is not None
        assert self.v_before is not None
        mask = _spread(computes, velocity)
        self.v_before = torch.where(mask, self.v_last, self.v_before)
        self.v_last = torch.where(mask, velocity, self.v_last)
        self.sigma_before = torch.where(computes, self.sigma_last, self.sigma_before)
        self.sigma_last = torch.where(computes, self.sigma, self.sigma_last)


def _spread(per_image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[B]` to `[B, 1, ...]` of as many axes as `like`."""
    return per_image.view(-1, *([1] * (like.ndim - 1)))

# SPDX-License-Identifier: Apache-2.0
"""`controller:tol`: each image's step size from how fast its own velocity changes. Not learned.

A step of du at u costs a local Euler error |dsigma| ||v_k - v_(k-1)|| that grows like du^2. Divided
by du^2 and by its mean over images at that u (the error profile), it leaves r: how much harder this
image is here than images are on average. An image of error c / n^2 in n steps should get n in
proportion to c^(2/3) to lower the mean squared error of a batch at a given total, so du = tol *
r^(-2/3): `tol` is the average step in u, `controller:0.1` takes about ten.

Shape letters: B images, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rapid3rt.errors import check_number
from rapid3rt.policies.base import (
    Warp,
    WarpedTime,
    check_family,
    check_order,
    compute_all,
    interpolate,
    planned_evaluations,
    step_to,
)
from rapid3rt.policies.schedule import WarpFamily
from rapid3rt.types import AUTO, ComputeDecision, DenoiseState, Run, StepDecision

POWER = 2 / 3
# A step is at most doubled or halved: an image may get up to twice the evaluations of the average
# one, never more.
WIDEST_STEP_FACTOR = 2.0
_TINY = 1e-12


def local_error(
    velocity: torch.Tensor,
    previous: torch.Tensor,
    sigma: torch.Tensor,
    previous_sigma: torch.Tensor,
    du: torch.Tensor,
) -> torch.Tensor:
    """|sigma - sigma_p| RMS(v - v_p) / du^2 per image: the local Euler error of a unit step in u.

    velocity, previous: `[B, C, h, w]`, any float dtype. sigma, previous_sigma, du (the step in u
    between them, above 0): float32 `[B]`. Returns float32 `[B]`. A family's error profile is the
    mean of this over images, at the u midway.
    """
    change = (velocity.float() - previous.float()).flatten(1)
    rms = change.square().mean(dim=1).sqrt()
    return (sigma - previous_sigma).abs() * rms / du.square()


def gaussian_profile(sigma: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """`local_error` of the exact flow to unit-variance Gaussian data.

    sigma: `[N]`; slope: `[N]`, dsigma / du there.

    There x(sigma) = z D^(1/2) with D = (1 - sigma)^2 + sigma^2 along a path of fixed z, so v = dx /
    dsigma changes at D^(-3/2) per unit of sigma and element. Diffusion latents are scaled to unit
    variance, which makes this the parameter-free stand-in where no profile was measured; real
    images differ from it by a factor that `tol` absorbs.
    """
    return slope.square() * ((1 - sigma).square() + sigma.square()).pow(-1.5)


class Controller:
    """Per-image steps from the velocity's change, on a searched family or the model's own shift.

    From where it stands an image wants round(u / du) even steps. Where its evaluations or the run's
    ticks allow fewer, it takes its share of them, shorter where it is harder than it was so far:
    then only the placement is left to choose. Every image lands at 0 within its budget and within
    the run's ticks. Order 2 where it is stable, unless told otherwise.
    """

    leaves_grid = True
    reuses = False

    def __init__(
        self,
        tol: float,
        *,
        family: WarpFamily | None = None,
        order: int = AUTO,
        budget: int | None = None,
        speed: float | None = None,
    ) -> None:
        self.tol = check_number(
            "tolerance", tol, lambda t: 0 < t <= 1, "a number above 0 and at most 1"
        )
        self.family, self.order, self.budget, self.speed = family, check_order(order), budget, speed
        self.name = f"controller:{tol:g}"
        self._evaluations = self._ticks = 0
        self._time: WarpedTime | None = None
        self._profile = torch.empty(0)
        self._past: _Past | None = None

    def begin(self, run: Run) -> None:
        """Raises `ValueError` if the run is of another model family than the searched grid."""
        if self.family is not None:
            check_family(self.family.family, run, self.name)
        self._evaluations, self._ticks = (
            planned_evaluations(run, self.budget, self.speed),
            run.ticks,
        )
        self._time = WarpedTime(run, Warp(self.family.knots) if self.family else None)
        self._profile = _profile_on(self._time.u_table, self._time.sigma_table, self.family)
        self._past = None

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return compute_all(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert self._time is not None
        u = self._time.u(state.sigma)
        past = self._past = self._advance(state, velocity, u)
        wanted = (u / (self.tol * _step_factor(past.hardness))).round().clamp(min=1)
        left = (self._evaluations - state.nfe).clamp(max=self._ticks - state.tick).clamp(min=1)
        share = (
            u / left * _step_factor(past.hardness - past.hardness_sum / past.measured.clamp(min=1))
        )
        du = torch.where(wanted <= left, u / wanted, torch.where(left == 1, u, share))
        return step_to(self._time.sigma(u - du), self.order)

    def _advance(self, state: DenoiseState, velocity: torch.Tensor, u: torch.Tensor) -> _Past:
        assert self._time is not None
        past = self._past
        if past is None:  # the first tick: nothing to compare with, every image counts as average
            zero = torch.zeros_like(u)
            return _Past(velocity.clone(), state.sigma.clone(), u, zero, zero, zero)
        error = local_error(
            velocity, past.velocity, state.sigma, past.sigma, (past.u - u).clamp(min=1e-6)
        )
        mean = interpolate((past.u + u) / 2, self._time.u_table, self._profile)
        hardness = (error.clamp(min=_TINY) / mean).log()
        fresh = torch.ones_like(state.done) if state.computes is None else state.computes
        return _Past(
            velocity=torch.where(fresh[:, None, None, None], velocity, past.velocity),
            sigma=torch.where(fresh, state.sigma, past.sigma),
            u=torch.where(fresh, u, past.u),
            hardness=torch.where(fresh, hardness, past.hardness),
            hardness_sum=past.hardness_sum + hardness.masked_fill(~fresh, 0.0),
            measured=past.measured + fresh,
        )


@dataclass(frozen=True, slots=True)
class _Past:
    """Per image, of its last compute: guided velocity `[B, C, h, w]`, sigma, u and log r.

    hardness_sum and measured: sum and number of the log r so far.
    """

    velocity: torch.Tensor
    sigma: torch.Tensor
    u: torch.Tensor
    hardness: torch.Tensor
    hardness_sum: torch.Tensor
    measured: torch.Tensor


def _step_factor(hardness: torch.Tensor) -> torch.Tensor:
    return (-POWER * hardness).exp().clamp(1 / WIDEST_STEP_FACTOR, WIDEST_STEP_FACTOR)


def _profile_on(u: torch.Tensor, sigma: torch.Tensor, family: WarpFamily | None) -> torch.Tensor:
    """The error profile at every point of the table, `[N]`: the family's own where it has one."""
    if family is None or family.error_profile is None:
        return gaussian_profile(sigma, torch.gradient(sigma, spacing=(u,))[0])
    at, value = torch.tensor(
        family.error_profile, dtype=torch.float32, device=u.device
    ).T.contiguous()
    return interpolate(u, at, value)

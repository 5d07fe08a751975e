# SPDX-License-Identifier: Apache-2.0
"""The step from one sigma to the next, each image at its own order (METHOD.md, section 1).

Order 1 is Euler as diffusers has it. Order 2 is Adams-Bashforth on the image's own computed velocities. `AUTO` lies
between them, nearer to order 2 the more stable it is for this image here: classifier-free guidance makes the flow
stiff, and beyond its stability limit order 2 does not lose accuracy but explodes (measured on the tiny SD3 at guidance
7 and 8 evaluations: 32 times the error of Euler). `FITTED` takes weights that were fitted on
calibration images; a reused velocity steps as Euler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rapid3rt.types import ADAMS_BASHFORTH, AUTO, FITTED

MAX_STEP_RATIO = 8.0
"""Cap of d / (sigma - sigma_p) in the second-order step."""
LIMIT, CALM_LIMIT = 2.0, 3.0
"""What AUTO keeps |d| L (1 + weight r) below: the bound of the test equation, and where nothing oscillates.

The secant's L exceeds the true one, so a flow whose velocity changed in the same direction twice is given more.
"""


@dataclass(slots=True)
class Solver:
    """What each image's next step needs of its past.

    sigma_last, sigma_before: float32 `[B]`, where the last two velocities were computed. v_last, v_before, x_last:
    `[B, ...]`, those guided velocities, and the latents of the last one; None before the first step. computed: int32
    `[B]`, how many there were.
    """

    sigma_last: torch.Tensor
    sigma_before: torch.Tensor
    computed: torch.Tensor
    v_last: torch.Tensor | None = None
    v_before: torch.Tensor | None = None
    x_last: torch.Tensor | None = None

    @classmethod
    def start(cls, images: int, device: torch.device) -> Solver:
        """No image has moved."""
        zeros = torch.zeros(images, dtype=torch.float32, device=device)
        return cls(zeros, zeros, torch.zeros(images, dtype=torch.int32, device=device))

    def step(
        self,
        x: torch.Tensor,
        velocity: torch.Tensor,
        sigma: torch.Tensor,
        target: torch.Tensor,
        order: torch.Tensor | None,
        computes: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Move every image and remember where it was; latents in the velocity's dtype, `[B, ...]`.

        Parameters
        ----------
        x, velocity: `[B, ...]`, latents and guided velocity. sigma, target: float32 `[B]`, from where to where.
        order: int8 `[B]` of AUTO, 1, 2, FITTED; None is 1 everywhere. computes: bool `[B]`, whose velocity is a fresh
        one. weights: float32 `[B, 4]`, of the steps that are FITTED.
        """
        d = target - sigma
        # The difference is rounded to the velocity's dtype before the product, as diffusers has it.
        moved = (x.float() + _spread(d.to(velocity.dtype), x) * velocity).to(velocity.dtype)
        if order is not None and self.v_last is not None:
            automatic = order == AUTO
            weight = torch.where(automatic, self._stability(x, velocity, sigma, d, computes), 1.0)
            second, possible = self._second_order(x, velocity, sigma, d, weight, computes)
            higher = (order == ADAMS_BASHFORTH) | automatic
            moved = torch.where(_spread(possible & higher & (weight > 0), x), second, moved)
        if order is not None and weights is not None:
            fitted = _spread((order == FITTED) & computes, x)
            moved = torch.where(fitted, self._fitted(x, velocity, d, weights), moved)
        self._remember(x, velocity, sigma, computes)
        return moved

    def _second_order(
        self,
        x: torch.Tensor,
        velocity: torch.Tensor,
        sigma: torch.Tensor,
        d: torch.Tensor,
        weight: torch.Tensor,
        computes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The step, `[B, ...]`, and for which images there is enough past, bool `[B]`.

        weight: float32 `[B]`, how much of the slope is taken: 0 Euler, 1 Adams-Bashforth.
        """
        assert self.v_last is not None
        assert self.v_before is not None
        v = velocity.float()
        # A computed tick extrapolates from the last compute, a reused one from the last two.
        gap = torch.where(computes, sigma - self.sigma_last, self.sigma_last - self.sigma_before)
        ahead = torch.where(computes, d / 2, sigma + d / 2 - self.sigma_last)
        possible = (self.computed + computes > 1) & (gap != 0)
        limit = (gap * MAX_STEP_RATIO / 2).abs()
        slope_length = torch.where(
            possible, ahead.clamp(-limit, limit) / torch.where(gap == 0, 1.0, gap), 0.0
        )
        fresh = _spread(computes, v)
        newest = torch.where(fresh, v, self.v_last.float())
        older = torch.where(fresh, self.v_last.float(), self.v_before.float())
        mean = newest + _spread(weight * slope_length, x) * (newest - older)
        return (x.float() + _spread(d, x) * mean).to(velocity.dtype), possible

    def _stability(
        self,
        x: torch.Tensor,
        velocity: torch.Tensor,
        sigma: torch.Tensor,
        d: torch.Tensor,
        computes: torch.Tensor,
    ) -> torch.Tensor:
        """How much of order 2 is stable over the step d, float32 `[B]` in 0..1; 0 for reused velocities.

        On x' = L x, L > 0 (sigma falls), the step with a weight w of the slope has the characteristic equation
        q^2 - (1 - z (1 + w r / 2)) q - w z r / 2 = 0 with z = |d| L and r = d / (step before). It leaves the unit
        circle at q = -1, where z (1 + w r) = 2; so w = (2 / z - 1) / r: order 2 for small steps, Euler from z = 2 on.
        The secant of the last two computes estimates L along the image's own path as <dv, dv> / <dv, dx> (the second
        step length of Barzilai and Borwein, inverted); where it is negative nothing decays and nothing is limited.
        """
        assert self.v_last is not None
        assert self.v_before is not None
        assert self.x_last is not None
        dv, dx = velocity.float() - self.v_last.float(), x.float() - self.x_last.float()
        dv_before = self.v_last.float() - self.v_before.float()
        calm = (self.computed > 1) & (_dot(dv, dv_before) > 0)
        limit = torch.where(calm, CALM_LIMIT, LIMIT)
        reach, slope = d.abs() * _dot(dv, dv), _dot(dv, dx)
        ratio = d / (sigma - self.sigma_last)
        # z = reach / slope, written so that nothing that may vanish divides.
        weight = ((limit * slope - reach) / (ratio * reach)).clamp(0, 1)
        weight = torch.where((slope < 0) | (reach == 0), 1.0, weight)
        return torch.where(computes, weight, 0.0)

    def _fitted(
        self, x: torch.Tensor, velocity: torch.Tensor, d: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x + d (v + a v + b x + c (v - v') + e (v' - v'')), weights (a, b, c, e); what is not there yet counts as 0.

        v' and v'' are the computed velocities before v. Adams-Bashforth is c = d / (2 (sigma - sigma')) alone. Fitted
        on whole trajectories, the weights also make up for the mean of what a step of this length at this place misses,
        and for what the steps before it left behind (`calibrate.fitting`).
        """
        v = velocity.float()
        a, b, c, e = (_spread(weight, x) for weight in weights.float().unbind(1))
        mean = v + a * v + b * x.float()
        if self.v_last is not None and self.v_before is not None:
            one, two = _spread(self.computed > 0, x), _spread(self.computed > 1, x)
            last, before = self.v_last.float(), self.v_before.float()
            mean = mean + c * torch.where(one, v - last, 0.0)
            mean = mean + e * torch.where(two, last - before, 0.0)
        return (x.float() + _spread(d, x) * mean).to(velocity.dtype)

    def _remember(
        self, x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, computes: torch.Tensor
    ) -> None:
        if self.v_last is None or self.v_before is None or self.x_last is None:
            self.v_last = self.v_before = torch.zeros_like(velocity)
            self.x_last = torch.zeros_like(x)
        mask = _spread(computes, velocity)
        self.v_before = torch.where(mask, self.v_last, self.v_before)
        self.v_last = torch.where(mask, velocity, self.v_last)
        self.x_last = torch.where(mask, x, self.x_last)
        self.sigma_before = torch.where(computes, self.sigma_last, self.sigma_before)
        self.sigma_last = torch.where(computes, sigma, self.sigma_last)
        self.computed = self.computed + computes.int()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1)


def _spread(per_image: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[B]` to `[B, 1, ...]` of as many axes as `like`."""
    return per_image.view(-1, *([1] * (like.ndim - 1)))

# SPDX-License-Identifier: Apache-2.0
"""A run without a model: drive a policy tick by tick and write down what it decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from rapid3rt.policies.base import round_float32, shift_sigma
from rapid3rt.types import COMPUTE, ActionCosts, DenoiseState, Policy, Run

SHIFT = 3.0


def sd3_grid(ticks: int, shift: float = SHIFT) -> tuple[float, ...]:
    """The stock SD3 grid: the shift is applied to both ends and once more to every point."""
    last = shift_sigma(0.001, shift)
    even = [1 + (last - 1) * j / max(1, ticks - 1) for j in range(ticks)]
    return round_float32([*(shift_sigma(u, shift) for u in even), 0.0])


@dataclass
class Walk:
    """What happened, `[tick][image]`, entries of finished images left out as None."""

    sigma: list[list[float | None]] = field(default_factory=list)
    next_sigma: list[list[float | None]] = field(default_factory=list)
    action: list[list[int | None]] = field(default_factory=list)
    level: list[list[int | None]] = field(default_factory=list)
    order: list[list[int | None]] = field(default_factory=list)
    weights: list[list[list[float] | None]] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)

    def column(self, name: str, image: int) -> list[Any]:
        return [row[image] for row in getattr(self, name) if row[image] is not None]


@dataclass
class World:
    """Per-image difficulty: latents of standard deviation `spread`, drift per tick `drift`."""

    spread: torch.Tensor
    drift: torch.Tensor
    noise: torch.Tensor

    def velocity(self, sigma: torch.Tensor) -> torch.Tensor:
        """The exact velocity for Gaussian data of that spread, along a path of fixed noise."""
        s2 = self.spread.square()
        d = ((1 - sigma).square() * s2 + sigma.square()).sqrt()
        return self.noise * ((sigma - (1 - sigma) * s2) / d)[:, None, None, None]

    def take(self, images: list[int]) -> World:
        return World(self.spread[images], self.drift[images], self.noise[images])


def make_world(images: int, seed: int = 0) -> World:
    generator = torch.Generator().manual_seed(seed)
    spread = 0.3 + torch.rand(images, generator=generator)
    drift = 0.02 + 0.1 * torch.rand(images, generator=generator)
    return World(spread, drift, torch.randn(images, 4, 6, 6, generator=generator))


def make_run(images: int = 1, ticks: int = 28, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "images": images,
        "ticks": ticks,
        "sigmas": sd3_grid(ticks),
        "budget": None,
        "family": "sd3",
        "resolution": (6, 6),
        "shift": SHIFT,
        "costs": ActionCosts(),
        "device": torch.device("cpu"),
    }
    return Run(**{**values, **changes})


def drive(policy: Policy, run: Run, world: World, cap: int | None = None) -> Walk:
    """Run `policy` to the end as a session does: the first tick computes, `cap` masks computes."""
    policy.begin(run)
    count = run.images
    walk, zero = Walk(), torch.zeros(count, dtype=torch.int32)
    sigma = torch.full((count,), run.sigmas[0])
    step, nfe, since, drift = zero, zero, zero, torch.zeros(count)
    for tick in range(run.ticks):
        done = sigma == 0
        state: dict[str, Any] = {
            "tick": tick,
            "sigma": sigma,
            "step": step,
            "nfe": nfe,
            "since_compute": since,
            "equivalent_steps": nfe.float(),
            "done": done,
            "has_reference": nfe > 0,
            "latents": world.noise,
            "reference": world.noise.roll(1, -1),
            "drift": drift,
            "conditioning": world.noise.flatten(1)[:, :8],
        }
        decision = policy.decide_compute(DenoiseState(**state))
        computes = (decision.action == COMPUTE) | (nfe == 0)
        computes &= (nfe < cap) if cap is not None else True
        computes &= ~done
        steps = policy.decide_step(DenoiseState(**state, computes=computes), world.velocity(sigma))
        order = torch.ones(count) if steps.order is None else steps.order
        assert decision.action.dtype == torch.int8
        assert decision.sparsity.dtype == torch.int32
        assert steps.next_sigma.dtype == torch.float32
        assert not steps.next_sigma.isnan().any()

        def kept(values: torch.Tensor, done: torch.Tensor = done) -> list[Any]:
            return [None if d else v for v, d in zip(values.tolist(), done.tolist(), strict=True)]

        walk.sigma.append(kept(sigma))
        walk.next_sigma.append(kept(steps.next_sigma))
        walk.action.append(kept(torch.where(computes, COMPUTE, decision.action.clamp(min=1))))
        walk.level.append(kept(decision.sparsity))
        walk.order.append(kept(order.int()))
        walk.weights.append(kept(torch.zeros(count, 4) if steps.weights is None else steps.weights))
        moved = steps.next_sigma.minimum(sigma).clamp(min=0)
        sigma = torch.where(done, sigma, moved)
        step = step + (~done).int()
        nfe = nfe + computes.int()
        since = torch.where(computes, zero, since) + 1
        drift = torch.where(computes, world.drift, drift + world.drift)
        if (sigma == 0).all():
            break
    assert (sigma == 0).all(), "an image did not end"
    walk.nfe = nfe.tolist()
    return walk


@dataclass(frozen=True)
class Simulator:
    run: Callable[..., Run] = make_run
    world: Callable[..., World] = make_world
    drive: Callable[..., Walk] = drive
    grid: Callable[..., tuple[float, ...]] = sd3_grid


@pytest.fixture(scope="session")
def sim() -> Simulator:
    return Simulator()

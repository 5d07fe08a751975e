# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt.policies import Controller, WarpFamily
from rapid3rt.policies.base import Warp, trimmed_sigmas
from rapid3rt.policies.controller import gaussian_profile, local_error

FAMILY = WarpFamily(
    family="sd3", num_ticks=28, shift=3.0, order=2, knots=((0.3, 0.25), (0.6, 0.5)),
    error_profile=((0.0, 1.0), (1.0, 1.0)),
)  # fmt: skip


def still(world):
    """The same world with a velocity that never changes."""
    world.velocity = lambda sigma: torch.ones(len(sigma), 4, 6, 6)
    return world


def test_local_error_is_the_hand_computed_value():
    velocity, previous = torch.full((2, 1, 2, 2), 3.0), torch.zeros(2, 1, 2, 2)
    sigma, before = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.6])
    error = local_error(velocity, previous, sigma, before, torch.tensor([0.5, 0.1]))
    assert error.tolist() == pytest.approx([0.25 * 3 / 0.25, 0.1 * 3 / 0.01])


def test_gaussian_profile_matches_the_exact_flow_it_is_derived_from():
    sigma = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    h = 1e-4

    def speed(x):
        return (2 * x - 1) / ((1 - x).square() + x.square()).sqrt()  # d D^(1/2) / d sigma

    curvature = (speed(sigma + h) - speed(sigma - h)) / (2 * h)
    expected = 4.0 * curvature  # |dsigma| |dv| / du^2 with dsigma / du = 2
    assert torch.allclose(gaussian_profile(sigma, torch.full_like(sigma, 2.0)), expected, rtol=1e-6)


def test_an_average_image_walks_the_trimmed_grid(sim):
    world = sim.world(2)
    world.spread[:] = 1.0  # exactly the data the default profile is for
    world.noise /= world.noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    walk = sim.drive(Controller(0.1), sim.run(2), world)
    assert walk.nfe == [10, 10]
    grid = trimmed_sigmas(10, sim.run())
    assert walk.column("next_sigma", 0) == pytest.approx(grid[1:], abs=0.005)
    assert set(walk.column("order", 0)) == {0}


def test_the_first_step_is_the_tolerance_on_the_family_grid(sim):
    walk = sim.drive(Controller(0.125, family=FAMILY), sim.run(1), sim.world(1))
    expected = trimmed_sigmas(8, sim.run(), Warp(FAMILY.knots))[1]
    assert walk.column("next_sigma", 0)[0] == pytest.approx(expected, abs=2e-6)


def test_an_image_whose_velocity_stands_still_takes_the_longest_steps(sim):
    walk = sim.drive(Controller(0.1), sim.run(1), still(sim.world(1)))
    # One step of 0.1, then 0.9 in round(0.9 / 0.2) = 4 (ties to even).
    assert walk.nfe == [5]


def test_a_hard_image_gets_more_evaluations_than_an_easy_one(sim):
    world = sim.world(2)
    world.noise[0] *= 0.3
    world.noise[1] *= 3.0
    easy, hard = sim.drive(Controller(0.1), sim.run(2), world).nfe
    assert easy < hard <= 20


def test_the_power_two_thirds(sim):
    world = sim.world(1)
    world.velocity = lambda sigma: sigma[:, None, None, None].expand(-1, 4, 6, 6)
    flat = WarpFamily(
        family="sd3", num_ticks=28, shift=1.0, order=2, knots=(),
        error_profile=((0.0, 1 / 1.5**1.5), (1.0, 1 / 1.5**1.5)),
    )  # fmt: skip
    run = sim.run(1, shift=1.0, sigmas=sim.grid(28, 1.0))
    walk = sim.drive(Controller(0.1, family=flat), run, world)
    # Shift 1, no knots: sigma = u, v = sigma, so the local error is 1 and r = 1.5^(3/2): steps of
    # 0.1 / 1.5. After the first 0.1 that is 13.5 more, which rounds to 13 or 14 even ones.
    assert walk.column("next_sigma", 0)[0] == pytest.approx(0.9, abs=1e-6)
    assert walk.nfe[0] in (14, 15)
    steps = [
        a - b for a, b in zip(walk.column("sigma", 0), walk.column("next_sigma", 0), strict=True)
    ]
    assert steps[1:] == pytest.approx([0.9 / (walk.nfe[0] - 1)] * (walk.nfe[0] - 1), abs=1e-4)


@pytest.mark.parametrize("budget", [1, 2, 5, 9, 28])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_budget_is_kept_and_every_image_lands(sim, budget, scale):
    world = sim.world(4)
    world.noise *= scale
    for policy, run in (
        (Controller(0.1, budget=budget), sim.run(4)),
        (Controller(0.1), sim.run(4, budget=budget)),
    ):
        walk = sim.drive(policy, run, world)  # drive asserts that all images end
        assert max(walk.nfe) <= budget


def test_under_a_binding_budget_difficulty_alone_changes_nothing(sim):
    world = sim.world(1)
    harder = sim.world(1)
    harder.noise *= 2
    run = sim.run(1)
    a = sim.drive(Controller(0.02, budget=6), run, world).column("next_sigma", 0)
    b = sim.drive(Controller(0.02, budget=6), run, harder).column("next_sigma", 0)
    assert len(a) == len(b) == 6
    assert a == pytest.approx(b, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.floats(0.005, 1.0), st.floats(-6, 6), st.integers(0, 99))
def test_it_ends_within_the_ticks_whatever_the_velocity(sim, ticks, tol, log_scale, seed):
    world = sim.world(3, seed)
    world.noise *= 10.0**log_scale
    run = sim.run(3, ticks=ticks)
    walk = sim.drive(Controller(tol), run, world)
    for image in range(3):
        sigmas = [*walk.column("sigma", image), 0.0]
        assert all(a > b for a, b in itertools.pairwise(sigmas))
        assert all(s == 0 or s >= 0.01 for s in walk.column("next_sigma", image))


def test_an_image_does_not_see_its_neighbours(sim):
    world, order = sim.world(5), [3, 0, 4, 2, 1]
    together = sim.drive(Controller(0.1), sim.run(5), world)
    shuffled = sim.drive(Controller(0.1), sim.run(5), world.take(order))
    assert len(set(together.nfe)) > 1
    for place, image in enumerate(order):
        alone = sim.drive(Controller(0.1), sim.run(1), world.take([image]))
        mine = pytest.approx(together.column("next_sigma", image), rel=1e-5)
        assert alone.column("next_sigma", 0) == mine
        assert shuffled.column("next_sigma", place) == mine


def test_a_shortened_run_starts_where_it_stands(sim):
    world = sim.world(1)
    world.spread[:] = 1.0
    world.noise /= world.noise.square().mean().sqrt()
    grid = sim.grid(28)[14:]
    walk = sim.drive(Controller(0.1), sim.run(1, ticks=14, sigmas=grid), world)
    assert walk.nfe == [5]  # u of the middle of the grid is 1/2


@pytest.mark.parametrize("tol", [0, -0.1, 1.5, float("nan"), True])
def test_the_tolerance_must_lie_in_zero_to_one(tol):
    with pytest.raises(ValueError, match="tolerance must be a number above 0 and at most 1"):
        Controller(tol)


def test_a_family_of_another_model_is_refused(sim):
    with pytest.raises(ValueError, match=r"family must be 'sd3'.*got 'flux'"):
        Controller(0.1, family=FAMILY).begin(sim.run(family="flux"))

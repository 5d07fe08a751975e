# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt.policies import base, budget, controller, fixed, replay, schedule, threshold
from rapid3rt.policies.base import (
    Warp,
    interpolate,
    next_from_list,
    planned_evaluations,
    round_float32,
    shift_sigma,
    trimmed_sigmas,
    unshift_sigma,
)


def test_shift_is_the_hand_computed_value_and_has_its_inverse():
    assert shift_sigma(0.5, 3.0) == 0.75  # 1.5 / 2
    assert shift_sigma(0.25, 3.0) == 0.5  # 0.75 / 1.5
    assert unshift_sigma(0.75, 3.0) == pytest.approx(0.5, abs=1e-15)
    assert shift_sigma(0.3, 1.0) == pytest.approx(0.3)


def test_trimmed_grid_of_four_is_the_hand_computed_one(sim):
    # u = 1, 3/4, 1/2, 1/4, 0 under phi(u) = 3 u / (1 + 2 u)
    assert trimmed_sigmas(4, sim.run()) == round_float32([1.0, 0.9, 0.75, 0.5, 0.0])


def test_trimmed_grid_scales_to_the_sigma_a_shortened_run_starts_from(sim):
    run = sim.run(ticks=2, sigmas=(0.75, 0.5, 0.0))  # u starts at 1/2
    assert trimmed_sigmas(2, run) == round_float32([0.75, 0.5, 0.0])


def test_a_warped_grid_starts_at_the_run_and_ends_at_zero(sim):
    warp = Warp([(0.3, 0.2), (0.6, 0.7)])
    run = sim.run(sigmas=(0.75, 0.5, 0.0), ticks=2)
    grid = trimmed_sigmas(10, run, warp)
    u_start = warp.inverse(unshift_sigma(run.sigmas[0], 3.0))
    assert grid[0] == run.sigmas[0]
    assert grid[-1] == 0.0
    assert grid[4] == pytest.approx(shift_sigma(warp(u_start * 0.6), 3.0), rel=1e-6)
    assert list(grid) == sorted(grid, reverse=True)


def test_no_knots_and_knots_on_the_diagonal_are_the_identity():
    for warp in (Warp(), Warp([(0.25, 0.25), (0.7, 0.7)])):
        for u in (0.0, 0.1, 0.25, 0.5, 0.999, 1.0):
            assert warp(u) == pytest.approx(u, abs=1e-15)


def test_warp_follows_the_published_pchip_slopes():
    # Knots (0, 0), (.5, .25), (1, 1): secants .5, 1.5; slope at .5 is their harmonic mean .75;
    # ends (3 * .5 - 1.5) / 2 = 0 and (3 * 1.5 - .5) / 2 = 2. Hermite at .25: .125 - .5 * .75 / 8.
    warp = Warp([(0.5, 0.25)])
    assert warp(0.5) == 0.25
    assert warp(0.25) == pytest.approx(0.125 - 0.046875, abs=1e-15)
    assert warp(0.75) == pytest.approx(0.625 + 0.5 * (0.75 - 2.0) / 8, abs=1e-15)


@pytest.mark.parametrize(
    "knots", [[(0.5, 0.5), (0.4, 0.6)], [(0.2, 0.5), (0.4, 0.5)], [(0.5, 1.0)], [(0.0, 0.1)]]
)
def test_warp_refuses_knots_that_do_not_rise_inside(knots):
    with pytest.raises(ValueError, match="knots must rise strictly"):
        Warp(knots)


inside = st.floats(0.01, 0.99)
columns = st.lists(inside, min_size=1, max_size=6, unique_by=lambda x: round(x, 2)).map(sorted)


@settings(max_examples=60, deadline=None)
@given(columns, columns, st.lists(st.floats(0, 1), min_size=2, max_size=8).map(sorted))
def test_every_warp_is_monotone_and_its_inverse_undoes_it(us, ws, points):
    warp = Warp(list(zip(us, ws, strict=False)))
    values = [warp(u) for u in points]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    for w in (0.1, 0.5, 0.9):
        assert warp(warp.inverse(w)) == pytest.approx(w, abs=1e-9)


def test_next_from_list_gives_each_image_its_own_and_stays_at_the_end():
    sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
    step = torch.tensor([0, 2, 1, 3, 9], dtype=torch.int32)
    assert next_from_list(sigmas, step).tolist() == [0.5, 0.0, 0.25, 0.0, 0.0]


def test_interpolate_is_linear_inside_and_constant_outside():
    xs, ys = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([2.0, 4.0, 0.0])
    x = torch.tensor([-1.0, 0.0, 0.25, 2.0, 3.0, 9.0])
    assert interpolate(x, xs, ys).tolist() == [2.0, 2.0, 2.5, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("run_budget", "own", "speed", "expected"),
    [(None, None, None, 28), (None, 9, None, 9), (7, 9, None, 7), (None, None, 2.5, 11),
     (None, 40, None, 28), (None, None, 100.0, 1), (None, None, 1.0, 28)],
)  # fmt: skip
def test_planned_evaluations(sim, run_budget, own, speed, expected):
    assert planned_evaluations(sim.run(budget=run_budget), own, speed) == expected


@pytest.mark.parametrize("module", [base, budget, controller, fixed, replay, schedule, threshold])
def test_no_policy_reads_the_device(module):
    source = inspect.getsource(module)
    for read in (".item()", ".tolist()", ".cpu()", ".numpy()", ".any()", ".all()"):
        assert read not in source

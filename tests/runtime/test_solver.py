# SPDX-License-Identifier: Apache-2.0
"""The automatic order, on linear flows whose stiffness is known, and in a batch of different ones."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_layouts import call, make_pipeline

import rapid3rt
from rapid3rt.policies import ScheduleFamily, WarpFamily
from rapid3rt.policies.fitted import Fit
from rapid3rt.runtime.solver import Solver
from rapid3rt.types import ADAMS_BASHFORTH, AUTO, EULER, FITTED

STEPS = 8


def walk(
    stiffness: torch.Tensor, order: int, steps: int = STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx / dsigma = L (x - sigma c) + c from 1 to 0: the latents at 0, `[B, 3]`, and their largest error, `[B]`.

    The exact solution is x = sigma c + (x_1 - c) exp(L (sigma - 1)).
    """
    rate = stiffness[:, None].double() * torch.tensor([[1.0, 0.3, 0.0]])
    c = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    x = torch.tensor([[0.3, 1.0, -1.0]], dtype=torch.float64).expand(len(stiffness), 3)
    exact = (x - c) * torch.exp(-rate)
    solver = Solver.start(len(stiffness), torch.device("cpu"))
    everyone = torch.ones(len(stiffness), dtype=torch.bool)
    orders = torch.full((len(stiffness),), order, dtype=torch.int8)
    for now, then in itertools.pairwise(torch.linspace(1, 0, steps + 1)):
        velocity = rate * (x - now * c) + c
        x = solver.step(x, velocity, now.expand(len(x)), then.expand(len(x)), orders, everyone)
    return x, (x - exact).abs().amax(1)


def test_order_two_where_the_flow_is_smooth_and_euler_where_it_is_stiff() -> None:
    # |d| L is 0.125, 1 and 1.75: order 2 is stable below 1, Euler below 2.
    stiffness = torch.tensor([1.0, 8.0, 14.0])
    euler, second, automatic = (walk(stiffness, o)[1] for o in (EULER, ADAMS_BASHFORTH, AUTO))
    assert automatic[0] == second[0] < euler[0] / 3
    assert automatic[1] <= 1.01 * max(euler[1], second[1])
    assert second[2] > 100 * euler[2]
    assert (
        automatic[2] < second[2] / 100
    )  # not smaller than Euler: the first secant mixes in the slow direction


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.5])
def test_the_weight_of_the_slope_is_what_the_test_equation_bears(ratio: float) -> None:
    """One decaying component, whose secant is exact: the second step is on the bound, whatever the step ratio."""
    d = -0.1
    for z in (0.2, 0.9, 1.4, 1.9, 2.5):
        rate = z / abs(d)
        solver, auto = Solver.start(1, torch.device("cpu")), torch.tensor([AUTO], dtype=torch.int8)
        x0 = torch.tensor([[1.0]], dtype=torch.float64)
        now, everyone = torch.tensor([0.9]), torch.tensor([True])
        first = now + d / ratio
        x1 = solver.step(x0, rate * x0, now, first, auto, everyone)
        x2 = solver.step(x1, rate * x1, first, first + d, auto, everyone)
        weight = min(1.0, max(0.0, (2 / z - 1) / ratio))
        slope = rate * (x1 - x0) * ratio / 2
        torch.testing.assert_close(x2, x1 + d * (rate * x1 + weight * slope), atol=1e-5, rtol=1e-5)


def test_an_image_goes_the_same_way_alone_and_beside_others() -> None:
    stiffness = torch.tensor([1.0, 30.0, 8.0, 0.5])
    together = walk(stiffness, AUTO)[0]
    for i in range(4):
        assert torch.equal(walk(stiffness[i : i + 1], AUTO)[0][0], together[i])


def test_a_reused_tick_takes_euler() -> None:
    solver, everyone = Solver.start(1, torch.device("cpu")), torch.tensor([True])
    x, auto = torch.randn(1, 4), torch.tensor([AUTO], dtype=torch.int8)
    for now in (1.0, 0.8):
        solver.step(
            x * now, x + now, torch.tensor([now]), torch.tensor([now - 0.2]), auto, everyone
        )
    now, then = torch.tensor([0.6]), torch.tensor([0.4])
    reused = solver.step(x, x + 1, now, then, auto, ~everyone)
    assert torch.equal(reused, x + (then - now) * (x + 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_of_fitted_steps_replays_bit_for_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    pipe = make_pipeline("sd3", dtype)
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).mul(0.1).tolist()
    fit = Fit(weights=((6, tuple(map(tuple, rows))),), tokens=256, guidance=7.0)
    family = WarpFamily(family="sd3", num_ticks=8, shift=3.0, order=AUTO, knots=(), fit=fit)
    rapid3rt.accelerate(pipe, ScheduleFamily(family, budget=6))
    images = call(pipe, 8, guidance_scale=7.0)
    trace = rapid3rt.report(pipe).trace
    rapid3rt.restore(pipe)
    assert {tick.order for image in trace.images for tick in image} == {FITTED}
    assert trace.images[0][2].weights == tuple(torch.tensor(rows)[2].tolist())
    trace.save(tmp_path / "trace.json")
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(images, call(pipe, 8, guidance_scale=7.0))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, ScheduleFamily(replace(family, fit=None), budget=6))
    assert not torch.equal(images, call(pipe, 8, guidance_scale=7.0))


def test_a_call_that_fitted_steps_do_not_suit_is_told() -> None:
    pipe = make_pipeline("sd3", torch.float32)
    fit = Fit(weights=((6, ((0.1, 0.0, 0.0, 0.0),) * 6),), tokens=256, guidance=7.0)
    family = WarpFamily(family="sd3", num_ticks=8, shift=3.0, order=AUTO, knots=(), fit=fit)
    rapid3rt.accelerate(pipe, ScheduleFamily(family, budget=6))
    for guidance, order in ((3.0, AUTO), (7.0, FITTED), (3.0, AUTO)):  # every run is looked at anew
        call(pipe, 8, guidance_scale=guidance)
        report = rapid3rt.report(pipe)
        assert {tick.order for image in report.trace.images for tick in image} == {order}
        assert ("(here: guidance 3, not 7)" in str(report)) is (order == AUTO)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 12.0])
def test_a_trace_of_the_automatic_order_replays_bit_for_bit(guidance: float, tmp_path: Any) -> None:
    pipe = make_pipeline("sd3", torch.float32)
    rapid3rt.accelerate(pipe, "steps:6/trim/auto")
    images = call(pipe, 8, guidance_scale=guidance)
    trace = rapid3rt.report(pipe).trace
    rapid3rt.restore(pipe)
    assert {tick.order for image in trace.images for tick in image} == {AUTO}
    trace.save(tmp_path / "trace.json")
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(images, call(pipe, 8, guidance_scale=guidance))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "steps:6/trim")
    assert not torch.equal(images, call(pipe, 8, guidance_scale=guidance))


# Fitted steps --------------------------------------------------------------------------------------------------------


def fitted_walk(weights: torch.Tensor, orders: torch.Tensor) -> list[torch.Tensor]:
    """Latents `[B, 3]` after each of four steps of made-up velocities. weights: `[4, B, 4]`. orders: `[B]`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, generator=generator).expand(len(orders), 3)
    solver, passed = Solver.start(len(orders), torch.device("cpu")), []
    everyone = torch.ones(len(orders), dtype=torch.bool)
    for j, (now, then) in enumerate(itertools.pairwise((1.0, 0.8, 0.5, 0.3, 0.0))):
        velocity = torch.randn(1, 3, generator=generator).expand_as(x)
        at = [torch.tensor(s).expand(len(x)) for s in (now, then)]
        x = solver.step(x, velocity, *at, orders, everyone, weights[j])
        passed.append(x)
    return passed


def test_a_fitted_step_by_hand() -> None:
    weights = torch.tensor([0.1, -0.2, 0.3, -0.4]).expand(4, 1, 4)
    passed = fitted_walk(weights, torch.tensor([FITTED], dtype=torch.int8))
    generator = torch.Generator().manual_seed(3)
    x, *v = (torch.randn(1, 3, generator=generator) for _ in range(5))
    mean = 1.1 * v[0] - 0.2 * x
    torch.testing.assert_close(passed[0], x - 0.2 * mean)
    mean = 1.1 * v[1] - 0.2 * passed[0] + 0.3 * (v[1] - v[0])
    torch.testing.assert_close(passed[1], passed[0] - 0.3 * mean)
    mean = 1.1 * v[2] - 0.2 * passed[1] + 0.3 * (v[2] - v[1]) - 0.4 * (v[1] - v[0])
    torch.testing.assert_close(passed[2], passed[1] - 0.2 * mean)


def test_without_weights_a_fitted_step_is_euler_and_with_its_own_it_is_adams_bashforth() -> None:
    fitted, zero = torch.tensor([FITTED], dtype=torch.int8), torch.zeros(4, 1, 4)
    euler = fitted_walk(zero, torch.tensor([EULER], dtype=torch.int8))
    assert torch.equal(torch.cat(fitted_walk(zero, fitted)), torch.cat(euler))
    slopes = torch.tensor([0.0, 0.3 / 0.2 / 2, 0.2 / 0.3 / 2, 0.3 / 0.2 / 2])
    weights = torch.zeros(4, 1, 4)
    weights[:, 0, 2] = slopes
    second = fitted_walk(zero, torch.tensor([ADAMS_BASHFORTH], dtype=torch.int8))
    torch.testing.assert_close(torch.cat(fitted_walk(weights, fitted)), torch.cat(second))


def test_a_fitted_image_and_its_neighbours_do_not_mix() -> None:
    orders = torch.tensor([EULER, FITTED, AUTO, FITTED, ADAMS_BASHFORTH], dtype=torch.int8)
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(4, 5, 4, generator=generator)
    weights[:, [0, 2, 4]] = torch.nan  # not read
    together = fitted_walk(weights, orders)
    for i in range(5):
        alone = fitted_walk(weights[:, i : i + 1], orders[i : i + 1])
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[i])
            assert b[i].isfinite().all()


def test_a_fitted_step_of_a_reused_velocity_is_eulers() -> None:
    solver, everyone = Solver.start(1, torch.device("cpu")), torch.tensor([True])
    x, fitted = torch.randn(1, 4), torch.tensor([FITTED], dtype=torch.int8)
    weights = torch.full((1, 4), 0.5)
    now, then = torch.tensor([1.0]), torch.tensor([0.6])
    x = solver.step(x, x + 1, now, then, fitted, everyone, weights)
    reused = solver.step(x, x + 2, then, then - 0.1, fitted, ~everyone, weights)
    torch.testing.assert_close(reused, x - 0.1 * (x + 2))

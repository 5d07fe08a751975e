# SPDX-License-Identifier: Apache-2.0
"""The automatic order, on linear flows whose stiffness is known, and in a batch of different ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_layouts import call, make_pipeline

import rapid3rt
from rapid3rt.runtime.solver import Solver
from rapid3rt.types import ADAMS_BASHFORTH, AUTO, EULER

STEPS = 8


def walk(stiffness: torch.Tensor, order: int, steps: int = STEPS) -> tuple[torch.Tensor, list[Any]]:
    """dx / dsigma = L (x - sigma c) + c from 1 to 0: images `[B, 3]` and the orders taken.

    The exact solution is x = sigma c + (x_1 - c) exp(L (sigma - 1)).
    """
    rate = stiffness[:, None].double() * torch.tensor([[1.0, 0.3, 0.0]])
    c = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    x = torch.tensor([[0.3, 1.0, -1.0]], dtype=torch.float64).expand(len(stiffness), 3)
    grid = torch.linspace(1, 0, steps + 1)
    solver = Solver.start(len(stiffness), torch.device("cpu"))
    everyone = torch.ones(len(stiffness), dtype=torch.bool)
    orders = torch.full((len(stiffness),), order, dtype=torch.int8)
    taken = []
    for now, then in itertools.pairwise(grid):
        velocity = rate * (x - now * c) + c
        x, used = solver.step(
            x, velocity, now.expand(len(x)), then.expand(len(x)), orders, everyone
        )
        assert used is not None
        taken.append(used)
    exact = (torch.tensor([[0.3, 1.0, -1.0]]) - c) * torch.exp(-rate)
    return (x - exact).abs().amax(1), taken


def test_order_two_where_the_flow_is_smooth_and_euler_where_it_is_stiff() -> None:
    # |d| L is 0.125, 1 and 1.75: order 2 is stable below 1, Euler below 2.
    stiffness = torch.tensor([1.0, 8.0, 14.0])
    euler, second, automatic = (walk(stiffness, o)[0] for o in (EULER, ADAMS_BASHFORTH, AUTO))
    assert automatic[0] == second[0] < euler[0] / 3
    assert second[2] > 100 * euler[2]
    assert automatic[2] <= 1.01 * euler[2]
    taken = torch.stack(walk(stiffness, AUTO)[1])
    assert (taken[0] == EULER).all()
    assert (taken[1:, 0] == ADAMS_BASHFORTH).all()
    assert (taken[:, 2] == EULER).all()


def test_an_image_takes_the_same_order_alone_and_beside_others() -> None:
    stiffness = torch.tensor([1.0, 30.0, 8.0, 0.5])
    together = torch.stack(walk(stiffness, AUTO)[1])
    for i in range(4):
        alone = torch.stack(walk(stiffness[i : i + 1], AUTO)[1])[:, 0]
        assert torch.equal(alone, together[:, i])


def test_a_reused_tick_takes_euler() -> None:
    solver = Solver.start(1, torch.device("cpu"))
    x, auto = torch.randn(1, 4), torch.tensor([AUTO], dtype=torch.int8)
    orders = []
    for now, computes in ((1.0, True), (0.8, True), (0.6, True), (0.4, False), (0.2, True)):
        velocity = x + 1.0
        x, used = solver.step(
            x,
            velocity,
            torch.tensor([now]),
            torch.tensor([now - 0.2]),
            auto,
            torch.tensor([computes]),
        )
        assert used is not None
        orders.append(int(used))
    assert orders == [1, 2, 2, 1, 2]


@pytest.mark.parametrize("guidance", [1.0, 12.0])
def test_the_trace_says_which_order_was_taken_and_replays_it(
    guidance: float, tmp_path: Any
) -> None:
    pipe = make_pipeline("sd3", torch.float32)
    rapid3rt.accelerate(pipe, "steps:6/trim/auto")
    images = call(pipe, 8, guidance_scale=guidance)
    trace = rapid3rt.report(pipe).trace
    rapid3rt.restore(pipe)
    orders = [[tick.order for tick in image] for image in trace.images]
    assert {o for row in orders for o in row} <= {EULER, ADAMS_BASHFORTH}
    assert all(row[0] == EULER for row in orders)
    trace.save(tmp_path / "trace.json")
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(images, call(pipe, 8, guidance_scale=guidance))

# SPDX-License-Identifier: Apache-2.0
"""Evaluations by detail: the signal, the plan, its limits, the file it comes from, and the walk of a whole batch."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from rapid3rt.policies import ScheduleFamily, WarpFamily, load_schedule, save_schedule
from rapid3rt.policies.allocation import Allocation, Allocator, detail
from rapid3rt.types import DenoiseState

EVEN = ((1.0, 1.0), (28.0, 28.0))
ALLOCATION = Allocation(
    table=((0.0, -1.0, 0.5, 0.1), (0.5, -1.5, 0.4, 1.0), (1.0, -2.0, 0.2, 2.0)),
    dial=((5.0, 5.2), (8.0, 8.0), (14.0, 12.5)),
)
FAMILY = WarpFamily(
    family="sd3", num_ticks=28, shift=3.0, order=0, knots=((0.5, 0.4),), allocation=ALLOCATION
)


def state_of(latents: torch.Tensor, sigma: float, nfe: int, tick: int) -> DenoiseState:
    """Where a batch stands; only what an allocation looks at means anything."""
    n = len(latents)
    zero, no = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.bool)
    return DenoiseState(
        tick=tick,
        sigma=torch.full((n,), sigma),
        step=zero,
        nfe=zero + nfe,
        since_compute=zero,
        equivalent_steps=zero.float(),
        done=no,
        has_reference=no,
        latents=latents,
        reference=latents,
        drift=zero.float(),
        conditioning=torch.zeros(n, 8),
    )


def test_detail_is_the_gradient_energy_of_the_predicted_image() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    sigma = torch.tensor([1.0, 0.6, 0.1])
    mixed = clean + sigma[:, None, None, None] * (noise - clean)
    seen = detail(mixed, noise - clean, sigma)
    for image in range(3):
        total = 0.0
        for channel in clean[image].tolist():
            for r, row in enumerate(channel):
                total += sum((b - a) ** 2 for a, b in itertools.pairwise(row))
                if r:
                    total += sum((b - a) ** 2 for a, b in zip(channel[r - 1], row, strict=True))
        assert seen[image].item() == pytest.approx(math.log(total / 70), abs=1e-5)
    flat = detail(torch.ones(1, 4, 1, 6), torch.zeros(1, 4, 1, 6), torch.ones(1))
    assert flat.isfinite().all()
    half = detail(mixed.half(), (noise - clean).half(), sigma)
    torch.testing.assert_close(half, seen, atol=1e-2, rtol=0)


def test_the_dial_is_read_backwards_and_is_proportional_beyond_its_ends() -> None:
    assert ALLOCATION.setting(8.0) == 8.0
    assert ALLOCATION.setting(6.6) == pytest.approx(6.5)
    assert ALLOCATION.setting(2.6) == pytest.approx(2.5)
    assert ALLOCATION.setting(25.0) == pytest.approx(28.0)


def test_more_detail_gets_more_evaluations_within_the_limits(sim) -> None:
    even = replace(ALLOCATION, dial=EVEN)
    scale = torch.tensor([1e-6, 0.3, 1.0, 3.0, 1e6])[:, None, None, None]
    latents = scale * torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    allocator = Allocator(even, 6.0, sim.run(5))
    u, velocity = torch.full((5,), 0.5), torch.zeros(5, 4, 6, 6)

    def left(nfe: int, tick: int) -> list[float]:
        return allocator.left(state_of(latents, 0.5, nfe, tick), velocity, u).tolist()

    g = detail(latents, velocity, torch.zeros(5))
    planned = (6 * (0.4 * (g + 1.5)).exp()).clamp(4.8, 12)
    assert planned[0] == pytest.approx(4.8)
    assert planned[4] == 12
    assert left(0, 0) == left(3, 3) == (planned / 2 - 0.25).ceil().tolist()
    assert max(left(0, 25)) == 3  # ticks that are left
    # A run that begins at u = 0.5 has all of them before it there.
    allocator = Allocator(even, 6.0, sim.run(5), start=0.5)
    assert left(0, 0) == (planned - 0.25).ceil().tolist()
    allocator = Allocator(even, 1.0, sim.run(5))
    assert left(0, 0) == [1.0] * 5


@pytest.mark.parametrize(("guidance", "stronger"), [(7.0, 2.0), (1.75, 0.5), (0.0, 1 / 3.5)])
def test_what_guidance_lifts_everywhere_moves_no_evaluation(sim, guidance, stronger) -> None:
    """Were all details lifted by t ln(G / G0), everybody would get what it gets at G0."""
    measured = replace(ALLOCATION, dial=EVEN, guidance=3.5)
    latents = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    latents *= torch.logspace(-0.5, 0, 4)[:, None, None, None]
    u, velocity = torch.full((4,), 0.75), torch.zeros(4, 4, 6, 6)
    lift = math.exp(0.5 * 1.5 * math.log(stronger))  # of the amplitude; t(0.75) = 1.5 is of energy

    def left(scale: float, reach: float, allocation: Allocation = measured) -> list[float]:
        allocator = Allocator(allocation, 6.0, replace(sim.run(4), guidance=scale))
        return allocator.left(state_of(latents * reach, 0.5, 0, 0), velocity, u).tolist()

    expected = left(3.5, 1.0)
    assert len(set(expected)) > 1
    assert left(guidance, lift) == expected
    assert left(guidance, 1.0) != expected
    unknown = replace(measured, guidance=None)
    assert left(guidance, 1.0, unknown) == left(3.5, 1.0, unknown) == expected


def test_a_speed_gives_every_image_its_own_number_and_a_budget_the_same(sim) -> None:
    # Six images of one shape, from faint to strong.
    scale = torch.logspace(-0.5, 0.5, 6)[:, None, None, None]
    world, run = sim.world(6), sim.run(6)
    world = replace(world, spread=torch.ones(6), noise=scale * world.noise[:1])
    g = float(detail(world.noise, torch.zeros(6, 4, 6, 6), torch.ones(6)).mean())
    steep = Allocation(table=((0.0, g, 0.4, 0.0), (1.0, g, 0.4, 0.0)), dial=EVEN)
    family = replace(FAMILY, allocation=steep)
    walk = sim.drive(ScheduleFamily(family, speed=4.0), run, world)
    assert walk.nfe == sorted(walk.nfe)
    assert 2 <= walk.nfe[0] < 7 < walk.nfe[-1] <= 14
    for image in range(6):
        alone = sim.drive(ScheduleFamily(family, speed=4.0), sim.run(1), world.take([image]))
        assert alone.column("next_sigma", 0) == walk.column("next_sigma", image)
    capped = sim.drive(ScheduleFamily(family, budget=7), run, world)
    assert capped.nfe == [7] * 6
    assert sim.drive(ScheduleFamily(family, speed=4.0), sim.run(6, budget=5), world).nfe == [5] * 6
    plain = replace(family, allocation=None)
    assert sim.drive(ScheduleFamily(plain, speed=4.0), run, world).nfe == [7] * 6


def test_an_exponent_of_zero_walks_the_grid_of_the_family(sim) -> None:
    flat = replace(
        FAMILY, allocation=Allocation(table=((0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0)), dial=EVEN)
    )
    world, run = sim.world(2), sim.run(2)
    own = sim.drive(ScheduleFamily(flat, speed=4.0), run, world)
    same = sim.drive(ScheduleFamily(flat, budget=7), run, world)
    for image in range(2):
        torch.testing.assert_close(
            torch.tensor(own.column("sigma", image)),
            torch.tensor(same.column("sigma", image)),
            atol=2e-5,  # a table of 1025 points stands between u and sigma
            rtol=0,
        )


def test_a_file_keeps_the_allocation_and_one_from_before_has_none(tmp_path) -> None:
    save_schedule(FAMILY, tmp_path / "s.json")
    assert load_schedule(tmp_path / "s.json") == FAMILY
    document = json.loads((tmp_path / "s.json").read_text())
    del document["allocation"]
    (tmp_path / "s.json").write_text(json.dumps(document))
    assert load_schedule(tmp_path / "s.json") == replace(FAMILY, allocation=None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("table", [[0.5, 0.0, 1.0, 0.0]], "table must be at least two"),
        ("table", [[0.5, 0.0, 1.0, 0.0], [0.5, 0.0, 1.0, 0.0]], "u rising in 0..1"),
        ("table", [[0.5, 0.0, 1.0, 0.0], [1.5, 0.0, 1.0, 0.0]], "u rising in 0..1"),
        ("guidance", -1.0, "guidance must be"),
        ("guidance", "strong", "guidance must be"),
        ("table", [[0.5, 0.0], [1.0, 0.0]], r"table\[0\] must be 4 numbers"),
        (
            "table",
            [[0.5, 0.0, "x", 0.0], [1.0, 0.0, 1.0, 0.0]],
            r"table\[0\]\[2\] must be a number",
        ),
        ("dial", [[5.0, 5.0]], "dial must be at least two"),
        ("dial", [[5.0, 5.0], [6.0, 5.0]], "both rising"),
        ("dial", [[5.0, 0.5], [6.0, 5.0]], "evaluations from 1 on"),
        ("dial", 3, "dial must be a list"),
    ],
)
def test_a_wrong_field_of_an_allocation_is_named(field, value, message, tmp_path) -> None:
    save_schedule(FAMILY, tmp_path / "s.json")
    document = json.loads((tmp_path / "s.json").read_text())
    document["allocation"][field] = value
    (tmp_path / "s.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load_schedule(tmp_path / "s.json")

# SPDX-License-Identifier: Apache-2.0
"""The schedule search: its dynamic program, its model of errors, its moves, its climb, and all of it on a pipeline."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import rapid3rt
from rapid3rt.calibrate.measure import Bench
from rapid3rt.policies import load_schedule, save_schedule
from rapid3rt.policies.schedule import FixedPlan
from rapid3rt.runtime.solver import Solver
from rapid3rt.tiny.scenes import sample
from rapid3rt.types import ADAMS_BASHFORTH, AUTO, COMPUTE, EULER, REUSE, ActionCosts
from training.search import Settings, recording, run, search
from training.search.__main__ import main, read_prompts
from training.search.climb import Climber, Objective, climb, descend, is_better, probe
from training.search.dynamic_program import cheapest_walk
from training.search.error_model import NUM_BENDS, ErrorModel, Sample
from training.search.folder import claim
from training.search.lattice import (
    ORDERS,
    Lattice,
    Plan,
    Tick,
    bend,
    equivalent_steps,
    moves,
    neighbours,
)
from training.search.local_errors import LocalErrors
from training.search.recording import Recording

COSTS = ActionCosts(levels=(1.0, 0.9, 0.8), reuse=0.05, measured=True)
CALL = {"max_sequence_length": 32, "guidance_scale": 3.5}
PROMPTS = [scene.caption for scene in sample(4, 0, "calibration")]


# The dynamic program ------------------------------------------------------------------------------


def walks(size: int, max_ticks: int, reuse: bool) -> Iterator[tuple[tuple[int, bool], ...]]:
    """All walks from 0 with a compute there, whatever the number of computes."""
    for ticks in range(max_ticks):
        for points in itertools.combinations(range(1, size), ticks):
            for computes in itertools.product((True, False) if reuse else (True,), repeat=ticks):
                yield ((0, True), *zip(points, computes, strict=True))


def cost_of(
    walk: Sequence[tuple[int, bool]],
    first: torch.Tensor,
    compute: torch.Tensor,
    reuse: torch.Tensor | None,
) -> float:
    ends = [*(i for i, _ in walk[1:]), len(first) - 1]
    total, last = 0.0, -1
    for (i, computes), j in zip(walk, ends, strict=True):
        if last < 0:
            total += float(first[j])
        elif computes:
            total += float(compute[last, i, j])
        else:
            assert reuse is not None
            total += float(reuse[last, i, j])
        last = i if computes else last
    return total


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("with_reuse", [False, True])
def test_the_cheapest_walk_is_that_of_brute_force(seed: int, with_reuse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 6
    budget, max_ticks = 1 + seed % 4, 4 + seed % 3
    first = torch.rand(size + 1, generator=generator, dtype=torch.float64)
    compute = torch.rand(size, size, size + 1, generator=generator, dtype=torch.float64)
    h, i, j = torch.meshgrid(*(torch.arange(n) for n in compute.shape), indexing="ij")
    compute[~((h < i) & (i < j))] = math.inf
    compute[:, size - 1 :] = math.inf  # nobody may compute there
    first[0] = math.inf
    # Reuse is so cheap that only the limit on ticks and its impossibility before a compute hold it back.
    reuse = compute * 0.01 if with_reuse else None
    allowed = torch.rand(budget, size, generator=generator) < 0.8
    found = cheapest_walk(first, compute, reuse, allowed, max_ticks)
    exact = [
        walk
        for walk in walks(size, max_ticks, with_reuse)
        if sum(computes for _, computes in walk) == budget
        and all(
            allowed[c, i] for c, i in enumerate([i for i, computes in walk if computes]) if c > 0
        )
    ]
    best = min(cost_of(walk, first, compute, reuse) for walk in exact)
    assert cost_of(found, first, compute, reuse) == pytest.approx(best, rel=1e-12)
    assert tuple(found) in exact


def test_a_walk_that_cannot_be_is_refused() -> None:
    nothing = torch.full((3, 3, 4), math.inf, dtype=torch.float64)
    first = torch.ones(4, dtype=torch.float64)
    allowed = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="budget must leave a walk of at most 5 ticks, got 2"):
        cheapest_walk(first, nothing, None, allowed, 5)
    with pytest.raises(ValueError, match="of at most 1 ticks, got 2 computes"):
        cheapest_walk(first, torch.zeros_like(nothing), None, allowed, 1)


# Local errors and the model -----------------------------------------------------------------------

LATTICE = Lattice(
    sigmas=(1.0, 0.95, 0.9, 0.8, 0.7, 0.55, 0.4, 0.2, 0.01, 0.0),
    budget=3,
    max_ticks=5,
    levels=(1, 2),
    reuse=True,
)
PAIRS, ELEMENTS = 3, 40


def trajectory(lattice: Lattice) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `[M + 1, P, D]` and velocities `[M, P, D]`, neither along a straight line."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(4, PAIRS, ELEMENTS, generator=generator, dtype=torch.float64)
    s = torch.tensor(lattice.sigmas, dtype=torch.float64).view(-1, 1, 1)
    x = base[0] + s * base[1] + s**2 * base[2] + 0.3 * (4 * s).sin() * base[3]
    v = base[1] + 2 * s * base[2] + 1.2 * (4 * s).cos() * base[3]
    return x, v[:-1]


def recorded(lattice: Lattice) -> Recording:
    x, v = trajectory(lattice)
    stack = torch.cat([x, v]).transpose(0, 1)
    generator = torch.Generator().manual_seed(7)
    points = len(range(0, lattice.end, recording.stride(lattice.end)))
    return Recording(
        gram=stack @ stack.transpose(1, 2) / ELEMENTS,
        levels=torch.rand(PAIRS, 2, (points + 1) // 2, generator=generator, dtype=torch.float64),
        reuse=torch.rand(PAIRS, points, recording.WINDOW, generator=generator, dtype=torch.float64),
    )


def local_errors(lattice: Lattice = LATTICE) -> LocalErrors:
    return LocalErrors(
        lattice, recorded(lattice), torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "walk", [(0, 1, 2, 3), (1, 3, 5, 7), (0, 2, 4, 9), (0, 0, 4, 6), (2, 4, 6, 9)]
)
def test_local_errors_are_those_of_the_solver(order: int, walk: tuple[int, ...]) -> None:
    """From points g, h, i, where g mirrors i at h or is missing, to j."""
    x, v = trajectory(LATTICE)
    solver = Solver.start(PAIRS, torch.device("cpu"))
    at = lambda i: torch.full((PAIRS,), LATTICE.sigmas[i], dtype=torch.float64)  # noqa: E731
    path = walk[1:] if walk[0] == walk[1] else walk
    for i, j in itertools.pairwise(path):
        orders, computes = torch.full((PAIRS,), order), torch.ones(PAIRS, dtype=torch.bool)
        moved = solver.step(x[i], v[i], at(i), at(j), orders, computes)
    exact = (moved - x[path[-1]]).square().mean(1)
    h, i, j = (torch.tensor([n]) for n in walk[-3:])
    found = local_errors().compute(h, i, j, order)
    wanted = (exact * torch.tensor([0.5, 1.0, 1.5])).mean()
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_sparse_and_stale_velocities_are_interpolated() -> None:
    local, records = local_errors(), recorded(LATTICE)
    weights = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    level = (weights[:, None] * records.levels[:, 1]).mean(0)
    s, i, j = LATTICE.sigmas, torch.tensor([2, 3, 8]), torch.tensor([4, 9, 9])
    assert local.sparse(i, j, 0).tolist() == [0.0] * 3
    s, i, j = LATTICE.sigmas, torch.tensor([2, 3, 8]), torch.tensor([4, 9, 9])
    assert local.sparse(i, j, 0).tolist() == [0.0] * 3
    # Levels were measured at every second point; between them the mean of both neighbours, 6 times the image at most.
    expected = [
        (s[2] - s[4]) ** 2 / (1 - s[4]) ** 2 * level[1],
        s[3] ** 2 * (level[1] + level[2]) / 2,
        s[8] ** 2 * level[4],
    ]
    assert local.sparse(i, j, 2).tolist() == pytest.approx([float(e) for e in expected])
    # The residual of point 1 reused at 2, then at 3: a root error of its own each time, both in the same direction.
    root = (weights[:, None, None] * records.reuse).mean(0).sqrt()[1]
    once, twice = (s[2] - s[3]) * root[0], (s[3] - s[5]) * root[1]
    h, i, j = torch.tensor([1, 1]), torch.tensor([2, 3]), torch.tensor([3, 5])
    shows = [1 / (1 - s[3]) ** 2, 1 / (1 - s[5]) ** 2]
    assert local.reuse(h, i, j).tolist() == pytest.approx(
        [float(shows[0] * once**2), float(shows[1] * ((once + twice) ** 2 - once**2))]
    )
    assert local.content(torch.tensor([0, 1, 9])).tolist() == pytest.approx([36.0, 36.0, 1.0])


def all_plans(lattice: Lattice, orders: Sequence[int]) -> Iterator[Plan]:
    for walk in walks(lattice.end, lattice.max_ticks, lattice.reuse):
        choices = []
        for n, (at, computes) in enumerate(walk):
            if not computes:
                choices.append([Tick(at=at, action=REUSE, order=EULER)])
            else:
                kinds = itertools.product((0, *lattice.levels), orders if n else (AUTO,))
                choices.append([Tick(at=at, level=x, order=o) for x, o in kinds])
        yield from (p for p in itertools.product(*choices) if lattice.is_valid(p))


@pytest.mark.parametrize("price", [0.0, 0.02, 5.0])
def test_the_best_plan_is_the_one_predicted_to_be_best(price: float) -> None:
    lattice = Lattice(
        sigmas=(1.0, 0.9, 0.75, 0.5, 0.3, 0.015, 0.0),
        budget=3,
        max_ticks=4,
        levels=(1, 2),
        reuse=True,
    )
    model = ErrorModel(local_errors(lattice), COSTS)
    model.amplification = torch.linspace(2, 0, NUM_BENDS + 2, dtype=torch.float64) ** 2
    orders = (AUTO, EULER)

    def total(plan: Plan) -> float:
        return model.predict(plan) + price * equivalent_steps(plan, COSTS)

    found = model.best_plan(lattice.even(), lattice.end, orders, price)
    assert lattice.is_valid(found)
    best = min(total(plan) for plan in all_plans(lattice, orders))
    assert total(found) == pytest.approx(best, rel=1e-9)
    assert (any(tick.level for tick in found)) == (price == 5.0) or price == 0.02
    near = model.best_plan(lattice.even(), 0, orders, None)
    assert [(t.at, t.action, t.level) for t in near] == [(t.at, COMPUTE, 0) for t in lattice.even()]


def test_the_amplification_is_fitted_and_explosions_are_left_out() -> None:
    lattice = Lattice(sigmas=tuple(1 - i / 24 for i in range(25)), budget=4, max_ticks=6)
    records = Recording(
        gram=recorded(lattice).gram, levels=torch.empty(PAIRS, 0, 0), reuse=torch.empty(PAIRS, 0, 6)
    )
    model = ErrorModel(LocalErrors(lattice, records, torch.ones(PAIRS, dtype=torch.float64)), COSTS)
    plans = neighbours(lattice.even(), lattice, bend, random.Random(0), [], 40)
    truth = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.8, 0.6, 0.5, 1, 1], dtype=torch.float64)
    samples = [Sample(plan=p, error=float(model.features(p) @ truth)) for p in plans]
    fitted, tested = samples[:30], samples[30:]
    model.fit([*fitted, Sample(plan=lattice.even(), error=1e9)])
    for s in tested:
        assert model.predict(s.plan) == pytest.approx(s.error, rel=0.05)
    assert bool((model.amplification > 0).all())
    model.fit(fitted[:1])  # one measurement gives a common level
    assert model.predict(fitted[0].plan) == pytest.approx(fitted[0].error, rel=0.02)


# Plans and moves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        (),
        (Tick(at=0), Tick(at=3)),  # too few computes
        (Tick(at=0), Tick(at=3), Tick(at=5), Tick(at=6)),  # too many
        (Tick(at=1), Tick(at=3), Tick(at=5)),  # starts late
        (Tick(at=0), Tick(at=5), Tick(at=5)),  # stands still
        (Tick(at=0), Tick(at=5), Tick(at=3)),  # rises
        (Tick(at=0), Tick(at=3), Tick(at=8)),  # a last interval from sigma 0.01
        (Tick(at=0, action=REUSE), Tick(at=1), Tick(at=3), Tick(at=5)),
        (Tick(at=0), Tick(at=1), *(Tick(at=i, action=REUSE) for i in (2, 3, 4)), Tick(at=5)),
    ],
)
def test_wrong_plans_are_told(plan: Plan) -> None:
    assert not LATTICE.is_valid(plan)
    assert LATTICE.is_valid(LATTICE.even())


@pytest.mark.parametrize("budget", [2, 3, 8])
def test_moves_keep_plans_valid_and_files_loadable(budget: int, tmp_path: Path) -> None:
    sigmas = torch.linspace(1, 0, 25).tolist()
    lattice = Lattice(sigmas=tuple(sigmas), budget=budget, max_ticks=10, levels=(1, 3), reuse=True)
    rng, plan, kinds = random.Random(budget), lattice.even(), moves(lattice)
    met: set[tuple[int, int, int]] = set()
    for _ in range(300):
        near = neighbours(plan, lattice, rng.choice(kinds), rng, [], 3)
        assert plan not in near
        assert len(set(near)) == len(near)
        assert all(lattice.is_valid(p) for p in near)
        plan = rng.choice(near) if near else plan
        met |= {(t.action, t.level, t.order) for t in plan}
        assert plan[0].order == AUTO
    assert {x for _, x, _ in met} == {0, 1, 3}
    assert {o for _, _, o in met} == {AUTO, EULER, ADAMS_BASHFORTH}
    assert {(REUSE, 0, EULER)} == {m for m in met if m[0] == REUSE}
    save_schedule(lattice.schedule(plan, "sd3", {"why": 1}), tmp_path / "plan.json")
    loaded = load_schedule(tmp_path / "plan.json")
    assert isinstance(loaded, FixedPlan)
    assert sum(t.action == COMPUTE for t in loaded.ticks) == budget
    assert lattice.name(plan).count(" ") == len(plan) - 1
    assert neighbours(plan, lattice, kinds[0], rng, [], 3) != []


def test_kinds_that_are_not_allowed_are_not_tried() -> None:
    bare = Lattice(sigmas=LATTICE.sigmas, budget=3, max_ticks=5)
    assert len(moves(bare)) == 3
    assert len(moves(LATTICE)) == 5
    one = Lattice(sigmas=LATTICE.sigmas, budget=1, max_ticks=1)
    assert all(
        neighbours(one.even(), one, kind, random.Random(0), [], 4) == [] for kind in moves(one)
    )


def test_equivalent_steps_are_the_sum_of_costs() -> None:
    plan = (Tick(at=0), Tick(at=2, level=2), Tick(at=3, action=REUSE), Tick(at=5, level=1))
    assert equivalent_steps(plan, COSTS) == pytest.approx(1 + 0.8 + 0.05 + 0.9)


# The climb ----------------------------------------------------------------------------------------


def test_better_means_surely_and_the_root_breaks_ties() -> None:
    old = torch.full((64,), 1e-3, dtype=torch.float64)
    assert is_better(old * 0.99, old)
    assert not is_better(old, old)
    assert not is_better(old * 1.01, old)
    assert not is_better(old * math.nan, old)

    def some(hard: float, number: int, easy: float) -> torch.Tensor:
        return torch.cat([old[:number] * hard, old[number:] * easy])

    # One image no longer flips, all others are worse: a third of the redraws do not have it.
    assert not is_better(some(1, 1, 1.3), some(60, 1, 1))
    # The hardest image rises about as much as all others fall: the root says that they do fall.
    assert is_better(some(33, 1, 0.9), some(30, 1, 1))
    # Many hard images improve and the others surely pay for it.
    assert some(50, 8, 3).mean() < 0.7 * some(100, 8, 1).mean()
    assert not is_better(some(50, 8, 3), some(100, 8, 1))
    assert is_better(some(50, 8, 1.5), some(100, 8, 1))
    assert is_better(old[:1] * 0.5, old[:1])


class Synthetic(Objective):
    """Errors by a formula: the best plan has its ticks at some places, at order 2."""

    def __init__(self, lattice: Lattice, target: Sequence[int]) -> None:
        super().__init__(None, lattice, COSTS, 2.0, [0, 1], [2, 3, 4])  # type: ignore[arg-type]
        self.target = target

    def errors(self, plan: Plan, pairs: Sequence[int]) -> torch.Tensor:
        self.spent += self.lattice.budget * len(pairs)
        at = [tick.at for tick in plan if tick.action == COMPUTE]
        miss = sum((a - b) ** 2 for a, b in zip(at, self.target, strict=True))
        orders = sum(tick.order != ADAMS_BASHFORTH for tick in plan[1:])
        extra = sum(1 + 3 * tick.level + (tick.action == REUSE) for tick in plan)
        hard = torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0], dtype=torch.float64)[list(pairs)]
        return hard * (1 + miss + orders + extra)


def climber_for(limit: int, target: Sequence[int]) -> tuple[Climber, ErrorModel]:
    sigmas = (*(1 - i / 24 for i in range(24)), 0.0)
    lattice = Lattice(sigmas=sigmas, budget=3, max_ticks=6, levels=(1, 2), reuse=True)
    model = ErrorModel(local_errors(lattice), COSTS)
    objective = Synthetic(lattice, target)
    start = lattice.even()
    few, rest = objective.errors(start, [0, 1]), objective.errors(start, [2, 3, 4])
    weights = torch.ones(2, dtype=torch.float64)
    return Climber(
        objective=objective, best=start, few=few, rest=rest, weights=weights, limit=limit
    ), model


def test_climbing_finds_a_better_plan_within_its_means() -> None:
    climber, model = climber_for(3000, (0, 5, 12))
    start = float(climber.seen().mean())
    probe(climber, 0, 6)
    assert len(climber.samples) == 7
    descend(climber, model)
    climb(climber, model, 0)
    assert climber.lattice.is_valid(climber.best)
    assert climber.seen().mean() < 0.3 * start
    assert [t.at for t in climber.best if t.action == COMPUTE] == [0, 5, 12]
    assert climber.objective.spent <= 3000
    assert len(set(climber.tried)) == len(climber.tried)
    assert climber.accepted > 0


def test_a_climb_is_the_same_every_time_and_a_longer_one_goes_on_with_it() -> None:
    def tried(limit: int) -> list[Plan]:
        climber, model = climber_for(limit, (0, 6, 13))
        probe(climber, 3, 4)
        climb(climber, model, 3)
        return climber.tried

    short, long = tried(150), tried(300)
    assert tried(150) == short
    assert long[: len(short)] == short
    assert len(long) > len(short)


def test_a_cheaper_plan_may_err_a_little_more() -> None:
    climber, _ = climber_for(6000, (0, 8, 16))
    dense = climber.lattice.even()
    sparse = tuple(Tick(at=t.at, level=2) for t in dense)
    assert climber.objective.factor(dense) == 1
    assert climber.objective.factor(sparse) == pytest.approx(0.8**2)
    climber.few, climber.rest = climber.few * 0 + 10.0, climber.rest * 0 + 10.0
    assert not climber._beats(sparse, climber.few * 1.6)
    climber.objective.errors = lambda plan, pairs: climber.rest * 1.5  # type: ignore[method-assign]
    assert climber._beats(sparse, climber.few * 1.5)


# Folders, arguments, pipelines --------------------------------------------------------------------


def test_a_folder_belongs_to_one_search(tmp_path: Path) -> None:
    wanted = {"budget": 6, "model": "a", "reuse": True}
    claim(tmp_path, wanted)
    claim(tmp_path, wanted)
    with pytest.raises(ValueError, match="budget must be 7, as asked for now, got 6 of another"):
        claim(tmp_path, {**wanted, "budget": 7})
    with pytest.raises(ValueError, match="seed must be 0, as asked for now, got None"):
        claim(tmp_path, {**wanted, "seed": 0})
    (tmp_path / "search.json").write_text("[1]")
    with pytest.raises(ValueError, match="budget must be 6"):
        claim(tmp_path, wanted)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(ValueError, match=r"search\.json must be the settings of a search"):
        claim(tmp_path, wanted)


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\n  two\u2028squares \n".encode())
    assert read_prompts(file) == ["a red circle", "two\u2028squares"]
    for content in (b"", b" \n\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="--prompts must hold at least one prompt, got an emp"):
            read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="--prompts must be a text file in UTF-8"):
        read_prompts(file)
    with pytest.raises(ValueError, match="--prompts must be a text file in UTF-8"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-sd3", "--budget", "1"], "budget must be 2 to 28"),
        (["tiny-sd3", "--budget", "29"], "budget must be 2 to 28"),
        (["tiny-sd3", "--budget", "0"], "budget must be an integer of at least 1, got 0"),
        (["tiny-sd3", "--budget", "6", "--batch-size", "0"], "batch_size must be an integer"),
        (["tiny-sd3", "--budget", "6", "--evaluations", "-1"], "evaluations must be an integer"),
        (["tiny-sd3", "--budget", "6", "--threads", "-1"], "threads must be at least 0, got -1"),
        (["tiny-sd3", "--budget", "6", "--guidance", "nan"], "guidance must be a finite number"),
        (["tiny-sd3", "--budget", "6", "--guidance", "-3"], "guidance must be a finite number"),
        (["tiny-sd1", "--budget", "6"], "model must be one of tiny-flux, tiny-sd3, or a folder"),
        (
            ["/none", "--budget", "6", "--prompts", __file__],
            "model must be a bundled one, a folder",
        ),
        (["sd3", "--budget", "6"], "--prompts must be given for a model other than tiny-"),
        (["tiny-sd3", "--budget", "6", "--prompts", "none.txt"], "--prompts must be a text file"),
        (["tiny-flux", "--budget", "6", "--policy", "none"], "policy must be a folder with a conf"),
    ],
)
def test_bad_commands_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", "plan.json"])
    assert str(stopped.value).startswith("error: ")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("training.search.__main__"), "search", stopped)
    with pytest.raises(SystemExit) as left:
        main(["tiny-flux", "--budget", "6", "--out", str(tmp_path / "plan.json")])
    assert left.value.code == 130
    told = capsys.readouterr().err
    assert told == "search: stopped; the same command goes on with what it has measured\n"


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = rapid3rt.load_tiny("flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # Modules behind a function of the same package.
    for module in ("measure", "fitting"):
        there = importlib.import_module(f"rapid3rt.calibrate.{module}")
        monkeypatch.setattr(there, "REFERENCE_STEPS", 8)
    monkeypatch.setattr(run, "FINENESS", 8)
    monkeypatch.setattr(run, "NUM_PROBES", 3)


def small(out: Path, pipe: Any, **changes: Any) -> FixedPlan:
    settings = Settings(budget=4, steps=8, evaluations=220)
    settings = Settings(**{**{n: getattr(settings, n) for n in settings.__slots__}, **changes})
    return search(pipe, PROMPTS, out, settings, call=CALL, progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_detours_return_to_the_recorded_trajectory(pipe: Any, tmp_path: Path) -> None:
    sigmas = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0)
    lattice = Lattice(sigmas=sigmas, budget=4, max_ticks=8, levels=(2,), reuse=True)
    bench = Bench(pipe, PROMPTS[:2], tmp_path, 8, 0, 2, dict(CALL), False)
    truth: dict[int, torch.Tensor] = {}

    def keep(_pipe: Any, tick: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        truth[tick + 1] = values["latents"].clone()
        return values

    walk = recording._run(bench, lattice, [0, 1], recording._walk(lattice), keep)
    assert len(walk.latents) == len(sigmas)
    script = recording._detours(lattice)[2]
    back = recording._put_back(truth, script)
    detour = recording._run(bench, lattice, [0, 1], script, back)
    for visit, v in zip(script, detour.velocities, strict=True):
        miss = (v - walk.velocities[visit.at]).abs().max() / walk.velocities[visit.at].abs().max()
        assert (miss < 1e-5) == (visit.action == COMPUTE)
    records = recording.record(bench, lattice, [0, 1])
    x, v = walk.latents[3].flatten(1), walk.velocities[3].flatten(1)
    gram = records.gram[:, len(sigmas) + 3, 3]
    torch.testing.assert_close(gram, (x.double() * v.double()).mean(1), rtol=1e-5, atol=1e-8)
    assert bool((records.reuse > 0).all())
    assert bool((records.levels > 0).all())
    assert recording.cost(lattice) == 8 + 4 + 8 + 6  # walk, levels, residuals, forced first ones
    again = recording.record(bench, lattice, [0, 1])
    assert torch.equal(again.gram, records.gram)


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_a_search_resumes_to_the_same_file(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small(tmp_path / "whole.json", pipe)
    assert sum(tick.action == COMPUTE for tick in whole.ticks) == 4
    facts = whole.provenance
    stages, seen = facts["seen_after"], facts["seen"]["mean_squared"]
    assert list(stages) == ["family", "probes", "dynamic programming", "climbing", "fit"]
    # The bundled family steps by weights, which the search begins without.
    assert stages["family"] != pytest.approx(seen["family"])
    assert stages["fit"] == pytest.approx(seen["searched"])
    assert facts["fitted"] == any(tick.weights for tick in whole.ticks)
    assert seen["searched"] != seen["family"]
    assert facts["seen"]["pairs"] == facts["unseen"]["pairs"] == 2
    assert facts["evaluations"]["climbing"] > 0
    spent = sum(n for name, n in facts["evaluations"].items() if name != "references")
    assert 220 - 4 * 2 < spent <= 220
    remember, left = Bench.remember, 0

    def interrupted(self: Bench, key: str, make: Any) -> Any:
        nonlocal left
        if key not in self.values:
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return remember(self, key, make)

    monkeypatch.setattr(Bench, "remember", interrupted)
    for steps in (0, 2, 1, 5, 9):
        left = steps
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "parts.json", pipe)
        assert not (tmp_path / "parts.json").exists()
    monkeypatch.undo()
    for module in ("measure", "fitting"):
        importlib.import_module(f"rapid3rt.calibrate.{module}").REFERENCE_STEPS = 8  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "FINENESS", 8)
    monkeypatch.setattr(run, "NUM_PROBES", 3)
    small(tmp_path / "parts.json", pipe)
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("_quick")
def test_what_was_found_runs_and_other_searches_are_refused(pipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    with pytest.raises(ValueError, match=r"evaluations must be at least \d+ here"):
        small(tmp_path / "other.json", pipe, evaluations=30)
    with pytest.raises(ValueError, match=r"evaluations must be at least \d+ here"):
        small(tmp_path / "other.json", pipe, evaluations=30, seed=1)  # nobody's folder yet
    plan = small(out, pipe, levels=False, reuse=False, evaluations=130, seed=1)
    assert all(tick.action == COMPUTE and tick.level == 0 for tick in plan.ticks)
    assert plan.provenance["cost_factor"] == 1
    rapid3rt.accelerate(pipe, policy=f"schedule:{out}")
    try:
        pipe(PROMPTS[:1], num_inference_steps=8, **CALL)
        assert [image.nfe for image in rapid3rt.report(pipe).images] == [4]
    finally:
        rapid3rt.restore(pipe)
    with pytest.raises(ValueError, match="seed must be 2, as asked for now, got 1"):
        small(out, pipe, levels=False, reuse=False, seed=2)
    more = small(out, pipe, levels=False, reuse=False, evaluations=170, seed=1)
    assert more.provenance["evaluations"]["climbing"] > plan.provenance["evaluations"]["climbing"]
    assert json.loads(out.read_text())["provenance"]["command"]["evaluations"] == 170

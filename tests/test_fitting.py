# SPDX-License-Identifier: Apache-2.0
"""Fitting the weights of steps: walks go where the runtime goes, restarts where walks passed, the Jacobian is right."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rapid3rt
from rapid3rt.calibrate.fitting import FIT_STEPS, NODES, longest_run
from rapid3rt.calibrate.measure import Bench
from rapid3rt.policies import ScheduleFamily, WarpFamily
from rapid3rt.policies.fitted import Fit
from rapid3rt.tiny.scenes import sample
from rapid3rt.types import AUTO, NUM_WEIGHTS

fitting = importlib.import_module("rapid3rt.calibrate.fitting")
PROMPTS = [scene.caption for scene in sample(4, 0, "calibration")]
K = 4


@pytest.fixture(scope="module", params=["sd3", "flux"])
def bench(request: Any, tmp_path_factory: Any) -> Bench:
    pipe = rapid3rt.load_tiny(request.param)
    pipe.set_progress_bar_config(disable=True)
    out = tmp_path_factory.mktemp("bench")
    call = {"max_sequence_length": 32, "guidance_scale": 1.0}
    return Bench(pipe, PROMPTS, out, 8, 0, 2, call, False)


@pytest.fixture(scope="module")
def family(bench: Bench) -> WarpFamily:
    return WarpFamily(
        family=bench.family_name,
        num_ticks=8,
        shift=bench.shift,
        order=AUTO,
        knots=((0.3, 0.2), (0.6, 0.65)),
    )


def some_rows() -> torch.Tensor:
    rows = 0.05 * torch.randn(K, NUM_WEIGHTS, generator=torch.Generator().manual_seed(1))
    rows[:, 2] += 0.2
    return rows.double()


def walked(bench: Bench, family: WarpFamily, rows: torch.Tensor) -> Any:
    walk = fitting._Walk(fitting.family_grid(family, K), rows.expand(2, -1, -1))
    fitting._run(bench, walk, range(2))
    return walk


def test_a_walk_ends_where_the_runtime_does_with_these_weights(
    bench: Bench, family: WarpFamily
) -> None:
    rows = some_rows()
    fit = fitting._fit_of(bench, {K: tuple(map(tuple, rows.tolist()))})
    assert fit.tokens == 256
    policy = ScheduleFamily(replace(family, fit=fit), budget=K)
    with fitting.accelerated(bench.pipe, policy):
        expected = bench.generate(range(2), 8, output_type="latent")
        ticks = rapid3rt.report(bench.pipe).trace.images[0]
        assert len(ticks) == K
        assert ticks[1].weights == tuple(rows[1].float().tolist())
    assert torch.equal(walked(bench, family, rows).end(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("j", range(K))
def test_a_walk_begins_again_where_another_passed(bench: Bench, family: WarpFamily, j: int) -> None:
    walk, other = walked(bench, family, some_rows()), some_rows()
    other[j:] += 0.1
    tail = walk.again(j, torch.stack([some_rows(), other]))
    if tail.start < K:
        fitting._run(bench, tail, [0, 1, 0, 1])
    same, changed = tail.end().split(2)
    torch.testing.assert_close(same, walk.end(), atol=2e-4, rtol=1e-4)
    expected = walked(bench, family, other).end()
    torch.testing.assert_close(changed, expected, atol=2e-4, rtol=1e-4)
    assert not torch.equal(changed, walk.end())


@pytest.mark.slow
@pytest.mark.parametrize("bench", ["flux"], indirect=True)
def test_the_normal_equations_are_those_of_whole_runs(bench: Bench, family: WarpFamily) -> None:
    unknowns, rows, target = fitting.Unknowns.of(K), some_rows(), torch.zeros(())
    end = walked(bench, family, rows).end()
    target = end + torch.randn(end.shape, generator=torch.Generator().manual_seed(2))
    gram, slope, errors = fitting.normal_equations(
        bench, fitting.family_grid(family, K), unknowns, rows, range(2), target
    )
    columns = []
    for node, w in unknowns.live:
        moved = rows.clone()
        moved[node, w] += fitting._DISTURBANCE
        columns.append((walked(bench, family, moved).end() - end) / fitting._DISTURBANCE)
    jacobian = torch.stack(columns, 1).flatten(2).double()
    expected = jacobian @ jacobian.mT / end[0].numel()
    torch.testing.assert_close(gram, expected, atol=1e-4, rtol=1e-3)
    miss = (end - target).flatten(1).double()
    torch.testing.assert_close(errors, miss.square().mean(1), atol=1e-4, rtol=1e-3)
    expected = (jacobian @ miss[..., None])[..., 0] / end[0].numel()
    torch.testing.assert_close(slope, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bench", ["flux"], indirect=True)
def test_a_fit_goes_on_where_it_was_and_is_kept_only_where_it_helps(
    bench: Bench, family: WarpFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FIT_STEPS", (3, 5)), ("REFERENCE_STEPS", 12)):
        monkeypatch.setattr(fitting, name, value)
    measure = importlib.import_module("rapid3rt.calibrate.measure")
    monkeypatch.setattr(measure, "REFERENCE_STEPS", 12)
    found = fitting.fit(bench, family)
    generate = Bench.generate
    monkeypatch.setattr(Bench, "generate", lambda *a, **k: pytest.fail("evaluated again"))
    assert fitting.fit(bench, family) == found
    monkeypatch.setattr(Bench, "generate", generate)
    for k, rows in () if found is None else found.weights:
        alone = replace(family, fit=Fit(weights=((k, rows),), tokens=256, guidance=found.guidance))
        errors = [bench.family_errors(f, k, pairs=range(2, 4)) for f in (alone, family)]
        assert errors[0].sqrt().mean() < errors[1].sqrt().mean()


def test_nothing_is_fitted_to_a_single_prompt(tmp_path: Path) -> None:
    pipe = rapid3rt.load_tiny("sd3")
    single = Bench(pipe, PROMPTS[:1], tmp_path, 8, 0, 2, {"max_sequence_length": 32}, False)
    family = WarpFamily(family="sd3", num_ticks=8, shift=5.0, order=AUTO, knots=())
    assert fitting.fit(single, family) is None


@pytest.mark.parametrize("k", [*range(1, 10), *FIT_STEPS, 28])
def test_unknowns(k: int) -> None:
    unknowns = fitting.Unknowns.of(k)
    assert unknowns.hats.shape == (k, len(unknowns.nodes))
    assert len(unknowns.nodes) == min(k, NODES)
    assert torch.equal(unknowns.hats.sum(1), torch.ones(k, dtype=torch.float64))
    for i, node in enumerate(unknowns.nodes):
        assert unknowns.hats[node, i] == 1
        assert unknowns.first_step(i) == (unknowns.nodes[i - 1] + 1 if i else 0)
    # v and x are always there, v - v' from the second evaluation on, v' - v'' from the third.
    count = [sum(n == i for n, _ in unknowns.live) for i in range(len(unknowns.nodes))]
    assert count == [2, 3, 4, 4, 4, 4, 4, 4][: len(count)]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ((), []),
        ((4, 5, 6, 8, 10), [4, 5, 6, 8, 10]),
        ((4, 6, 8, 10), [6, 8, 10]),
        ((4, 5, 8, 10), [4, 5]),
        ((5,), [5]),
    ],
)
def test_the_longest_run(kept: tuple[int, ...], expected: list[int]) -> None:
    assert longest_run(kept, (4, 5, 6, 8, 10)) == expected

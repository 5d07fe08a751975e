# SPDX-License-Identifier: Apache-2.0
"""Caches of others as rivals: what a call really did, one image at a time, and a pipeline left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rapid3rt
from training import protocol, ways
from training.peers import Peer, Setting, Work, find_peers
from training.protocol import Protocol, Settings
from training.runs import Runs

NEVER = Setting(steps=4, warm_up=4, reach=0.0)
GREEDY = Setting(steps=6, warm_up=2, reach=1000.0)


def load(name: str) -> Any:
    pipe = rapid3rt.load_tiny(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def flux() -> Any:
    return load("flux")


def make(pipe: Any, store: Path) -> Runs:
    return Runs(pipe, 3, split="test", seed=0, guidance=3.5, tokens=32, store=store)


class TwoLayers(nn.Module):
    """The second one is left out from the second forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.first(x)
        return self.second(x) if self.calls == 1 else x


def test_work_is_what_linear_layers_multiplied() -> None:
    work, model = Work(), TwoLayers()
    hooks = work.watch(model)
    for _ in range(3):
        model(torch.zeros(5, 4))
    for hook in hooks:
        hook.remove()
    model(torch.zeros(5, 4))
    assert work.forwards == [5 * (4 * 8 + 8 * 8), 5 * 4 * 8, 5 * 4 * 8]
    counts, cost = work.spent()
    assert counts.tolist() == [[2, 1]]
    assert cost.item() == pytest.approx(1 + 2 / 3)


@pytest.mark.parametrize("name", ["cache-dit", "FirstBlockCache", "TaylorSeer"])
def test_a_cache_of_others_leaves_the_pipeline_as_it_was(
    flux: Any, tmp_path: Path, name: str
) -> None:
    found = find_peers(flux.transformer)
    if name not in found:
        pytest.skip(f"{name} is not installed")
    peer = found[name]
    before = make(flux, tmp_path / "before").outcome(ways.plain(6), 2)
    modules = {n: set(vars(module)) for n, module in flux.transformer.named_modules()}
    runs = make(flux, tmp_path / "peer")
    reach = 3.0 if name == "TaylorSeer" else GREEDY.reach
    greedy = runs.outcome(ways.cached(peer, replace(GREEDY, reach=reach), 4), 2)
    after = make(flux, tmp_path / "after").outcome(ways.plain(6), 2)
    left = {n: set(vars(module)) for n, module in flux.transformer.named_modules()}
    assert list(left) == list(modules)
    if name == "cache-dit":
        assert left == modules
    assert torch.equal(before.images, after.images)
    assert not torch.equal(before.images, greedy.images)
    assert (greedy.cost < 6).all()
    assert (greedy.cost > 1).all()
    assert not greedy.dense.any()
    assert (greedy.nfe < 6).all()


@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_one_that_may_reuse_nothing_is_the_plain_pipeline(tmp_path: Path, model: str) -> None:
    """Its images may differ by what a batch of one differs from a batch."""
    pipe = load(model)
    peer = find_peers(pipe.transformer).get("cache-dit")
    if peer is None:
        pytest.skip("cache-dit is not installed")
    runs = make(pipe, tmp_path)
    plain, never = (runs.outcome(way, 2) for way in (ways.plain(4), ways.cached(peer, NEVER, 4)))
    assert never.cost.tolist() == never.nfe.tolist() == [4, 4]
    assert never.dense.all()
    assert (plain.images - never.images).abs().max() < 1e-3


def test_an_image_does_not_depend_on_its_neighbours(flux: Any, tmp_path: Path) -> None:
    """Every image has a call of its own: the third one is what it is alone."""
    peer = find_peers(flux.transformer)["FirstBlockCache"]
    way = ways.cached(peer, replace(GREEDY, reach=0.3), 4)
    runs = make(flux, tmp_path)
    whole = runs.outcome(way, 3)
    (image, counts, cost), trace = runs._call(way, [2])
    assert trace is None
    assert torch.allclose(2 * image - 1, whole.images[2:], atol=1e-4)
    assert cost.item() == whole.cost[2].item()
    assert counts.sum().item() == GREEDY.steps


def test_only_what_runs_with_a_model_is_found() -> None:
    assert not {"FirstBlockCache", "TaylorSeer"} & set(find_peers(load("sd3").transformer))
    assert {"FirstBlockCache", "TaylorSeer"} <= set(find_peers(load("flux").transformer))


def test_for_a_dial_the_best_that_costs_no_more_is_taken() -> None:
    """(steps, error): 7 costs 7 with error 3, 10 costs 10 with error 1, 14 costs 14 with error 2."""
    grid = tuple(Setting(steps=n, warm_up=0, reach=1.0) for n in (7, 10, 14))
    errors = {7: 3.0, 10: 1.0, 14: 2.0}

    class MadeUp:
        def measure(self, seeds: list[ways.Way], pairs: int) -> Any:
            assert pairs == 5
            steps = seeds[0].steps
            return type(
                "Row",
                (),
                {"cost": torch.tensor(float(steps)), "error": torch.tensor(errors[steps])},
            )

    peer = Peer(name="made up", settings=grid, switch=lambda *_: lambda: None)
    base = rapid3rt.pipeline.BUNDLED_POLICIES / "sd3" / "policy"
    settings = Settings(
        policies=(base,), base=base, calibration=5, dials=(5, 8, 10, 14), claimed=(8,), peers=()
    )
    made = Protocol(None, settings, Path("unused"))._tune(MadeUp(), peer)  # type: ignore[arg-type]
    assert {k: tuned.setting.steps for k, tuned in made.items()} == {5: 7, 8: 7, 10: 10, 14: 10}


def test_unknown_ones_are_refused() -> None:
    pipe = load("sd3")
    with pytest.raises(ValueError, match=r"peers must be some of .*, got FirstBlockCache"):
        protocol._choose_peers(pipe, ["FirstBlockCache"])
    assert protocol._choose_peers(pipe, []) == {}

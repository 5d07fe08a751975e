# SPDX-License-Identifier: Apache-2.0
"""Runs of the real tiny pipeline on a few pairs: what is stored, what is shared, what is made again."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rapid3rt
from rapid3rt.pipeline import BUNDLED_POLICIES
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.schedule import FixedPlan, ScheduleTick, WarpFamily
from rapid3rt.types import REUSE, ActionCosts
from training import runs as module
from training import ways
from training.runs import Runs, priced
from training.ways import Way

BASE = BUNDLED_POLICIES / "sd3" / "policy"
FOLDER = PolicyFolder.load(BASE)
FAMILY = replace(FOLDER.schedule, allocation=None)
COSTS = ActionCosts(levels=(2.0, 1.0), reuse=0.5, measured=True)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = rapid3rt.load_tiny("sd3")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe: Any, store: Path, pairs: int = 3, **changes: Any) -> Runs:
    settings = {"split": "test", "seed": 0, "guidance": 3.5, "tokens": 32, **changes}
    return Runs(pipe, pairs, store=store, **settings)


def counted(way: Way) -> tuple[Way, list[int]]:
    """The way, and the first pairs of the batches that were really made."""
    made: list[int] = []

    def open_batch(pipe: Any, start: int) -> Any:
        made.append(start)
        return way.open(pipe, start)

    return replace(way, open=open_batch), made


def files(store: Path) -> list[Path]:
    return sorted(store.rglob("*.safetensors"))


def test_a_batch_is_made_once_and_read_back(pipe: Any, tmp_path: Path) -> None:
    way, made = counted(ways.plain(2))
    first = make(pipe, tmp_path).outcome(way, 3)
    again = make(pipe, tmp_path).outcome(way, 3)
    assert made == [0]
    assert torch.equal(first.images, again.images)
    assert first.images.shape == (3, 3, 64, 64)
    assert first.nfe.tolist() == first.cost.tolist() == [2, 2, 2]
    assert first.dense.all()
    assert not list(tmp_path.rglob(".*"))  # no scratch is left


def test_every_split_has_noises_of_its_own(pipe: Any, tmp_path: Path) -> None:
    stores = [
        make(pipe, tmp_path, split=split, seed=seed)
        for split in ("validation", "test")
        for seed in (0, 1)
    ]
    noises = {
        torch.randn(8, generator=runs.noise(i)).sum().item() for runs in stores for i in range(3)
    }
    assert len(noises) == 12


def test_images_keep_sixteen_bits(pipe: Any, tmp_path: Path) -> None:
    runs = make(pipe, tmp_path, 2)
    stored = runs.outcome(ways.plain(1), 2).images
    images = pipe(
        [scene.caption for scene in runs.scenes],
        num_inference_steps=1,
        generator=[runs.noise(i) for i in range(2)],
        output_type="pt",
        guidance_scale=3.5,
        max_sequence_length=32,
    ).images
    assert (stored - (2 * images - 1)).abs().max() <= 1.01 / 65535


def test_fewer_pairs_are_served_and_more_are_made(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    way, made = counted(ways.plain(1))
    three = make(pipe, tmp_path).outcome(way, 3)
    assert made == [0, 2]
    two = make(pipe, tmp_path).outcome(way, 2)
    assert made == [0, 2]
    assert torch.equal(two.images, three.images[:2])
    four = make(pipe, tmp_path, pairs=4).outcome(way, 4)
    assert made == [0, 2, 2]  # its file held one image
    assert torch.allclose(four.images[:3], three.images, atol=1e-4)


def test_an_interrupted_way_goes_on_where_it_was(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 1)
    way, made = counted(ways.plain(1))
    for _ in itertools.islice(make(pipe, tmp_path).batches(way, 3), 2):
        pass
    assert list(make(pipe, tmp_path).batches(way, 3)) == [1, 1, 1]
    assert made == [0, 1, 2]


def test_a_file_that_cannot_be_read_is_made_again(pipe: Any, tmp_path: Path) -> None:
    way, made = counted(ways.plain(1))
    make(pipe, tmp_path).outcome(way, 2)
    files(tmp_path)[0].write_bytes(b"torn")
    make(pipe, tmp_path).outcome(way, 2)
    assert made == [0, 0]


def test_stores_of_other_settings_are_apart(pipe: Any, tmp_path: Path) -> None:
    stores = {make(pipe, tmp_path, **changes).store for changes in (
        {}, {"guidance": 4.0}, {"tokens": 16}, {"split": "validation"}, {"seed": 1},
    )}  # fmt: skip
    assert len(stores) == 5
    shift = pipe.scheduler.config.shift
    other = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=shift + 1)
    mine, pipe.scheduler = pipe.scheduler, other
    try:
        assert make(pipe, tmp_path).store not in stores
    finally:
        pipe.scheduler = mine


def test_other_weights_have_a_store_of_their_own(pipe: Any, tmp_path: Path) -> None:
    before = make(pipe, tmp_path).store
    weight = next(pipe.vae.parameters())
    old = weight.detach().clone()
    with torch.no_grad():
        weight.flatten()[0] += 1
    try:
        assert make(pipe, tmp_path).store != before
    finally:
        with torch.no_grad():
            weight.copy_(old)
    assert make(pipe, tmp_path).store == before


@pytest.mark.parametrize("pairs", [0, 4])
def test_pairs_that_are_not_there(pipe: Any, tmp_path: Path, pairs: int) -> None:
    with pytest.raises(ValueError, match=f"pairs must be 1 to 3, got {pairs}"):
        make(pipe, tmp_path).outcome(ways.plain(1), pairs)


def test_an_accelerated_way_is_priced_by_its_table(pipe: Any, tmp_path: Path) -> None:
    runs = make(pipe, tmp_path, 2)
    ticks = (
        ScheduleTick(sigma=1.0),
        ScheduleTick(sigma=0.9, action=REUSE),
        ScheduleTick(sigma=0.5, level=1),
    )
    plan = FixedPlan(family="sd3", ticks=ticks)
    way = ways.fixed(plan, COSTS)
    made = runs.outcome(way, 2)
    assert made.cost.tolist() == [3.5, 3.5]
    assert made.nfe.tolist() == [2, 2]
    assert not made.dense.any()
    cheaper = runs.outcome(replace(way, costs=ActionCosts(levels=(1.0, 0.25), reuse=0.0)), 2)
    assert cheaper.cost.tolist() == [1.25, 1.25]
    with pytest.raises(ValueError, match="costs must list 2 sparsity levels, got 1"):
        runs.outcome(replace(way, costs=ActionCosts()), 2)


def test_prices_by_hand() -> None:
    counts = torch.tensor([[2, 3, 0], [0, 1, 1]])
    assert priced(counts, COSTS).tolist() == [7.0, 3.0]
    assert priced(counts[:, :2], COSTS).tolist() == [7.0, 2.0]
    assert priced(counts[:1], ActionCosts(levels=(1.0,), reuse=0.0)).tolist() == [3.0]


def test_a_policy_folder_prices_itself_and_shares_its_runs(pipe: Any, tmp_path: Path) -> None:
    runs = make(pipe, tmp_path, 2)
    made = runs.outcome(ways.served(BASE, 5), 2)
    assert made.cost.tolist() == pytest.approx((made.nfe * FOLDER.costs.levels[0]).tolist())
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "schedule.json", "heads.safetensors"):
        (copy / name).write_bytes((BASE / name).read_bytes())
    assert ways.served(copy, 5).key == ways.served(BASE, 5).key
    (copy / "heads.safetensors").write_bytes(b"more")
    assert ways.served(copy, 5).key != ways.served(BASE, 5).key


def test_the_searched_family_gives_every_image_the_same(pipe: Any, tmp_path: Path) -> None:
    made = make(pipe, tmp_path, 2).outcome(ways.searched(FAMILY, 2, COSTS), 2)
    assert made.nfe.tolist() == [2, 2]
    assert made.cost.tolist() == [4, 4]


def test_shuffled_plans_are_the_plans_of_others(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    runs = make(pipe, tmp_path)
    # A rule that treats images differently, so that plans differ; 0.5 steps are few.
    own = ways.controller(0.5, FAMILY, 2, COSTS)
    traces = runs.traces(own, 3)
    assert [len(trace.images) for trace in traces] == [2, 1]
    order = [2, 0, 1]
    other = ways.shuffled(own, traces, order, "once")
    plans = [ticks for trace in traces for ticks in trace.images]
    taken = [ticks for trace in runs.traces(other, 3) for ticks in trace.images]
    assert [[t.next_sigma for t in ticks] for ticks in taken] == [
        [t.next_sigma for t in plans[j]] for j in order
    ]
    straight = ways.shuffled(own, traces, [0, 1, 2], "not at all")
    assert torch.equal(runs.outcome(straight, 3).images, runs.outcome(own, 3).images)
    assert len({own.key, other.key, straight.key}) == 3


def test_what_decides_nothing_has_no_trace(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"way must have a trace, got 'plain k=1'"):
        make(pipe, tmp_path, 2).traces(ways.plain(1), 2)


def test_traces_of_fewer_pairs_are_cut(pipe: Any, tmp_path: Path) -> None:
    runs = make(pipe, tmp_path)
    way = ways.searched(FAMILY, 1, COSTS)
    runs.outcome(way, 3)
    assert len(runs.traces(way, 2)[0].images) == 2


def test_a_failed_batch_leaves_a_plain_pipeline(pipe: Any, tmp_path: Path) -> None:
    transformer = pipe.transformer
    plan = FixedPlan(family="flux", ticks=(ScheduleTick(sigma=1.0),))
    with pytest.raises(ValueError, match="flux"):
        make(pipe, tmp_path, 2).outcome(ways.fixed(plan, COSTS), 2)
    assert pipe.transformer is transformer
    assert files(tmp_path) == []


def test_keys_tell_ways_apart(tmp_path: Path) -> None:
    plan = FixedPlan(family="sd3", ticks=(ScheduleTick(sigma=1.0),))
    longer = FixedPlan(family="sd3", ticks=(ScheduleTick(sigma=1.0), ScheduleTick(sigma=0.5)))
    made = [
        ways.plain(6),
        ways.plain(7),
        ways.multistep("UniPC", 6),
        ways.steps(6, "trim", COSTS),
        ways.steps(6, "trim/auto", COSTS),
        ways.searched(FAMILY, 6, COSTS),
        ways.searched(replace(FAMILY, order=1), 6, COSTS),
        ways.controller(0.1, FAMILY, 6, COSTS),
        ways.controller(0.2, FAMILY, 6, COSTS),
        ways.threshold(0.1, 6, COSTS),
        ways.served(BASE, 6),
        ways.served(BASE, 7),
        ways.fixed(plan, COSTS),
        ways.fixed(longer, COSTS),
    ]
    assert len({way.key for way in made}) == len(made)
    # What a schedule says about its making changes nothing.
    told = replace(FAMILY, provenance={"by": "hand"})
    assert ways.searched(told, 6, COSTS).key == ways.searched(FAMILY, 6, COSTS).key
    with pytest.raises(ValueError, match=r"folder with a config\.json, got"):
        ways.served(tmp_path / "nowhere", 6)


def test_another_allocation_is_another_way() -> None:
    found = PolicyFolder.load(BASE).schedule
    assert isinstance(found, WarpFamily)
    assert found.allocation is not None
    table = tuple((u, o, 2 * e, t) for u, o, e, t in found.allocation.table)
    others = [replace(found, allocation=replace(found.allocation, table=table)), FAMILY]
    keys = {ways.allocated(family, 8, COSTS).key for family in (found, *others)}
    assert len(keys) == 3
    assert len({ways.searched(family, 8, COSTS).key for family in (found, *others)}) == 1

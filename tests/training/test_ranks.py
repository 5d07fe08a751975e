# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo do what one does, however groups, dead groups and banks are dealt."""

from __future__ import annotations

import json
import math
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_run
import torch
from safetensors.torch import load_file

from training.checkpoint import Checkpoints
from training.ranks import Ranks

SCENARIOS: dict[str, dict[str, Any]] = {
    "even": {"groups": 4},
    "uneven": {"groups": 3},
    "idle": {"groups": 1, "validation_pairs": 3},
    "allocated": {"groups": 5, "heads": ("allocation", "step"), "dials": (3, 4, 5, 6), "pairs": 24},
    "half_dead": {"base": "paper", "groups": 4, "half_dead": True},
    "paper": {"base": "paper", "groups": 3},
    "paper_idle": {"base": "paper", "groups": 1, "omega": 1.0},
    "spoiled": {"groups": 2, "spoiled": True},
    "adversarial": {"base": "paper", "groups": 3, "omega": 1.0},
}
APART = {
    "different": {"on_rank": {"1": {"seed": 5}}},
    "of_another": {"checkpoints": "kept"},
}


class Rank(Ranks):
    """One of some, without the others."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("costs", [None, [5.0, 14, 5, 6, 14, 8, 10, 5, 6], [1.0] * 9, [0.0] * 9])
def test_everything_is_dealt_once(count: int, costs: list[float] | None) -> None:
    items = list("abcdefghi")
    shares = [Rank(i, count).share(items, costs) for i in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert all(share == sorted(share) for share in shares)
    if costs is None or set(costs) == {1.0}:
        assert shares == [items[i::count] for i in range(count)]
    assert Rank(1, 2).share(["a"], None if costs is None else [3.0]) == []


def test_ranks_get_as_much_to_do() -> None:
    costs = [14.0, 5, 14, 5, 10, 6, 8, 5]
    assert [sum(Rank(i, 2).share(costs)) for i in range(2)] == [46, 21]
    assert [sum(Rank(i, 2).share(costs, costs)) for i in range(2)] == [34, 33]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(folder: Path, scenarios: dict[str, Any], count: int = 2, limit: float = 500) -> None:
    """Start the ranks as torchrun does and wait for all of them. A hang is a failure."""
    script = Path(rank_run.__file__)
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(script.parent)]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), json.dumps(scenarios)],
            env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        ends = [rank.communicate(timeout=limit)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(ends)


def test_processes_that_are_not_joined_do_not_train_side_by_side(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE must be the number .* joins, 1, got 2"):
        Ranks(ranks._accelerator)


@pytest.mark.slow
def test_torchrun_starts_one_training(tmp_path: Path) -> None:
    """By the command that users type: side by side, each of them would write every row."""
    out, path = tmp_path / "run", os.pathsep.join(sys.path)
    options = shlex.split("""
        --pairs 24 --groups 5 --members 2 --iterations 2 --dials 3 4 5 6 --validation-pairs 2 --calibration-pairs 3
        --num-inference-steps 10 --resolution 32 --tracker none --evaluate-every 9
    """)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "training.run", "tiny-sd3", *options, "--out", str(out)]
    subprocess.run(
        [*words, "--banks", str(tmp_path / "banks")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=500,
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert (out / "policy" / "config.json").exists()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    Checkpoints(folder / "kept", fingerprint={"seed": 1}).save(1, {"x": 1})
    launch(folder, SCENARIOS | APART)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    for name, change in SCENARIOS.items():
        told = rank_run.run(name, change, folder, ranks)
        (folder / f"{name}-0.json").write_text(json.dumps(told))
    return folder


def told(folder: Path, name: str, rank: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}-{rank}.json").read_text())
    return content


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_end_like_one(one: Path, two: Path, name: str) -> None:
    alone = load_file(one / f"{name}-0.safetensors")
    first, second = (load_file(two / f"{name}-{rank}.safetensors") for rank in (0, 1))
    for key, expected in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], expected, rtol=0, atol=1e-6, msg=key)
    moved = max(
        float((alone[key] - alone[f"first {key}"]).abs().max())
        for key in alone
        if key[:5] != "first"
    )
    assert moved > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_ranks_tell_the_same(one: Path, two: Path, name: str) -> None:
    alone, first, second = told(one, name, 0), told(two, name, 0), told(two, name, 1)
    for row, other, expected in zip(
        first["metrics"], second["metrics"], alone["metrics"], strict=True
    ):
        assert row.keys() == other.keys() == expected.keys()
        for key, value in row.items():
            if key.startswith("time/"):
                continue
            same = value == other[key] or (math.isnan(value) and math.isnan(other[key]))
            assert same, key
            if key != "policy/first_ratio_error":
                assert value == pytest.approx(expected[key], rel=0.05, abs=1e-3, nan_ok=True), key
    assert first["difficulty"] == second["difficulty"]
    assert sorted(first["difficulty"]) == sorted(alone["difficulty"])


@pytest.mark.slow
def test_every_batch_of_a_bank_is_made_once_and_by_one_rank(one: Path, two: Path) -> None:
    shares = [told(two, "even", rank)["made"] for rank in (0, 1)]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == sorted(told(one, "even", 0)["made"])
    assert told(two, "uneven", 0)["made"] == told(two, "uneven", 1)["made"] == []


@pytest.mark.slow
def test_the_scenarios_are_what_they_say(two: Path) -> None:
    dead = told(two, "half_dead", 0)["metrics"][0]
    assert dead["policy/dead_groups"] == 0.5
    assert told(two, "paper", 0)["metrics"][0]["entropy/cache"] > 0
    assert "discriminator/accuracy" in told(two, "adversarial", 0)["metrics"][1]


@pytest.mark.slow
def test_ranks_with_different_recipes_are_refused_by_all(two: Path) -> None:
    errors = [told(two, "different", rank)["error"] for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("recipe must be the same on all ranks, got another one on rank 1")


@pytest.mark.slow
def test_checkpoints_of_another_recipe_are_refused_by_all(two: Path) -> None:
    for rank in (0, 1):
        error = told(two, "of_another", rank)["error"]
        assert error.endswith("got other values: seed (1 there, 2 here)")

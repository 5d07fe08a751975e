# SPDX-License-Identifier: Apache-2.0
"""The command line of training: what it refuses, what it leaves, and that a stop leaves no trace."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_run
import small_world
import torch
from safetensors.torch import load_file, save_file

import rapid3rt
import training.subject
from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.policies.folder import PolicyFolder
from training import run
from training.bank import accelerated
from training.checkpoint import Checkpoints, alone
from training.config import Recipe
from training.curves import choose_panels, read_run
from training.grpo import Trainer
from training.metrics import Name, read_lines
from training.plot import draw
from training.recipes import RECIPES
from training.rewards.http import HttpReward

OPTIONS = shlex.split("""
    --num-inference-steps 8 --resolution 32 --heads step --head-width 8 --head-side 8 --pairs 6 --groups 2 --members 3
    --iterations 3 --dials 4 6 --rollout-batch 8 --validation-pairs 2 --calibration-pairs 2 --evaluate-every 2
    --checkpoint-every 1 --tracker none --threads 1
""")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a searched policy and banks, the same for all runs."""
    folder = tmp_path_factory.mktemp("shared")
    small_world.make_searched().save(folder / "searched")
    return ["--policy", str(folder / "searched"), "--banks", str(folder / "banks")]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, shared: list[str]) -> list[str]:
    monkeypatch.setattr(training.subject, "load_pipeline", small_run.load_pipeline)
    return [*OPTIONS, *shared]


@pytest.fixture(scope="session")
def of_paper(shared: list[str]) -> list[str]:
    """Further options: three heads, at the 64 pixels that the scene score is made for, and banks of those."""
    three = ["--heads", "cache", "sparse", "step", "--resolution", "64", "--warm-start", "4"]
    return [*three, "--banks", f"{shared[-1]}-64", "--iterations", "2"]


def go(out: Path, options: list[str], *more: str, recipe: str = "tiny-sd3") -> Path:
    run.main([recipe, "--out", str(out), *options, *more])
    return out


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run.main(list(arguments))
    message = str(stop.value)
    assert "\n" not in message.strip()
    return message


def rows(out: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock says."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_lines(out / "metrics.jsonl")
    ]


def weights(out: Path) -> bytes:
    return (out / "policy" / "heads.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared: list[str]) -> Path:
    """A run from beginning to end that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.subject, "load_pipeline", small_run.load_pipeline)
        return go(tmp_path_factory.mktemp("finished") / "run", [*OPTIONS, *shared])


# What a run leaves ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_policy_metrics_and_checkpoints(finished: Path) -> None:
    assert [row["iteration"] for row in rows(finished)] == [1, 2, 3]
    assert {path.name for path in (finished / "checkpoints").iterdir()} >= {"iteration-00000003"}
    folder = PolicyFolder.load(finished / "policy")
    assert folder.provenance["recipe"]["members"] == 3
    assert folder.latent_grid == (8, 8)
    assert len(folder.calibration) >= 2
    assert (finished / "samples" / "00000002.png").is_file()
    pipe = small_world.make_pipe()
    middle = folder.calibration[0].equivalent_steps + 0.1
    with accelerated(pipe, finished / "policy", speed=8 / middle):
        pipe("a red circle", num_inference_steps=8, height=32, width=32, guidance_scale=3.5)
        assert rapid3rt.report(pipe).images[0].nfe < 8


@pytest.mark.slow
@pytest.mark.parametrize("best", [0, 2, 3])
def test_the_policy_is_the_best_checkpoint(
    tmp_path: Path, world: list[str], monkeypatch, best: int
) -> None:
    """Iteration 0, before training, is one of those that are judged."""
    judge, judged = run.Validation.judge, iter((0, 2, 3))

    def favouring(self: Any, dials: Any) -> tuple[dict[str, float], float]:
        return judge(self, dials)[0], float(next(judged) == best)

    monkeypatch.setattr(run.Validation, "judge", favouring)
    go(tmp_path, world, "--learning-rate", "0.01")
    provenance = json.loads((tmp_path / "policy" / "config.json").read_text())["provenance"]
    assert provenance["iteration"] == best
    recipe = {k: v for k, v in provenance["recipe"].items() if k not in run._FREE}
    kept = Checkpoints(tmp_path / "checkpoints", fingerprint=recipe).load(best)["state"]["trainer"]
    served = load_file(tmp_path / "policy" / "heads.safetensors")
    assert all(torch.equal(kept["heads"][name], served[name]) for name in served)


def test_every_metric_has_a_place(finished: Path, tmp_path: Path) -> None:
    read = read_run(finished)
    names = {key: Name.parse(key) for key in read.values}
    for expected in (
        "reward/total",
        "cost/E",
        "quality/m@4",
        "quality/m_prior@4",
        "quality/m_over_prior@6",
        "entropy/step",
        "entropy/step_floor",
        "policy/dead_groups",
        "policy/clip_fraction",
        "policy/kl",
        "policy/gradient_norm",
        "time/rollout",
    ):
        assert expected in names, expected
    shifts = [n for n in names.values() if n.group == "heads"]
    assert {n.name for n in shifts} == {"step_shift"}
    assert len(shifts) > 1
    assert len(read.difficulty) == 6  # a row for every group
    assert set(read.difficulty[:, 3]) <= {4.0, 6.0}
    titles = [panel.title for panel in choose_panels([read])]
    for title in ("dead groups", "clip fraction", "KL per live decision", "gradient norm"):
        assert title in titles
    draw([read], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_threads_are_as_asked(tmp_path: Path, world: list[str], monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(run, "train", lambda command: seen.append(torch.get_num_threads()))
    go(tmp_path, world, "--threads", "1")
    go(tmp_path, world, "--threads", "2")
    assert seen == [1, 2]


# Going on ------------------------------------------------------------------------------------------------------------


class Died(Exception):
    """The process was killed here."""


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_goes_on_ends_with_the_same_bits(
    tmp_path: Path, world: list[str], finished: Path, monkeypatch, iteration: int, when: str
) -> None:
    original = Trainer.iterate

    def dying(self: Trainer, i: int) -> dict[str, float]:
        if i == iteration and when == "before":
            raise Died
        metrics = original(self, i)
        if i == iteration:
            raise Died
        return metrics

    monkeypatch.setattr(Trainer, "iterate", dying)
    with pytest.raises(Died):
        go(tmp_path, world)
    monkeypatch.setattr(Trainer, "iterate", original)
    go(tmp_path, world)
    assert rows(tmp_path) == rows(finished)
    assert weights(tmp_path) == weights(finished)
    assert (tmp_path / "difficulty.jsonl").read_bytes() == (
        finished / "difficulty.jsonl"
    ).read_bytes()


def test_a_finished_run_makes_its_policy_again(tmp_path: Path, world: list[str], finished) -> None:
    go(tmp_path, world)
    (tmp_path / "policy" / "heads.safetensors").unlink()
    go(tmp_path, world)
    assert weights(tmp_path) == weights(finished)
    assert rows(tmp_path) == rows(finished)


def test_a_finished_run_may_be_made_longer(tmp_path: Path, world: list[str]) -> None:
    go(tmp_path, world, "--iterations", "1")
    go(tmp_path, world, "--iterations", "2")
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2]


def test_a_checkpoint_of_another_recipe_is_refused(world: list[str], finished: Path) -> None:
    before = rows(finished)
    message = refusal("tiny-sd3", "--out", str(finished), *world, "--learning-rate", "1e-3")
    assert message.startswith("training.run: recipe must be that of")
    assert "learning_rate (0.0002 there, 0.001 here)" in message
    assert rows(finished) == before


def test_never_refuses_a_folder_with_checkpoints(world: list[str], finished: Path) -> None:
    message = refusal("tiny-sd3", "--out", str(finished), *world, "--resume", "never")
    assert "out must hold no checkpoints with --resume never" in message


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, world: list[str], finished: Path, monkeypatch
) -> None:
    from training import checkpoint

    original, written = checkpoint._write_synced, []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > 4:  # two checkpoints of two files each
            path.write_bytes(content[:10])
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    message = refusal("tiny-sd3", "--out", str(tmp_path), *world)
    assert "could not be written" in message
    assert "that of 1 is intact" in message
    monkeypatch.setattr(checkpoint, "_write_synced", original)
    go(tmp_path, world)
    assert weights(tmp_path) == weights(finished)
    assert rows(tmp_path) == rows(finished)


# The recipe of the paper ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_recipe_runs(tmp_path: Path, world: list[str], of_paper: list[str]) -> None:
    """Three heads from nothing, sampled reuse and sparsity, discriminator and scene score."""
    assert RECIPES["tiny-sd3-paper"]().omega == 1
    go(tmp_path, [*world, *of_paper], recipe="tiny-sd3-paper")
    first, second = rows(tmp_path)
    for head in ("cache", "sparse", "step"):
        assert first[f"entropy/{head}"] is not None
    assert second["cost/E"] != second["cost/nfe"]
    assert first["reward/realism"] == 0.0  # nothing is known of pictures yet
    assert second["reward/realism"] != 0.0
    assert 0 <= second["reward/scene_continuous"] <= 1
    assert second["discriminator/accuracy"] is not None
    assert any(key.startswith("discriminator/auc@") for key in second)
    folder = PolicyFolder.load(tmp_path / "policy")
    assert folder.schedule is None
    assert folder.heads is not None
    assert folder.heads.config.heads == ("cache", "sparse", "step")
    draw([read_run(tmp_path)], tmp_path / "curves.png")


@pytest.mark.slow
def test_the_papers_recipe_goes_on_with_the_same_bits(
    tmp_path: Path, world: list[str], of_paper: list[str], monkeypatch
) -> None:
    options = [*world, *of_paper]
    whole = go(tmp_path / "whole", options, recipe="tiny-sd3-paper")
    original = Trainer.iterate

    def dying(self: Trainer, i: int) -> dict[str, float]:
        if i == 1:
            raise Died
        return original(self, i)

    monkeypatch.setattr(Trainer, "iterate", dying)
    with pytest.raises(Died):
        go(tmp_path / "cut", options, recipe="tiny-sd3-paper")
    monkeypatch.setattr(Trainer, "iterate", original)
    cut = go(tmp_path / "cut", options, recipe="tiny-sd3-paper")
    assert rows(cut) == rows(whole)
    assert weights(cut) == weights(whole)


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_mistyped_recipe_names_the_nearest() -> None:
    assert "the nearest is 'tiny-sd3'" in refusal("tiny-sd33")
    with pytest.raises(SystemExit, match=r"usage: python -m training\.run RECIPE"):
        run.main([])
    with pytest.raises(SystemExit, match="recipes: tiny-sd3, tiny-sd3-paper"):
        run.main(["--out", "x"])


def test_a_mistyped_field_names_the_nearest(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["tiny-sd3", "--learning-rat", "1e-3"])
    told = capsys.readouterr()
    assert stop.value.code != 0
    assert "--learning-rate" in told.out + told.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--members", "1"], "members must be at least 2, a group of one says nothing, got 1"),
        (["--dials", "4", "29"], r"dials must be 1 to num_inference_steps \(28\)"),
        (["--dials", "0.5", "5"], "dials must be 1 to num_inference_steps"),
        (["--dials", "4", "28"], r"dials must be below num_inference_steps \(28\) with an alloc"),
        (["--dials", "6", "5"], "dials must be at least two and rise"),
        (["--dials", "6"], "dials must be at least two and rise"),
        (["--dials", "nan", "5"], "dials must be 1 to"),
        (["--heads", "steps"], "heads must be some of cache, sparse, allocation, step"),
        (["--heads", "step", "step"], "each once"),
        (["--pairs", "23"], "pairs must be at least 24 to fit an allocation"),
        (["--groups", "0"], "groups must be an integer of at least 1, got 0"),
        (["--learning-rate", "0"], "learning_rate must be a number above 0"),
        (["--learning-rate", "nan"], "learning_rate must be a number above 0"),
        (["--omega", "-1"], "omega must be a number of at least 0"),
        (["--prior-kl", "inf"], "prior_kl must be a number of at least 0"),
        (["--discount", "1.5"], "discount must be at most 1"),
        (["--no-prior"], "allocation' without a prior"),
        (["--no-prior", "--heads", "step"], "prior must be True with the reward fidelity"),
        (["--num-inference-steps", "4", "--dials", "2", "3"], "must be at least 5 with the rewa"),
        (["--reward", "paper", "--quality", "scenes", "1"], r"quality must be some of scene, .*"),
        (["--reward", "paper", "--quality", "scene", "0"], "weights that are finite and not 0"),
        (
            ["--reward", "paper", "--quality", "scene", "1", "scene", "2"],
            "quality must name every reward once",
        ),
        (["--reward", "paper", "--prompts", "x.txt"], "prompts must be 'scenes' for the reward"),
        (
            ["--quality", "pickscore", "1"],
            r"quality must be .* with the reward fidelity, which does",
        ),
        (["--discount", "0.9"], "discount must be 0.97 with the reward fidelity"),
        (["--reward", "paper", "--failure", "2"], "failure must be 4.0 with the reward paper"),
        (["--warm-start", "5"], "warm_start must be 200 with a prior"),
        (["--heads", "allocation", "--omega", "1"], "omega must be 0.0 where no head is sampled"),
        (["--choice-entropy", "2"], "choice_entropy must be a share"),
        (["--dials", "4.25", "4.2500001"], "dials must differ within six digits"),
        (["--order", "7"], "order must be 0, 1 or 2, got 7"),
        (["--order", "3"], "order must be 0, 1 or 2, got 3"),
        (["--resolution", "0"], "resolution must be None or at least 1, got 0"),
        (["--head-side", "-3"], "head_side must be None or at least 1, got -3"),
        (["--max-sequence-length", "0"], "max_sequence_length must be an integer of at least 1"),
        (["--threads", "-1", "--dry-run"], "threads must be at least 0, got -1"),
    ],
)
def test_a_wrong_recipe_is_one_line(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["tiny-sd3", *options])
    told = " ".join((str(stop.value) + capsys.readouterr().err).split())
    assert re.search(message, told), told


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "prompts must be 'scenes' or a file with one prompt per line, got"),
        ("\n\n  \n", "prompts must hold at least one prompt, got an empty"),
        (b"caf\xe9\n", r"prompts must be a text file in UTF-8, got '.*prompts.txt'"),
        ("a cat\n" * 50, "prompts must be at least 10 different lines .*, got 1 in"),
        ("\ufeffa cat\na cat\n\u2028", "got 1 in"),
        ("a\u2028b" + "\nc" * 9, "got 2 in"),
        ("\n".join(f"a cat {i}" for i in range(7)), "got 7 in"),
    ],
)
def test_prompts_that_do_not_suffice_are_refused(
    tmp_path: Path, world: list[str], monkeypatch, lines: str | bytes | None, message: str
) -> None:
    path = tmp_path / "prompts.txt"
    if lines is not None:
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    monkeypatch.setattr(training.subject, "load_pipeline", lambda *_: pytest.fail("too late"))
    told = refusal("tiny-sd3", "--out", str(tmp_path / "out"), *world, "--prompts", str(path))
    assert re.search(message, told)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_file_of_prompts_serves(tmp_path: Path, world: list[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([f"  a red circle {i} " for i in range(10)] + ["", "a red circle 1"]))
    recipe = Recipe(
        name="x",
        model="tiny-sd3",
        heads=("step",),
        prompts=str(path),
        pairs=5,
        validation_pairs=3,
        calibration_pairs=2,
    )
    expected = {"train": range(5), "validation": range(7, 10), "calibration": range(5, 7)}
    for split, lines in expected.items():
        found = training.subject.load_prompts(recipe, split, len(lines))
        assert found == [f"a red circle {i}" for i in lines]
    own = [*world, "--banks", str(tmp_path / "banks"), "--prompts", str(path)]
    go(tmp_path / "out", own, "--iterations", "1")
    assert len(rows(tmp_path / "out")) == 1


def test_a_policy_that_does_not_suit_is_refused(tmp_path: Path, world: list[str], subject) -> None:
    told = refusal("tiny-sd3", "--out", str(tmp_path), *world, "--policy", str(tmp_path / "none"))
    assert "policy must be a folder with a config.json" in told
    told = refusal("tiny-sd3", "--out", str(tmp_path), *world, "--policy", "bundled")
    assert "for none is bundled for tiny-sd3" in told
    flux = rapid3rt.pipeline.bundled_policy  # the package's own policy of another family
    assert flux is not None
    folder = Path(rapid3rt.__file__).parent / "tiny" / "assets" / "flux" / "policy"
    told = refusal("tiny-sd3", "--out", str(tmp_path), *world, "--policy", str(folder))
    assert "policy must be for a sd3 model, got one for flux" in told
    without = tmp_path / "without"
    PolicyFolder(
        model="x",
        schedule=None,
        costs=small_world.COSTS,
        provenance={},
        heads=small_world.make_trained(small_world.PAPER, subject),
    ).save(without)
    told = refusal("tiny-sd3", "--out", str(tmp_path), *world, "--policy", str(without))
    assert "policy must hold a searched family" in told


def test_what_cannot_be_written_or_tracked_is_found_before_the_bank(
    tmp_path: Path, world: list[str], monkeypatch
) -> None:
    monkeypatch.setattr(training.subject, "load_pipeline", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    told = refusal("tiny-sd3", "--out", str(tmp_path / "file"), *world)
    assert "--out must be a folder that can be written to, got" in told
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    told = refusal("tiny-sd3", "--out", str(tmp_path), *world, "--tracker", "tensorboard")
    assert "tracker='tensorboard' needs tensorboard" in told


def test_two_runs_do_not_share_a_folder(tmp_path: Path, world: list[str]) -> None:
    with alone(tmp_path):
        told = refusal("tiny-sd3", "--out", str(tmp_path), *world)
    assert f"got '{tmp_path}', in which process {os.getpid()} is training" in told
    assert not (tmp_path / "checkpoints").exists()
    with alone(tmp_path):  # free again
        pass


def test_a_system_without_flock_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with alone(tmp_path), alone(tmp_path):
        pass
    assert "is not guarded against a second run (no flock on this system)" in caplog.text


def test_a_policy_of_other_content_is_refused(
    tmp_path: Path, world: list[str], shared: list[str], monkeypatch
) -> None:
    """The path is in the recipe, and says nothing of what lies there."""
    policy = tmp_path / "policy"
    shutil.copytree(shared[1], policy)
    own = [*world, "--policy", str(policy)]
    out = go(tmp_path / "out", own, "--iterations", "1")
    costs = replace(small_world.COSTS, reuse=0.2)
    replace(small_world.make_searched(), costs=costs).save(policy)
    monkeypatch.setattr(training.subject, "load_pipeline", lambda *_: pytest.fail("too late"))
    told = refusal("tiny-sd3", "--out", str(out), *own, "--iterations", "2")
    assert "content of a run must be that of its checkpoints, got another policy (" in told


def test_a_checkpoint_without_a_note_of_the_policy_serves(
    tmp_path: Path, world: list[str], finished: Path, monkeypatch
) -> None:
    monkeypatch.setattr(run, "_contents", lambda _: {})  # as older versions
    go(tmp_path, world, "--iterations", "2")
    monkeypatch.undo()
    monkeypatch.setattr(training.subject, "load_pipeline", small_run.load_pipeline)
    go(tmp_path, world)
    assert weights(tmp_path) == weights(finished)


def test_a_run_is_not_made_shorter(world: list[str], finished: Path) -> None:
    told = refusal("tiny-sd3", "--out", str(finished), *world, "--iterations", "1")
    assert "iterations must be at least 3, which " in told


def test_another_rollout_batch_serves_the_banks(tmp_path: Path, world: list[str]) -> None:
    """It may change when a run goes on, so banks must take it too."""
    go(tmp_path, world, "--iterations", "1")
    go(tmp_path, world, "--iterations", "2", "--rollout-batch", "4")
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2]


def test_options_of_rewards_reach_them(tmp_path: Path, world: list[str], monkeypatch) -> None:
    """And a scorer that gives none ends the run, with the checkpoints that it has."""
    monkeypatch.setattr(HttpReward, "_ask", lambda self, body, number: [math.nan] * number)
    words = [*world, "--reward", "paper", "--quality", "http", "1"]
    assert "--reward-options http.url=VALUE" in refusal("tiny-sd3", *words, "--out", str(tmp_path))
    words += ["--reward-options", "http.url=http://localhost:1/score"]
    told = refusal("tiny-sd3", *words, "--out", str(tmp_path))
    assert "rewards must be there for some images, got none in 3 iterations in a row" in told
    assert not (tmp_path / "policy").exists()
    told = refusal("tiny-sd3", *world, "--out", str(tmp_path / "b"), *words[-2:])
    assert "reward_options must be of none, for no reward is used, got 'http.url" in told


@pytest.mark.usefixtures("finished")  # it has filled the shared banks
def test_a_reference_that_is_no_number_ends_the_run_before_training(
    tmp_path: Path, world: list[str], shared: list[str]
) -> None:
    banks = tmp_path / "banks"
    shutil.copytree(shared[-1], banks)
    for split in ("validation-2", "train-6", "calibration-2"):
        (path,) = (banks / "tiny-sd3" / split).glob("steps_80*")
        tensors = load_file(path)
        tensors["images"][1, 0, 5, 5] = math.nan
        save_file(tensors, path)
        told = refusal("tiny-sd3", "--out", str(tmp_path / split), *world, "--banks", str(banks))
        assert re.search(rf"must be finite, got NaN or infinity in pairs \[1\] of .*{split}", told)
        assert not list(tmp_path.glob("*/checkpoints/*"))


def test_a_score_that_is_no_number_ends_the_run_before_training(
    tmp_path: Path, world: list[str], monkeypatch
) -> None:
    monkeypatch.setattr(run.Validation, "judge", lambda *_: ({}, math.nan))
    told = refusal("tiny-sd3", "--out", str(tmp_path), *world)
    assert "score before training must be finite, got nan" in told


def test_heads_that_run_away_are_one_line(tmp_path: Path, world: list[str]) -> None:
    told = refusal("tiny-sd3", "--out", str(tmp_path), *world, "--prior-kl", "1e30")
    assert re.search(r"iteration \d: gradient norm must be finite, .* lower --learning-rate", told)


def test_a_sparse_head_needs_levels(tmp_path: Path, world: list[str]) -> None:
    costs = replace(small_world.COSTS, levels=(1.0,))
    replace(small_world.make_searched(), costs=costs).save(tmp_path / "policy")
    words = [*world, "--policy", str(tmp_path / "policy"), "--heads", "sparse", "step"]
    told = refusal("tiny-sd3", "--out", str(tmp_path / "out"), *words)
    assert "heads must not hold 'sparse' where the policy knows one sparsity level" in told


@pytest.mark.parametrize("error", [UnsupportedError, StateError])
def test_an_error_of_the_callers_making_is_one_line(
    tmp_path: Path, world: list[str], monkeypatch, error: type[Exception]
) -> None:
    def failing(*_: Any) -> None:
        raise error("not here")

    monkeypatch.setattr(run, "load_subject", failing)
    assert refusal("tiny-sd3", "--out", str(tmp_path), *world) == "training.run: not here"


def test_a_stop_by_hand_says_where_it_goes_on(
    tmp_path: Path, world: list[str], monkeypatch, capsys
) -> None:
    original = Trainer.iterate

    def stopped(self: Trainer, i: int) -> dict[str, float]:
        if i == 1:
            raise KeyboardInterrupt
        return original(self, i)

    monkeypatch.setattr(Trainer, "iterate", stopped)
    with pytest.raises(SystemExit) as stop:
        go(tmp_path, world)
    assert stop.value.code == 130
    assert "stopped; the same command goes on after iteration 1\n" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    run.main(["tiny-sd3", "--out", str(out), "--dry-run", "--members", "4", "--groups", "3"])
    told = capsys.readouterr().out
    assert '"members": 4' in told
    assert "3 groups x 4 members = 12 images" in told
    assert not out.exists()
    for name in RECIPES:
        run.main([name, "--dry-run"])
    assert "hours for every millisecond" in capsys.readouterr().out


# Killed --------------------------------------------------------------------------------------------------------------


def command(out: Path, options: list[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(small_run.__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, small_run.__file__, "tiny-sd3", "--out", str(out), *options],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(path: Path, process: subprocess.Popen[str]) -> bool:
    """Until a sitting has written its first row; False where it ended before."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns != before:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, shared: list[str]
) -> None:
    options = [*OPTIONS, *shared, "--iterations", "24", "--checkpoint-every", "3"]
    with command(tmp_path / "whole", options) as process:
        assert process.wait(timeout=500) == 0, process.communicate()[1]
    out, source, kills = tmp_path / "cut", random.Random(0), 0
    for _ in range(60):
        with command(out, options) as process:
            if kills < 5 and wait_for_rows(out / "metrics.jsonl", process):
                time.sleep(source.uniform(0, 0.4))
                kills += process.poll() is None
                process.kill()
                continue
            assert process.wait(timeout=500) == 0, process.communicate()[1]
            break
    assert kills == 5
    assert rows(out) == rows(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")
    names = ("difficulty.jsonl", "policy/config.json")
    assert all((out / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


@pytest.mark.slow
def test_the_real_thing(tmp_path: Path) -> None:
    """The bundled pipeline, policy and recipe as a user has them, only less of everything."""
    options = shlex.split("""
        --pairs 24 --groups 2 --members 2 --iterations 2 --dials 4 6 --validation-pairs 2 --calibration-pairs 2
        --num-inference-steps 10 --resolution 32 --tracker none
    """)
    out, banks = str(tmp_path / "run"), ["--banks", str(tmp_path / "banks")]
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-m", "training.run", "tiny-sd3", "--out", out, *options, *banks],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=500,
    )
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [1, 2]
    folder = PolicyFolder.load(tmp_path / "run" / "policy")
    assert folder.heads is not None
    assert folder.heads.config.heads == ("allocation", "step")
    pipe = rapid3rt.load_tiny("sd3")
    middle = sum(dial.equivalent_steps for dial in folder.calibration[:2]) / 2
    with accelerated(pipe, tmp_path / "run" / "policy", speed=10 / middle):
        size = {"height": 32, "width": 32, "guidance_scale": 3.5, "max_sequence_length": 32}
        pipe("a red circle", num_inference_steps=10, **size)
        assert rapid3rt.report(pipe).images[0].nfe < 10

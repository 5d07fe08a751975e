# SPDX-License-Identifier: Apache-2.0
"""The command, end to end on a few pairs of the real tiny pipeline, and what it refuses before any work."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.pipeline import BUNDLED_POLICIES
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.learned import Dial, Heads, HeadsConfig
from rapid3rt.policies.schedule import FixedPlan, ScheduleTick, save_schedule
from training import evaluate, peers, protocol
from training.protocol import Settings
from training.runs import Runs
from training.ways import Way

BASE = BUNDLED_POLICIES / "sd3" / "policy"
SMALL = (
    "--model tiny-sd3 --pairs 3 --others 3 --calibration 1 --dials 3 4 --means 6 --claimed 3 "
    "--derangements 1 --reference 29 --draws 80 --peers --threads 2"
)


def learned(folder: Path, weight_seed: int) -> Path:
    """A folder with heads on top of the base, small random ones, calibrated from 2.5 to 8."""
    base = PolicyFolder.load(BASE)
    torch.manual_seed(weight_seed)
    heads = Heads(
        HeadsConfig(family="sd3", channels=4, conditioning=128, width=8, side=8, dials=(3.0, 6.0))
    )
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    table = tuple(
        Dial(dial=k, equivalent_steps=k, evaluations=k, error=1 / k) for k in (2.5, 4.0, 8.0)
    )
    made = PolicyFolder(
        model=base.model,
        schedule=base.schedule,
        costs=base.costs,
        provenance={"seed": weight_seed},
        heads=heads,
        calibration=table,
    )
    made.save(folder)
    return folder


def calibrated(folder: Path) -> Path:
    """The base without its heads: what `calibrate` alone would have written."""
    base = PolicyFolder.load(BASE)
    made = PolicyFolder(
        model=base.model, schedule=base.schedule, costs=base.costs, provenance={"seed": 0}
    )
    made.save(folder)
    return folder


def settings(**changes: Any) -> Settings:
    return Settings(**{"policies": (BASE,), "base": BASE, **changes})


@pytest.mark.slow
def test_one_command_leaves_everything_and_goes_on_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "TABLES", (3, 5))
    monkeypatch.setattr(peers, "STEPS", (4,))
    out, cache = tmp_path / "out", tmp_path / "runs"
    base = calibrated(tmp_path / "base")
    words = [str(base), *SMALL.split(), "--base", str(base), "--cache", str(cache)]
    words += ["--peers", "cache-dit"]
    evaluate.main([*words, "--out", str(out)])
    document = json.loads((out / "evaluate.json").read_text())
    # Three pairs are too few for strata.
    pictures = {"error.png", "against.png", "adaptivity.png", "pairs.png"}
    assert {path.name for path in out.iterdir()} == {"evaluate.json", "evaluate.md", *pictures}
    page = (out / "evaluate.md").read_text()
    assert page in capsys.readouterr().out
    assert set(re.findall(r"\]\((.*?)\)", page)) == pictures

    assert document["format"] == "rapid3rt.evaluation"
    assert document["settings"]["dials"] == [3, 4]
    assert str(tmp_path) not in json.dumps(document)
    assert document["ways"]["plain"]["3"]["cost"]["value"] == pytest.approx(3)
    assert document["ways"]["ours"]["3"]["pairs"] == 3
    # The policy is the base: it is its own prior.
    assert document["against"]["prior"]["3"]["difference"]["value"] == 0
    tuned = document["calibration"]["peers"]["cache-dit"]["4"]
    assert tuned["setting"]["steps"] == 4
    assert tuned["cost"] <= 4.08
    assert document["ways"]["cache-dit"]["4"]["cost"]["value"] == pytest.approx(tuned["cost"], 0.3)
    assert "| cache-dit |    4 |" in page
    assert set(document["shuffled"]) == {"3"}
    assert set(document["verdicts"]) == {"3", "4"}

    def never(*_: Any) -> None:
        raise AssertionError("a run was made again")

    with monkeypatch.context() as patch:
        patch.setattr(Runs, "_make", never)
        evaluate.main([*words, "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again" / "evaluate.json").read_text())
    assert again == document

    # Two seeds of learned heads share the rivals' runs and are averaged.
    made: list[str] = []
    make = Runs._make

    def noted(self: Runs, way: Way, *rest: Any) -> None:
        made.append(way.key.split()[0])
        make(self, way, *rest)

    monkeypatch.setattr(Runs, "_make", noted)
    seeds = [str(learned(tmp_path / f"seed{i}", i)) for i in (1, 2)]
    evaluate.main([*seeds, *words[1:], "--out", str(tmp_path / "learned")])
    assert set(made) <= {"policy", "searched"}
    trained = json.loads((tmp_path / "learned" / "evaluate.json").read_text())
    assert [policy["name"] for policy in trained["policies"]] == ["seed1", "seed2"]
    assert len(trained["ways"]["ours"]["3"]["error_by_seed"]) == 2
    assert trained["ways"]["plain"] == document["ways"]["plain"]

    # Another dtype is another pipeline: nothing of the runs is its own.
    made.clear()
    evaluate.main([*words, "--dtype", "bfloat16", "--out", str(tmp_path / "half")])
    half = json.loads((tmp_path / "half" / "evaluate.json").read_text())
    assert "plain" in made
    assert half["settings"] == {**document["settings"], "dtype": "bfloat16"}
    errors, exact = (
        [d["ways"]["plain"][k]["error"]["value"] for k in "34"] for d in (half, document)
    )
    assert errors == pytest.approx(exact, rel=0.1)
    assert errors != exact


def test_further_means_stay_within_what_policies_were_calibrated_for(tmp_path: Path) -> None:
    words = f"{learned(tmp_path, 0)} --model tiny-sd3 --out x --dials 5 6"
    made = evaluate._settings(evaluate._parser().parse_args(words.split()))
    assert made.means == (4.0, 8.0)  # 4 as it stands, 12 at the end of the table
    words = f"{learned(tmp_path, 0)} --model tiny-sd3 --out x --dials 5 8"
    assert evaluate._settings(evaluate._parser().parse_args(words.split())).means == (4.0,)


@pytest.mark.slow
def test_a_schedule_that_does_not_fit_shows_before_the_rivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the rivals came first")

    monkeypatch.setattr(protocol.Protocol, "calibrate", never)
    plan = FixedPlan(family="flux", ticks=(ScheduleTick(sigma=1.0),))
    save_schedule(plan, tmp_path / "foreign.json")
    words = [
        str(calibrated(tmp_path / "base")),
        *SMALL.split(),
        "--out",
        str(tmp_path),
        "--schedule",
        str(tmp_path / "foreign.json"),
    ]
    with pytest.raises(SystemExit, match="family must be 'flux', for which schedule:foreign"):
        evaluate.main(words)


def test_two_schedules_of_one_number_are_refused(tmp_path: Path) -> None:
    plan = FixedPlan(family="sd3", ticks=(ScheduleTick(sigma=1.0),))
    paths = (tmp_path / "a.json", tmp_path / "b.json")
    for path in paths:
        save_schedule(plan, path)
    with pytest.raises(ValueError, match="schedules must differ in name, or in evaluations"):
        protocol.Protocol(None, settings(schedules=paths), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ()}, "policies must be at least one folder, got none"),
        ({"policies": (BASE, BASE)}, "policies must differ: seeds of one recipe"),
        ({"split": "exam"}, "split must be one of train, .*, got 'exam'"),
        ({"pairs": 2, "others": 2}, "pairs must be at least 3, got 2"),
        ({"pairs": 10}, "others must be 3 to 10, got 256"),
        ({"calibration": 0}, "calibration must be at least 1, got 0"),
        ({"dials": ()}, "dials must be at least one number, got none"),
        ({"dials": (1, 6)}, r"dials must be 2 to 27, got \(1, 6"),
        ({"means": (28,)}, "dials must be 2 to 27"),
        ({"dials": (6, 6, 8)}, "dials must differ, those of means too"),
        ({"means": (6,)}, "dials must differ, those of means too"),
        ({"dials": (6,), "means": (), "claimed": ()}, "dials must be two or more, together with"),
        ({"claimed": (7,)}, r"claimed must be some of the dials \(5, 6, 8, 10, 14\), got \(7,\)"),
        ({"derangements": -1}, "derangements must be at least 0, got -1"),
        ({"reference": 28}, "reference must be above 28, got 28"),
        ({"draws": 199}, "draws must be at least 200, 40 a dial, got 199"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"guidance": float("nan")}, "guidance must be a finite number, at least 0, got nan"),
        ({"guidance": -3.0}, "guidance must be a finite number, at least 0, got -3"),
    ],
)
def test_settings_that_would_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_what_was_not_asked_for_follows_what_was(tmp_path: Path) -> None:
    words = f"{calibrated(tmp_path)} --model tiny-sd3 --out x --pairs 20 --dials 4 8"
    made = evaluate._settings(evaluate._parser().parse_args(words.split()))
    assert (made.pairs, made.others, made.calibration) == (20, 20, 20)
    assert (made.dials, made.means, made.claimed) == ((4, 8), (12,), (8,))
    assert made.base == BASE
    assert made.asked == [4, 8, 12]


@pytest.mark.parametrize("model", ["sd3", "tiny-sd4", ""])
def test_an_unknown_model_is_one_line(model: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="evaluate: model must be one of tiny-flux, tiny-sd3"):
        evaluate.main([str(BASE), "--model", model, "--out", str(tmp_path)])


def test_what_cannot_be_written_to_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    words = [str(BASE), "--model", "tiny-sd3", "--out", str(tmp_path / "file")]
    with pytest.raises(SystemExit, match="evaluate: --out must be a folder that can be written to"):
        evaluate.main(words)
    with pytest.raises(SystemExit, match="evaluate: threads must be at least 0, got -1"):
        evaluate.main([*words, "--threads", "-1"])


@pytest.mark.parametrize("error", [UnsupportedError, StateError, PermissionError])
def test_an_error_of_the_callers_making_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def failing(*_: Any) -> None:
        raise error("not here")

    monkeypatch.setattr(evaluate, "load_model", failing)
    with pytest.raises(SystemExit, match=r"^evaluate: not here$"):
        evaluate.main([str(BASE), "--model", "tiny-sd3", "--out", str(tmp_path), "--threads", "0"])


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_model", stopped)
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(BASE), "--model", "tiny-sd3", "--out", str(tmp_path), "--threads", "0"])
    assert left.value.code == 130
    told = capsys.readouterr().err
    assert told == "evaluate: stopped; the same command goes on with what it has measured\n"


def test_a_policy_must_be_one_of_this_model_on_the_same_grid(tmp_path: Path) -> None:
    base = calibrated(tmp_path / "base")
    model = json.loads((base / "config.json").read_text())["model"]
    evaluate._check_policy(BASE, base, model)
    with pytest.raises(ValueError, match="policy must be made for Other, got"):
        evaluate._check_policy(base, base, "Other")
    with pytest.raises(ValueError, match=r"policy must be a folder with a config\.json"):
        evaluate._check_policy(tmp_path, base, model)
    schedule = json.loads((base / "schedule.json").read_text())
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    (tmp_path / "schedule.json").write_text(json.dumps(schedule | {"order": 1}))
    with pytest.raises(ValueError, match="base must have the searched family of the policy"):
        evaluate._check_policy(tmp_path, base, model)
    (tmp_path / "schedule.json").write_text(json.dumps(schedule | {"allocation": None}))
    evaluate._check_policy(tmp_path, base, model)  # what it allocates is its own
    cheap = PolicyFolder.load(base)
    cheap.costs = replace(cheap.costs, reuse=cheap.costs.reuse / 2)
    cheap.save(tmp_path / "cheap")
    with pytest.raises(ValueError, match="base must have the action costs of the policy"):
        evaluate._check_policy(tmp_path / "cheap", base, model)
    config = HeadsConfig(
        family="sd3", channels=4, conditioning=128, heads=("step",), width=8, has_prior=False
    )
    alone = PolicyFolder.load(base)
    alone.heads, alone.schedule = Heads(config), None
    alone.save(tmp_path / "alone")
    with pytest.raises(ValueError, match="base must hold a searched family, got heads alone"):
        protocol.Protocol(None, settings(base=tmp_path / "alone"), tmp_path)

# SPDX-License-Identifier: Apache-2.0
"""The log of a run: every iteration once, whatever stops and resumes it; trackers, screens, bar, pictures."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from made_up_run import difficulties, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rapid3rt.errors import StateError
from training import logs as logs_module
from training.logs import Logs
from training.metrics import read_lines
from training.pictures import Row, Sample


def opened(folder: Path, **options: Any) -> Logs:
    return Logs(folder, **{"tracker": "none", "every": 0, **options})


def written(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [row["iteration"] for row in read_lines(folder / name)]


def sheet() -> list[Row]:
    plain = Sample(image=torch.zeros(3, 8, 8), nfe=28)
    return [Row(prompt="a circle", plain=plain, accelerated=(plain,))]


def test_a_row_is_one_line_in_the_file_at_once(tmp_path: Path) -> None:
    logs = opened(tmp_path / "deep" / "run")
    logs.row(0, {"reward/total": -1.5, "cost/E@8": 8})
    logs.row(3, {})
    text = (tmp_path / "deep" / "run" / "metrics.jsonl").read_text()
    assert text == '{"iteration": 0, "reward/total": -1.5, "cost/E@8": 8.0}\n{"iteration": 3}\n'
    logs.close()


def test_what_json_lacks_is_null(tmp_path: Path) -> None:
    with opened(tmp_path) as logs:
        logs.row(1, {"a/nan": math.nan, "a/inf": math.inf, "a/one": 1.0})
        logs.difficulty(1, [(math.nan, 8, 8)])
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(lines, parse_constant=pytest.fail) == {
        "iteration": 1,
        "a/nan": None,
        "a/inf": None,
        "a/one": 1.0,
    }
    assert read_lines(tmp_path / "difficulty.jsonl")[0]["difficulty"] is None


def test_a_resumed_run_has_every_iteration_once(tmp_path: Path) -> None:
    with opened(tmp_path) as logs:
        for i in range(1, 9):
            logs.row(i, {"a/b": i})
            logs.difficulty(i, difficulties(i))
    with opened(tmp_path) as logs:  # the last checkpoint was that of iteration 5
        logs.rewind(5)
        for i in range(6, 11):
            logs.row(i, {"a/b": 10 * i})
            logs.difficulty(i, difficulties(i))
    assert written(tmp_path) == list(range(1, 11))
    assert [row["a/b"] for row in read_lines(tmp_path / "metrics.jsonl")][4:6] == [5, 60]
    assert written(tmp_path, "difficulty.jsonl") == [i for i in range(1, 11) for _ in range(16)]


@pytest.mark.parametrize("wrong", [5, 4, -1, 6.0, True, None])
def test_no_iteration_appears_twice(tmp_path: Path, wrong: Any) -> None:
    with opened(tmp_path) as logs:
        logs.row(5, {})
    with opened(tmp_path) as logs:
        with pytest.raises(
            ValueError, match=r"^iteration must be a number from 6 on, got .*; call rewind first"
        ):
            logs.row(wrong, {})
        logs.row(6, {})
    assert written(tmp_path) == [5, 6]


def test_a_run_goes_back_before_its_first_row_only(tmp_path: Path) -> None:
    with opened(tmp_path) as logs:
        logs.row(5, {})
        with pytest.raises(StateError, match=r"^rewind must be called before the first row"):
            logs.rewind(3)
    with opened(tmp_path) as logs:
        logs.pictures(5, sheet())
        with pytest.raises(StateError):
            logs.rewind(3)
    assert written(tmp_path) == [5]


def test_bad_metrics_leave_no_line(tmp_path: Path) -> None:
    with opened(tmp_path) as logs:
        for bad in ({"total": 1.0}, {"a/b": "1"}, {"a/b": torch.ones(())}):
            with pytest.raises(ValueError, match=r"must be"):
                logs.row(1, bad)  # type: ignore[arg-type]
        logs.row(1, {"a/b": 1.0})
    assert written(tmp_path) == [1]


def test_a_foreign_file_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 must be an object"):
        opened(tmp_path)


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^tracker must be tensorboard, wandb or none, got 'mlflow'$"
    ):
        Logs(tmp_path / "x", tracker="mlflow")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path / "run", is_main=False, tracker="tensorboard", every=1) as logs:
        logs.rewind(3)
        logs.row(1, {"a/b": 1.0})
        logs.row(1, {"a/b": 1.0})
        logs.difficulty(1, [(0.0, 1.0, 1.0)])
        logs.pictures(1, sheet())
        logs.say("text")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_screens_come_every_few_iterations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path, every=3, total=7) as logs:
        for i in range(1, 8):
            logs.row(i, metrics(i))
        logs.say("saved")
    out, err = capsys.readouterr()
    titles = [line for line in out.splitlines() if line.startswith("iteration")]
    assert titles == ["iteration 3 of 7", "iteration 6 of 7"]
    assert out.splitlines()[-1] == "saved"
    assert "\x1b" not in out, "no colours in a file"
    assert err == "", "no bar in a file"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_counts_from_where_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with opened(tmp_path, total=80) as logs:
        for i in range(41, 44):
            logs.row(i, {"reward/total": -0.5, "cost/E": 8.04, "other/x": 1})
        assert logs._bar is not None
        assert (logs._bar.initial, logs._bar.n, logs._bar.total) == (40, 43, 80)
    last = terminal.getvalue().rstrip().split("\r")[-1]
    assert "43/80" in last
    assert "reward/total -0.5  cost/E 8.04" in last
    assert "other" not in last


def test_a_sheet_of_pictures_is_a_file(tmp_path: Path) -> None:
    with opened(tmp_path) as logs:
        logs.pictures(12, sheet())
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["00000012.png"]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    with opened(tmp_path, tracker="tensorboard") as logs:
        for i in range(1, 9):
            logs.row(i, {"a/b": i, "cost/E@8": math.nan if i == 2 else 8})
        logs.pictures(8, sheet())
    with opened(tmp_path, tracker="tensorboard") as logs:
        logs.rewind(5)
        logs.pictures(5, sheet())  # first of all: it voids later rows only
        for i in range(6, 8):
            logs.row(i, {"a/b": 10 * i, "cost/E@8": 8})
        logs.pictures(7, sheet())
    assert scalars(tmp_path, "a/b") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60), (7, 70)]
    assert len(scalars(tmp_path, "cost/E@8")) == 7
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [5, 7]


@pytest.mark.parametrize(
    ("tracker", "missing", "install"),
    [
        ("tensorboard", "torch.utils.tensorboard", "'rapid3rt[train]'"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_a_missing_tracker_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: Any, missing: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(logs_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        opened(tmp_path, tracker=tracker)
    assert str(error.value) == f"tracker='{tracker}' needs {tracker}: pip install {install}"


class Wandb:
    """What accelerate's tracker asks of wandb."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)

    def init(self, **options: Any) -> Wandb:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))

    def Image(self, picture: Any) -> tuple[str, tuple[int, int]]:
        return "image", picture.size


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    for i in (1, 2):
        with opened(tmp_path, tracker="wandb", project="mine") as logs:
            logs.row(i, {"a/b": i})
            logs.pictures(i, sheet())
    kinds = [call[0] for call in wandb.calls]
    assert kinds == ["init", "log", "log", "finish"] * 2
    first, second = (call[1] for call in wandb.calls if call[0] == "init")
    assert first == second
    assert (first["project"], first["resume"], first["dir"]) == ("mine", "allow", str(tmp_path))
    assert len(first["id"]) == 16
    logged = [call for call in wandb.calls if call[0] == "log"]
    assert logged[0] == ("log", 1, {"a/b": 1.0})
    assert logged[1][2]["samples"][0][0] == "image"

# SPDX-License-Identifier: Apache-2.0
"""Curves of runs: which panels, which numbers in them, and one clear error for everything else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_run import DIALS, difficulties, metrics
from matplotlib.figure import Figure
from PIL import Image

from training import plot
from training.curves import (
    binned,
    choose_panels,
    common,
    companion,
    joined,
    mean,
    nan_mean,
    read_run,
    smooth,
    window,
)
from training.logs import Logs


def write(folder: Path, *rows: dict[str, Any], difficulty: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if difficulty:
        (folder / "difficulty.jsonl").write_text(difficulty)
    return folder


def made_up(folder: Path, iterations: int = 40, seed: int = 0) -> Path:
    with Logs(folder, tracker="none", every=0) as logs:
        for i in range(1, iterations + 1):
            logs.row(i, metrics(i, seed=seed))
            logs.difficulty(i, difficulties(i, seed=seed))
    return folder


def row(iteration: int, **values: Any) -> dict[str, Any]:
    return {"iteration": iteration} | {f"a/{name}": value for name, value in values.items()}


def test_rows_become_columns_with_gaps(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", row(1, x=1.5), row(2, x=None, y=2), row(4, y=3))
    run = read_run(folder)
    assert run.name == "r"
    assert run.iterations.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(run.values["a/x"], [1.5, math.nan, math.nan])
    np.testing.assert_array_equal(run.values["a/y"], [math.nan, 2, 3])
    assert run.difficulty.shape == (0, 4)


def test_the_error_is_compared_with_the_priors(tmp_path: Path) -> None:
    rows = [
        {"iteration": 1, "quality/m@8": 3.0, "quality/m_prior@8": 4.0, "quality/m@5": 1.0},
        {"iteration": 2, "quality/m@8": 3.0, "quality/m_prior@8": 0.0},
    ]
    run = read_run(write(tmp_path / "r", *rows))
    np.testing.assert_array_equal(run.values["quality/m_over_prior@8"], [0.75, math.nan])
    assert "quality/m_over_prior@5" not in run.values


def test_a_mean_of_runs_covers_what_all_have(tmp_path: Path) -> None:
    one = read_run(write(tmp_path / "1", row(1, x=1), row(2, x=None), row(3, x=3), row(4, x=9)))
    two = read_run(write(tmp_path / "2", row(1, x=3), row(2, x=None), row(3, x=None)))
    other = read_run(write(tmp_path / "3", row(1, y=3)))
    iterations, values = mean([one, two, other], "a/x")
    assert iterations.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(values, [2, math.nan, 3])


def test_runs_that_never_overlap_keep_their_iterations() -> None:
    assert common([np.array([1.0, 2]), np.array([3.0])]).tolist() == [1, 2, 3]


def test_smoothing_by_hand() -> None:
    values = np.array([0, 3, 6, math.nan, 0, 9])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3, 4.5, math.nan, 4.5, 4.5])
    np.testing.assert_array_equal(smooth(values, 1), values)
    assert smooth(np.empty(0), 3).shape == (0,)
    assert smooth(np.array([2.0]), 5).tolist() == [2]
    np.testing.assert_array_equal(nan_mean(np.full((2, 1), math.nan)), [math.nan])


@pytest.mark.parametrize(("rows", "wanted"), [(1, 1), (39, 1), (40, 3), (80, 5), (300, 15)])
def test_the_window_is_odd_and_follows_the_run(tmp_path: Path, rows: int, wanted: int) -> None:
    run = read_run(write(tmp_path / "r", *(row(i, x=i) for i in range(rows))))
    assert window([run]) == wanted


def test_difficulty_in_quantiles_by_hand() -> None:
    rows = np.array(
        [(1, hard, nfe, 8) for hard, nfe in [(4, 9), (1, 5), (2, 7), (3, 9)]], dtype=float
    )
    assert binned(rows, 2).tolist() == [[1.5, 6, 1], [3.5, 9, 0]]
    assert binned(rows[:1], 5).tolist() == [[4, 9, 0]]


def test_every_metric_is_drawn_once(tmp_path: Path) -> None:
    run = read_run(made_up(tmp_path / "r", 3))
    panels = choose_panels([run])
    drawn = [key for panel in panels for key in panel.keys]
    dotted = [companion(key, [run]) for key in drawn]
    heads = [key for key in run.values if key.startswith("heads/")]
    assert sorted([*drawn, *filter(None, dotted), *heads]) == sorted(run.values)
    titles = [panel.title.split(",")[0].split(" (")[0] for panel in panels]
    assert titles == [
        "reward",
        "equivalent steps E by dial",
        "NFE by dial",
        "error m by dial",
        "error m over the prior's",
        "entropy",
        "dead groups",
        "clip fraction",
        "KL per live decision",
        "gradient norm",
        "discriminator",
        "discriminator: AUC by NFE",
        "seconds per iteration",
    ]


def test_metrics_of_unknown_groups_get_panels_too(tmp_path: Path) -> None:
    values = {
        "loss/policy": 1,
        "loss/kl": 2,
        "zoo/lion@2": 3,
        "zoo/lion@1": 3,
        "zoo/bear": 1,
        "heads/norm": 1,
        "time/a": 1,
    }
    run = read_run(write(tmp_path / "r", {"iteration": 1, **values}))
    panels = {panel.title: panel.keys for panel in choose_panels([run])}
    assert panels == {
        "KL per live decision": ("loss/kl",),
        "loss": ("loss/policy",),
        "zoo: lion": ("zoo/lion@1", "zoo/lion@2"),
        "zoo": ("zoo/bear",),
        "heads": ("heads/norm",),
        "seconds per iteration": ("time/a",),
    }


def test_dials_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run = read_run(
        write(
            tmp_path / "r",
            {"iteration": 1, "cost/E@14": 1, "cost/E@5": 1, "cost/E@10": 1, "cost/E": 2},
        )
    )
    assert choose_panels([run])[0].keys == ("cost/E", "cost/E@5", "cost/E@10", "cost/E@14")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they are when they are written."""
    seen: list[Figure] = []
    real = Figure.savefig

    def savefig(self: Figure, *args: Any, **options: Any) -> None:
        seen.append(self)
        real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def titled(figure: Figure, start: str) -> Any:
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(start)]
    return found


def labelled(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_a_whole_run(
    tmp_path: Path, figures: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_up(tmp_path / "r")
    plot.main([str(folder)])
    out = folder / "curves.png"
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert min(picture.size) > 1000
    (figure,) = figures
    assert len(figure.axes) == 13 + 2 + 1
    energy = titled(figure, "equivalent steps")
    assert list(labelled(energy)) == [f"{dial}" for dial in DIALS]
    dotted = [line.get_ydata()[0] for line in energy.lines if line.get_linestyle() == ":"]
    assert dotted == list(DIALS)
    run = read_run(folder)
    eight = labelled(energy)["8"]
    np.testing.assert_array_equal(eight.get_ydata(), smooth(run.values["cost/E@8"], 3))
    entropy = titled(figure, "entropy")
    floors = {float(line.get_ydata()[0]) for line in entropy.lines if line.get_linestyle() == ":"}
    assert floors == {-1.1, 0.29}
    assert titled(figure, "error m by dial").get_yscale() == "log"


def test_where_heads_act(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        {
            "iteration": i,
            "heads/step_shift@0.75": i,
            "heads/step_shift@0.25": 2 * i,
            "heads/step_shift@1": None,
        }
        for i in (1, 2, 3, 4, 5)
    ]
    plot.main([str(write(tmp_path / "r", *rows))])
    axes = titled(figures[0], "heads: step shift")
    lines = labelled(axes)
    assert list(lines) == ["iteration 1", "iteration 3", "iteration 5"]
    assert axes.xaxis_inverted()
    for i in (1, 3, 5):
        np.testing.assert_array_equal(lines[f"iteration {i}"].get_xdata(), [0.25, 0.75, 1])
        np.testing.assert_array_equal(lines[f"iteration {i}"].get_ydata(), [2 * i, i, math.nan])


def test_who_gets_how_much(tmp_path: Path, figures: list[Figure]) -> None:
    """Twenty iterations: the last five count."""
    lines = [
        {"iteration": i, "difficulty": hard, "nfe": 8 + hard + (i > 15) * 2, "dial": 8}
        for i in range(1, 21)
        for hard in (-1, 1)
    ]
    lines.append({"iteration": 20, "difficulty": None, "nfe": 99, "dial": 8})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    plot.main([str(write(tmp_path / "r", row(1, x=1), difficulty=text))])
    axes = titled(figures[0], "NFE by difficulty and dial, iterations 16 to 20")
    (bar,) = axes.containers
    x, y = bar.lines[0].get_data()
    assert x[[0, -1]].tolist() == [-1, 1]
    assert y[[0, -1]].tolist() == [9, 11]


def test_seeds_are_drawn_together(tmp_path: Path, figures: list[Figure]) -> None:
    folders = [
        write(tmp_path / f"seed{s}", *(row(i, x=i + s) for i in range(1, 5 - s))) for s in range(3)
    ]
    out = tmp_path / "deep" / "seeds.svg"
    plot.main([*map(str, folders), "--out", str(out)])
    assert out.read_text().startswith("<?xml")
    (figure,) = figures
    (axes,) = figure.axes
    thin = [line.get_ydata().tolist() for line in axes.lines if line.get_linewidth() < 1]
    thick = [line.get_ydata().tolist() for line in axes.lines if line.get_linewidth() > 1.5]
    assert thin == [[1, 2, 3, 4], [2, 3, 4], [3, 4]]
    assert thick == [[2, 3]]
    assert "seed0, seed1, seed2" in figure.get_suptitle()


def test_several_runs_are_written_beside_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write(tmp_path / name, row(1, x=1))
    monkeypatch.chdir(tmp_path)
    plot.main(["a", "b"])
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "curves.png"]


@pytest.mark.parametrize(
    "rows",
    [
        [row(1, x=None)],
        [row(1, x=1)],
        [row(0, x=5), row(0, x=6)],
        [{"iteration": 1, "heads/s@0.5": 1}],
        [{"iteration": 1, "policy/gradient_norm": 0}, {"iteration": 2, "policy/gradient_norm": -1}],
        [{"iteration": 1, "quality/m@8": None, "quality/m_prior@8": 0}],
        [{"iteration": i, **{f"time/phase_{j}": j for j in range(12)}} for i in (1, 2)],
        [{"iteration": 1, "reward/_under_score_": 1e300}],
    ],
    ids=["null", "one", "twice", "head", "log", "ratio", "many", "huge"],
)
def test_odd_runs_are_drawn_without_a_warning(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot.main([str(write(tmp_path / "$r$", *rows))])
    assert (tmp_path / "$r$" / "curves.png").stat().st_size > 1000


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        plot.main([str(argument) for argument in arguments])
    assert capsys.readouterr().out == ""
    message = str(error.value)
    assert message.startswith("plot: ")
    assert "\n" not in message
    return message


def test_what_is_no_run_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good", row(1, x=1))
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "missing", good / "metrics.jsonl"):
        assert f"RUN must be a folder with a metrics.jsonl, got '{folder}'" in fails(
            capsys, good, folder
        )
    assert "must be at least one row of metrics, got none" in fails(capsys, write(tmp_path / "x"))
    assert "must be at least one row of metrics" in fails(
        capsys, write(tmp_path / "x", {"iteration": 1})
    )
    assert "line 1 must be an object" in fails(
        capsys, write(tmp_path / "x", {"step": 1, "loss": 2})
    )
    assert "metric must be named group/name" in fails(
        capsys, write(tmp_path / "x", {"iteration": 1, "loss": 2})
    )
    assert "a/x must be a number or null, got 'high'" in fails(
        capsys, write(tmp_path / "x", row(1, x="high"))
    )
    assert "a/x must be a number that a float holds" in fails(
        capsys, write(tmp_path / "x", row(1, x=10**400))
    )
    assert "line 1 must be JSON" in fails(
        capsys, write(tmp_path / "x", row(1, x=1), difficulty="?\n")
    )
    assert not list(tmp_path.rglob("*.png"))


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^runs must hold at least one metric, got none$"):
        plot.draw([], tmp_path / "x.png")


def test_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good", row(1, x=1))
    for name in ("curves", "curves.xyz", "curves."):
        assert "--out must end in a format such as .png" in fails(
            capsys, good, "--out", tmp_path / name
        )
    assert "File exists" in fails(capsys, good, "--out", good / "metrics.jsonl" / "x.png")
    (tmp_path / "folder.png").mkdir()
    assert "Is a directory" in fails(capsys, good, "--out", tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "good"]


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = fails(capsys, write(tmp_path / "r", row(1, x=1)))
    assert message == "plot: plot needs matplotlib: pip install 'rapid3rt[plot]'"


def test_plotting_needs_neither_torch_nor_a_window(tmp_path: Path) -> None:
    """A laptop that looks at a run of a server: quick, and without the packages that train."""
    folder = write(tmp_path / "r", row(1, x=1))
    code = (
        "import sys; from training.plot import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'rapid3rt', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    root = str(Path(plot.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=root
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_what_is_measured_now_and_then_is_a_line(tmp_path: Path) -> None:
    """Validation has a number in every fifth row: drawn with gaps between, nothing would be seen of it."""
    with Logs(tmp_path, tracker="none", every=0) as logs:
        for i in range(1, 21):
            rare = {"quality/m@5": 0.1 / i, "quality/m_prior@5": 0.1} if i % 5 == 0 else {}
            logs.row(i, {"reward/total": float(i), **rare})
    run = read_run(tmp_path)
    panel = next(p for p in choose_panels([run]) if p.keys == ("quality/m@5",))
    axes = Figure().add_subplot()
    plot._paint_curves(axes, panel, [run])
    thin, thick, dotted = axes.lines
    for line in (thin, thick, dotted):
        assert line.get_xdata().tolist() == [5.0, 10.0, 15.0, 20.0]
        assert np.isfinite(line.get_ydata()).all()
    gap = np.array([1.0, np.nan, 3.0, 4.0])
    assert joined(np.arange(4.0), gap)[1] is gap  # a number that failed stays a gap

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from rapid3rt.runtime.report import Report
from rapid3rt.runtime.trace import Trace, TraceTick
from rapid3rt.types import COMPUTE, FORECAST_1, REUSE, ActionCosts


def tick(sigma, next_sigma, action=COMPUTE, level=0, density=1.0, cost=1.0):
    return TraceTick(
        sigma=sigma, next_sigma=next_sigma, action=action, level=level, density=density, cost=cost
    )


TRACE = Trace(
    model="tiny",
    family="sd3",
    ticks=4,
    sigmas=(1.0, 0.75, 0.5, 0.25, 0.0),
    images=(
        (
            tick(1.0, 0.75),
            tick(0.75, 0.5, REUSE, density=0.0, cost=0.25),
            tick(0.5, 0.25, level=2, density=0.5, cost=0.75),
            tick(0.25, 0.0, FORECAST_1, density=0.0, cost=0.25),
        ),
        (tick(1.0, 0.5), tick(0.5, 0.0, cost=0.75)),
    ),
    policy="threshold:0.1",
    budget=3,
    costs=ActionCosts(levels=(1.0, 0.9, 0.75), reuse=0.25, measured=True),
    tick_ms=(20.0, 8.0, 6.0, 2.0),
)


def test_nfe_and_equivalent_steps_are_the_sums():
    report = Report(TRACE)
    assert [image.nfe for image in report.images] == [2, 2]
    assert [image.equivalent_steps for image in report.images] == [2.25, 1.75]
    assert report.nfe == 2.0
    assert report.equivalent_steps == 2.0


def test_ms_is_shared_by_the_costs_of_each_tick():
    # tick 0: 20 halved; tick 1: 8 as .25 to .75; ticks 2 and 3 belong to image 0.
    report = Report(TRACE)
    assert [image.ms for image in report.images] == [10 + 2 + 6 + 2, 10 + 6]
    assert report.ms == 36.0


def test_a_tick_without_cost_belongs_to_nobody():
    free = tuple(tuple(replace(t, cost=0.0) for t in ticks) for ticks in TRACE.images)
    assert [image.ms for image in Report(replace(TRACE, images=free)).images] == [0.0, 0.0]


def test_without_times_there_are_no_ms():
    report = Report(replace(TRACE, tick_ms=None))
    assert report.ms is None
    assert report.speedup is None
    assert [image.ms for image in report.images] == [None, None]
    assert "(ms: all)" not in str(report)


def test_actions_have_one_entry_per_tick_of_the_run():
    first, second = Report(TRACE).images
    assert [a.kind for a in first.actions] == ["compute", "reuse", "compute", "forecast_1"]
    assert [a.kind for a in second.actions] == ["compute", "compute", "done", "done"]
    assert [a.sigma for a in second.actions] == [1.0, 0.5, 0.0, 0.0]
    assert (first.actions[2].level, first.actions[2].density, first.actions[2].cost) == (
        2,
        0.5,
        0.75,
    )
    assert (first.timeline, second.timeline) == ("C.2f", "CC  ")
    assert (first.density, first.reuses) == (0.75, 1)


def test_speedup_is_the_plain_time_over_ours():
    assert Report(TRACE, plain_tick_ms=18.0).speedup == 2.0


def test_the_table_shows_every_image_the_means_and_the_notes():
    text = str(Report(TRACE, notes=["budget clamped to 3"], plain_tick_ms=18.0))
    lines = text.splitlines()
    assert lines[0] == "policy threshold:0.1, 2 images, 4 ticks, budget 3, 2.00x faster than plain"
    assert lines[1].split() == ["image", "nfe", "equivalent", "reuse", "density", "ms", "timeline"]
    assert lines[3].split() == ["0", "2", "2.25", "1", "0.75", "20.0", "C.2f"]
    assert lines[4].split() == ["1", "2", "1.75", "0", "1.00", "16.0", "CC"]
    assert lines[6].split()[:6] == ["mean", "2.00", "2.00", "0.50", "0.88", "36.0"]
    assert lines[-1] == "note: budget clamped to 3"
    assert "estimated" not in text
    assert text.isascii()


def test_costs_nobody_measured_are_marked_estimated():
    report = Report(replace(TRACE, costs=ActionCosts()))
    assert report.estimated
    assert "estimated" in str(report)


def test_an_interrupted_run_says_so():
    cut = replace(TRACE, images=((tick(1.0, 0.75),), ()), interrupted=True)
    report = Report(cut)
    assert "interrupted" in str(report)
    assert report.images[1].nfe == 0


def test_save_writes_the_trace(tmp_path):
    report = Report(TRACE)
    report.save(tmp_path / "deep" / "t.json")
    assert Trace.load(tmp_path / "deep" / "t.json") == TRACE
    assert Trace.from_json(report.to_json()) == TRACE


@pytest.mark.parametrize("labels", [None, ["a red circle", "a long caption " * 9]])
def test_the_picture_is_drawn(tmp_path, labels):
    matplotlib = pytest.importorskip("matplotlib")
    backend = matplotlib.get_backend(auto_select=False)
    Report(TRACE).plot(tmp_path / "t.png", labels=labels)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.get_backend(auto_select=False) == backend


@pytest.mark.parametrize("label", ["a $\\foo{$ b", "costs $5^ and $6_", "_x", "$\\frac$"])
def test_dollars_in_labels_and_policies_are_no_formulas(tmp_path, label):
    pytest.importorskip("matplotlib")
    Report(replace(TRACE, policy=f"replay:{label}")).plot(tmp_path / "t.png", labels=[label, ""])


def test_plot_makes_its_folder_as_save_does(tmp_path):
    pytest.importorskip("matplotlib")
    Report(TRACE).plot(tmp_path / "new" / "deep" / "t.png")
    assert (tmp_path / "new" / "deep" / "t.png").exists()


def test_many_images_and_a_single_tick_are_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    one = replace(TRACE, ticks=1, images=((tick(1.0, 0.0),),) * 40, tick_ms=None)
    Report(one).plot(tmp_path / "t.png")


def test_labels_must_be_one_per_image(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"labels must have one entry per image \(2\), got 1"):
        Report(TRACE).plot(tmp_path / "t.png", labels=["only one"])


def test_without_matplotlib_one_line_names_the_extra(tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=r"^plot needs matplotlib: pip install 'rapid3rt\[plot\]'$"
    ):
        Report(TRACE).plot(tmp_path / "t.png")

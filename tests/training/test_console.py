# SPDX-License-Identifier: Apache-2.0
"""The screen of an iteration: what stands on it, what is marked, and that it is one screen."""

from __future__ import annotations

import math
import re

import pytest
from made_up_run import metrics

import training.console as console
from training.console import screen

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that has them: on a dumb one, or under NO_COLOR, rich gives none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_small_screen_by_hand() -> None:
    text = screen(
        "iteration 3",
        {
            "time/rollout": 10.0,
            "cost/E@14": 13.5,
            "cost/E@5": 5.25,
            "reward/total": -1.25,
            "entropy/step": -0.5,
            "entropy/step_floor": -1.0,
            "heads/step_shift@0.5": 1.0,
            "heads/norm": 3,
        },
    )
    assert text.splitlines() == [
        "iteration 3",
        "reward   total -1.25",
        "cost E   @5       5.25   @14      13.5",
        "entropy  step -0.5 (floor -1)",
        "time     rollout 10",
        "heads    norm 3",
    ]


def test_a_full_row_is_one_screen() -> None:
    lines = screen("iteration 40 of 80", metrics(40)).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert not any("shift" in line for line in lines), "pictures show where heads act"


def test_both_ways_say_the_same() -> None:
    rich = screen("iteration 40", metrics(40), colour=True)
    assert ESCAPES.search(rich)
    plain = screen("iteration 40", metrics(40))
    assert not ESCAPES.search(plain)
    stripped = [line.rstrip() for line in ESCAPES.sub("", rich).splitlines()]
    assert stripped == plain.splitlines()


def test_without_rich_a_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    assert screen("x", metrics(1), colour=True) == screen("x", metrics(1))


@pytest.mark.parametrize(
    ("row", "marked"),
    [
        ({"entropy/step": -1.5, "entropy/step_floor": -1.0}, "step -1.5 (floor -1) !"),
        ({"policy/kl": math.nan}, "kl nan !"),
        ({"policy/kl": -math.inf}, "kl -inf !"),
        ({"cost/E@8": math.nan}, "@8      nan !"),
    ],
)
def test_what_is_wrong_is_marked(row: dict[str, float], marked: str) -> None:
    assert screen("", row).endswith(marked)
    red = screen("", row, colour=True)
    assert "\x1b[1;31m" in red


def test_nothing_is_marked_in_a_healthy_row() -> None:
    assert "!" not in screen("", metrics(10))
    assert "\x1b[1;31m" not in screen("", metrics(10), colour=True)


def test_a_floor_alone_is_a_number_of_its_own() -> None:
    assert screen("", {"entropy/step_floor": -1.0}).endswith("step_floor -1")


@pytest.mark.parametrize("colour", [False, True])
def test_cells_stay_whole_on_a_narrow_screen(colour: bool) -> None:
    text = ESCAPES.sub("", screen("", metrics(40), width=50, colour=colour))
    for dial in (5, 6, 8, 10, 14):
        assert len(re.findall(rf"@{dial} +[\d.]+", text)) >= 4


@pytest.mark.parametrize("colour", [False, True])
def test_an_empty_row_is_its_title(colour: bool) -> None:
    assert ESCAPES.sub("", screen("iteration 0", {}, colour=colour)).strip() == "iteration 0"

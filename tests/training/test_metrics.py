# SPDX-License-Identifier: Apache-2.0
"""Names of metrics, and files of lines that kills, resumes and strangers cannot spoil."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.metrics import JsonLines, Name, checked, finite_or_none, read_lines


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("reward/total", ("reward", "total", None)),
        ("cost/E@8", ("cost", "E", 8.0)),
        ("heads/step_shift@0.75", ("heads", "step_shift", 0.75)),
        ("quality/m@-1.5e-3", ("quality", "m", -0.0015)),
        ("a/b@.5", ("a", "b", 0.5)),
        ("a.b-c/d.e@12.", ("a.b-c", "d.e", 12.0)),
    ],
)
def test_a_name_has_two_or_three_parts(text: str, parts: tuple[str, str, float | None]) -> None:
    name = Name.parse(text)
    assert (name.group, name.name, name.at) == parts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "loss",
        "/x",
        "x/",
        "a/b/c",
        "a b/c",
        "a/b@",
        "a/b@x",
        "a/b@nan",
        "a/b@1@2",
        "a/b\n",
        "a/\u00e9",
    ],
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^metric must be named group/name or group/name@number, got '"
    ):
        Name.parse(text)


def test_values_are_real_numbers() -> None:
    values = {"a/b": 1, "a/c": np.float32(0.5), "a/d": True, "a/e": math.nan}
    plain = checked(values)
    assert [type(value) for value in plain.values()] == [float] * 4
    assert (plain["a/b"], plain["a/c"], plain["a/d"]) == (1.0, 0.5, 1.0)


@pytest.mark.parametrize("value", [torch.tensor(1.0), "1", None, 1j, np.ones(1)])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^a/b must be a number, got {type(value).__name__}$"):
        checked({"a/b": value})


def test_what_json_lacks_is_null() -> None:
    assert [finite_or_none(x) for x in (math.nan, math.inf, -math.inf, -0.5)] == [
        None,
        None,
        None,
        -0.5,
    ]


def rows(*iterations: int) -> list[dict[str, Any]]:
    return [{"iteration": i, "a/b": i / 3} for i in iterations]


def test_lines_come_back_as_they_were(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    assert lines.last is None
    assert not lines.path.exists()
    lines.append(rows(1))
    lines.append(rows(2, 3))
    lines.append([])
    assert lines.last == 3
    assert read_lines(lines.path) == rows(1, 2, 3)


def test_nothing_that_is_no_json_is_ever_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.append(rows(1))
    with pytest.raises(ValueError, match="JSON compliant"):
        lines.append([{"iteration": 2, "a/b": math.nan}])
    assert read_lines(lines.path) == rows(1)
    assert lines.last == 1


def test_going_back_drops_later_lines_and_keeps_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"iteration": 1,  "a/b": 1.10}\n{"iteration":2}\n{"iteration": 2, "x/y": 1}\n{"iteration": 3}\n'
    )
    before = path.read_bytes()
    lines = JsonLines(path)
    assert lines.last == 3
    lines.rewind(7)
    assert path.read_bytes() == before
    lines.rewind(2)
    assert (lines.last, path.read_bytes()) == (2, before[: before.rindex(b'{"iteration": 3')])
    lines.rewind(0)
    assert (lines.last, path.read_bytes()) == (None, b"")
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_kill_at_any_byte_costs_no_line_before(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    JsonLines(path).append(rows(1, 2, 3))
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = sum(cut >= end for end in ends)  # an object is whole with its brace
        assert read_lines(path) == rows(1, 2, 3)[:complete]
        lines = JsonLines(path)
        assert lines.last == (complete or None)
        lines.append(rows(complete + 1))
        assert read_lines(path) == rows(1, 2, 3, 4)[: complete + 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json\n{}", r"m\.jsonl: line 1 must be JSON, got: .*; delete the line$"),
        (b'{"iteration": 1}\n\n{"iteration": 2}\n', r"line 2 must be JSON"),
        (
            b"[1]\n",
            r"line 1 must be an object with a whole number 'iteration', got \[1\]; delete the line$",
        ),
        (b'{"iteration": 1.0}\n', r"got \{\"iteration\": 1\.0\}; delete the line$"),
        (b'{"iteration": true}\n', r"whole number 'iteration'"),
        (b"\xff\xfe\x00\n", r"line 1 must be JSON"),
        (b'{"step": 1}', r"whole number 'iteration'"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    for reader in (read_lines, JsonLines):
        with pytest.raises(ValueError, match=message):
            reader(path)
    assert path.read_bytes() == content


def test_a_reader_sees_whole_lines_while_another_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    JsonLines(path).append(rows(1))
    with path.open("a") as file:
        file.write(json.dumps(rows(2)[0])[:9])
    assert read_lines(path) == rows(1)
    assert path.read_bytes().count(b"\n") == 1, "a reader changes nothing"

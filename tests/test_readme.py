# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rapid3rt
from rapid3rt.planning.trace import Trace
from rapid3rt.policies.registry import GRAMMAR

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert len(names["images"]) == 2  # type: ignore[arg-type]
    assert len(Trace.load(tmp_path / "trace.json").images) == 2
    with pytest.raises(rapid3rt.StateError):
        rapid3rt.restore(names["pipe"])


def test_every_rule_is_in_the_table() -> None:
    table = README.read_text().replace("\\|", "|")
    assert all(f"`{rule}" in table or f"{rule}`" in table for rule in GRAMMAR.values())


def test_every_make_target_it_names_exists() -> None:
    makefile = (README.parent / "Makefile").read_text()
    named = set(re.findall(r"^make (\w[\w-]*)", README.read_text(), re.MULTILINE))
    assert named >= {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)

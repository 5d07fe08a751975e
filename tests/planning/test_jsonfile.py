# SPDX-License-Identifier: Apache-2.0
"""Where a document is written: links, modes, pipes, long names, folders."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from rapid3rt.planning.jsonfile import write_document

DOCUMENT = {"format": "test", "version": 1}


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    link, target = tmp_path / "link.json", tmp_path / "deep" / "target.json"
    link.symlink_to(target)
    for _ in range(2):  # a target that is not there yet, then one that is
        write_document(link, DOCUMENT)
        assert link.is_symlink()
        assert json.loads(target.read_text()) == DOCUMENT
    assert [p.name for p in target.parent.iterdir()] == ["target.json"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "t.json"
    path.write_text("old")
    path.chmod(mode)
    write_document(path, DOCUMENT)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert json.loads(path.read_text()) == DOCUMENT


def test_a_new_file_is_as_public_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    write_document(tmp_path / "t.json", DOCUMENT)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_document(pipe, DOCUMENT)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(10)
    assert json.loads(read[0]) == DOCUMENT


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    write_document(path, DOCUMENT)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_is_refused_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^path must be a file, got the folder '{tmp_path}'$"):
        write_document(tmp_path, DOCUMENT)
    assert not list(tmp_path.iterdir())

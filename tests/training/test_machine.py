# SPDX-License-Identifier: Apache-2.0
"""A record says where its numbers come from, and works where git and /proc are missing."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch

from training.machine import machine


def test_a_record_is_plain_data_without_paths() -> None:
    found = machine()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert "/" not in json.dumps({**found, "processor": ""})


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine()["commit"] is None

# SPDX-License-Identifier: Apache-2.0
"""Two threads for every test, quiet libraries, devices that are missing skip with a reason, golden files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option behind `make golden`."""
    parser.addoption("--write-golden", action="store_true", help="write golden files anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    has_cuda = torch.cuda.is_available()
    has_sm90 = has_cuda and torch.cuda.get_device_capability() == (9, 0)
    for item in items:
        if "cuda" in item.keywords and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if "sm90" in item.keywords and not has_sm90:
            item.add_marker(pytest.mark.skip(reason="no GPU of compute capability 9.0"))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """A test that changes the number of threads leaves no trace."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Compare a JSON value with `tests/golden/NAME.json`; with --write-golden, write it."""

    def compare(name: str, value: Any) -> None:
        path = GOLDEN / f"{name}.json"
        if request.config.getoption("--write-golden"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(json.dumps(value, separators=(",", ":")) + "\n")
        assert json.loads(path.read_text()) == value, (
            f"{path} differs; if that is meant: make golden"
        )

    return compare

# SPDX-License-Identifier: Apache-2.0
"""The makers of the runtime's tests serve here too; one thread, since matrices of 64 rows gain nothing from two."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> None:
    gc.collect()
    gc.freeze()

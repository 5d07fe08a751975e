# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped and goes on gives the same weights, draws and rows as one that never was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.checkpoint import (
    Checkpoints,
    load_optimiser_state,
    optimiser_state,
    random_state,
    set_random_state,
)
from training.logs import Logs

RECIPE = {"seed": 3, "rate": 0.01}
Weights = list[torch.Tensor]


class Stopped(Exception):
    """The process died here."""


@pytest.fixture(autouse=True)
def _generators_as_they_were() -> Iterator[None]:
    before = random_state()
    yield
    set_random_state(before)


def begin() -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(RECIPE["seed"])
    np.random.seed(3)
    random.seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=RECIPE["rate"], betas=(0.8, 0.95))


def update(model: torch.nn.Sequential, optimiser: torch.optim.Optimizer) -> float:
    """One step that draws from every generator."""
    x = torch.randn(16, 4) * np.random.standard_normal() + random.gauss(0, 1)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def train(folder: Path, until: int, *, every: int = 3, stop: int | None = None) -> Weights:
    """The loop of a trainer: goes on from the newest checkpoint; may die after the row of an iteration."""
    model, optimiser = begin()
    average, start = 0.0, 0
    checkpoints = Checkpoints(folder / "checkpoints", fingerprint=RECIPE, keep_last=2)
    with Logs(folder, tracker="none", every=0) as logs:
        if checkpoints.latest() is not None:
            loaded = checkpoints.load()
            state: dict[str, Any] = loaded["state"]
            model.load_state_dict(state["model"])
            load_optimiser_state(optimiser, state["optimiser"])
            set_random_state(state["random"])
            average, start = state["average"], loaded["iteration"]
        logs.rewind(start)
        for i in range(start + 1, until + 1):
            average = 0.9 * average + 0.1 * update(model, optimiser)
            logs.row(i, {"loss/mean": average})
            if i == stop:
                raise Stopped
            if i % every == 0:
                state = {"model": model.state_dict(), "optimiser": optimiser_state(optimiser)}
                checkpoints.save(
                    i, {**state, "random": random_state(), "average": average}, score=-average
                )
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("stops", [(4,), (3, 3, 9), (1, 2, 11), (5, 4)])
def test_a_stopped_run_ends_like_one_that_never_was(tmp_path: Path, stops: tuple[int, ...]) -> None:
    straight = train(tmp_path / "straight", 12)
    for stop in stops:
        with pytest.raises(Stopped):
            train(tmp_path / "stopped", 12, stop=stop)
    stopped = train(tmp_path / "stopped", 12)
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))
    one, other = (
        (tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "stopped")
    )
    assert one == other
    assert one.count(b"\n") == 12

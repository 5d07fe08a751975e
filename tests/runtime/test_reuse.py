# SPDX-License-Identifier: Apache-2.0
"""Residuals are kept for policies that may reuse, and only for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_flux import call_flux, make_flux
from test_layouts import call, make_pipeline
from torch.multiprocessing.reductions import StorageWeakRef

import rapid3rt
from rapid3rt.runtime.twins.base import session_of
from rapid3rt.types import COMPUTE, REUSE, ComputeDecision, DenoiseState, Run, StepDecision


class Walk:
    """Walks the run's grid; from the third tick on it takes `later`."""

    name, leaves_grid = "walk", False

    def __init__(self, later: int, reuses: bool) -> None:
        self.later, self.reuses = later, reuses
        self.sigmas = torch.empty(0)

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        action = COMPUTE if state.tick < 2 else self.later
        return ComputeDecision(
            action=torch.full_like(state.nfe, action, dtype=torch.int8),
            sparsity=torch.zeros_like(state.nfe),
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=self.sigmas[state.step.long() + 1])


def bytes_kept(pipe: Any, policy: Any) -> int:
    """Memory of the residuals after the second tick of four."""
    seen: list[int] = []

    def look(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            seen.append(session_of(pipe.transformer)._state.cache.num_bytes)  # type: ignore[union-attr]
        return kwargs

    rapid3rt.accelerate(pipe, policy)
    try:
        call(pipe, 4, callback_on_step_end=look)
    finally:
        rapid3rt.restore(pipe)
    return seen[0]


def test_a_policy_that_never_reuses_costs_no_memory() -> None:
    pipe = make_pipeline("sd3", torch.float32)
    assert bytes_kept(pipe, Walk(COMPUTE, reuses=False)) == 0
    # Two images, two branches, 256 tokens of width 32, float32.
    assert bytes_kept(pipe, Walk(REUSE, reuses=True)) == 2 * 2 * 256 * 32 * 4


def test_a_policy_that_reuses_although_it_says_never_is_an_error() -> None:
    pipe = make_pipeline("sd3", torch.float32)
    plain = call(pipe, 4)
    rapid3rt.accelerate(pipe, Walk(REUSE, reuses=False))
    with pytest.raises(ValueError, match=r"action of policy 'walk' for image 0 .* reuses = False"):
        call(pipe, 4)
    rapid3rt.restore(pipe)
    assert torch.equal(plain, call(pipe, 4))


def test_a_cap_around_a_policy_of_the_users_own_keeps_residuals_to_end_with() -> None:
    pipe = make_pipeline("sd3", torch.float32)
    rapid3rt.accelerate(pipe, Walk(COMPUTE, reuses=False), budget=2)
    call(pipe, 4)
    report = rapid3rt.report(pipe)
    assert [i.nfe for i in report.images] == [2, 2]
    assert all(len(i.actions) == 4 for i in report.images)


def reference_and_embedded(
    pipe: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, StorageWeakRef]:
    """After the second tick: the session's reference for drift, and the memory of what was embedded in that tick."""
    rapid3rt.accelerate(pipe, "dense")
    session: Any = session_of(pipe.transformer)
    embed, embedded = session.adapter.embed, list[StorageWeakRef]()
    seen: list[tuple[torch.Tensor, StorageWeakRef]] = []

    def noting(*arguments: Any) -> Any:
        out = embed(*arguments)
        embedded.append(StorageWeakRef(out.image.untyped_storage()))
        return out

    def look(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            seen.append((session._state.reference, embedded[-1]))
        return kwargs

    monkeypatch.setattr(session.adapter, "embed", noting)
    run(pipe, 4, callback_on_step_end=look)
    return seen[0]


def test_under_guidance_the_reference_keeps_no_other_branch_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = make_pipeline("sd3", torch.float32)
    reference, embedded = reference_and_embedded(pipe, call, monkeypatch)
    assert embedded.expired()
    # Two images of 256 tokens of width 32, float32.
    assert reference.untyped_storage().nbytes() == reference.nbytes == 2 * 256 * 32 * 4


def test_without_guidance_the_reference_is_what_was_embedded_and_no_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, embedded = reference_and_embedded(make_flux("dev"), call_flux, monkeypatch)
    assert StorageWeakRef(reference.untyped_storage()) == embedded

# SPDX-License-Identifier: Apache-2.0
"""Calibration on the tiny pipeline: it improves, resumes without recomputing, and drives a run."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import rapid3rt
from rapid3rt.calibrate.allocate import fit
from rapid3rt.calibrate.measure import Stop
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.tiny.scenes import sample

PROMPTS = [s.caption for s in sample(2, 0, "calibration")]
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 8,
    "evaluations": 10,
    "call": {"max_sequence_length": 32},
    "progress": False,
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = rapid3rt.load_tiny("sd3")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_calibration_finds_a_better_grid_and_resumes(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's `search` is the function of that module.
    searching = importlib.import_module("rapid3rt.calibrate.search")
    monkeypatch.setattr(searching, "SEARCH_PROMPTS", 1)
    folder = rapid3rt.calibrate(pipe, PROMPTS, tmp_path / "policy", **SETTINGS)
    table = folder.provenance["mean_squared_error"]
    assert table["calibrated"]["6"] < table["plain"]["6"]
    assert folder.costs.measured
    assert folder.costs.reuse < 0.5 < folder.costs.levels[0]
    measured = json.loads((tmp_path / "policy" / "measurements.json").read_text())
    pairs = {key: len(value["errors"]) for key, value in measured.items() if " k=" in key}
    searched = [number for key, number in pairs.items() if key.endswith("first=1")]
    assert len(searched) >= SETTINGS["evaluations"]
    assert set(searched) == {1}
    assert {pairs[key] for key in pairs if not key.endswith("first=1")} == {2}
    calls = 0
    real = type(pipe).__call__

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "__call__", counted)
        again = rapid3rt.calibrate(pipe, PROMPTS, tmp_path / "policy", **SETTINGS)
    assert again == folder
    assert calls == 0
    assert PolicyFolder.load(tmp_path / "policy") == folder
    rapid3rt.accelerate(pipe, policy=str(tmp_path / "policy"), budget=5)
    try:
        pipe(
            PROMPTS,
            num_inference_steps=8,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(0),
        )
        assert [i.nfe for i in rapid3rt.report(pipe).images] == [5, 5]
    finally:
        rapid3rt.restore(pipe)
    with pytest.raises(ValueError, match="out must be a new folder"):
        rapid3rt.calibrate(pipe, PROMPTS[:1], tmp_path / "policy", **SETTINGS)


def _stops(signal: torch.Tensor) -> list[Stop]:
    return [Stop(u, [], (signal + 3 * (1 - u)).tolist()) for u in (1.0, 0.75, 0.5)]


def test_an_allocation_is_fitted_where_detail_tells_hard_images_and_only_there() -> None:
    torch.manual_seed(0)
    hardness = 1.5 * torch.randn(48, dtype=torch.float64)
    errors = {k: (hardness - 2 * math.log(k) - 5).exp() for k in (4, 6, 10, 14)}
    told = fit(_stops(hardness + 0.3 * torch.randn(48)), errors)
    assert told is not None
    assert [u for u, *_ in told] == [0.5, 0.75, 1.0]
    for u, offset, exponent in told:
        # Evaluations in proportion to c^(1 / 3) at p = 2, and around a mean of 1.
        assert 0.2 < exponent < 0.45
        given = (exponent * (hardness + 3 * (1 - u) - offset)).exp().mean()
        assert given == pytest.approx(1, abs=0.1)
    assert fit(_stops(torch.randn(48)), errors) is None
    assert fit(_stops(-hardness), errors) is None
    alike = {k: torch.full((48,), float(k) ** -2) for k in (4, 6, 10, 14)}
    assert fit(_stops(hardness), alike) is None
    assert fit(_stops(hardness[:3]), {k: e[:3] for k, e in errors.items()}) is None


def test_calibration_refuses_no_prompts_and_too_few_steps(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts must hold"):
        rapid3rt.calibrate(pipe, [], tmp_path)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 8"):
        rapid3rt.calibrate(pipe, PROMPTS, tmp_path, num_inference_steps=4)
    assert rapid3rt.check(pipe).supported

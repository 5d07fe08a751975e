# SPDX-License-Identifier: Apache-2.0
"""The bundled policies are what `python -m rapid3rt.tiny.policy` makes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rapid3rt.pipeline import model_id
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.tiny import ASSETS, load_tiny, policy
from rapid3rt.tiny.scenes import sample

MODELS = sorted(p.parent.name for p in ASSETS.glob("*/policy"))


@pytest.mark.parametrize("model", MODELS)
def test_a_bundled_policy_is_of_its_pipeline_and_of_this_recipe(model: str) -> None:
    folder = PolicyFolder.load(ASSETS / model / "policy")
    assert folder.model == model_id(load_tiny(model).transformer)
    assert folder.schedule.family == model
    assert folder.costs.measured
    assert folder.provenance["prompts"] == policy.NUM_PROMPTS
    assert folder.provenance["call"] == policy.CALL


def test_it_calibrates_on_captions_of_the_calibration_split(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def calibrate(pipe: Any, prompts: list[str], out: Path, **options: Any) -> Any:
        seen.update(options, pipe=type(pipe).__name__, prompts=prompts, out=out)
        return SimpleNamespace(provenance={"mean_squared_error": {"plain": {"6": 0.0123}}})

    monkeypatch.setattr(policy, "calibrate", calibrate)
    policy.main(["sd3", "--out", str(tmp_path), "--prompts", "3"])
    assert seen["pipe"] == "StableDiffusion3Pipeline"
    assert seen["prompts"] == [s.caption for s in sample(3, policy.SEED, "calibration")]
    assert seen["out"] == tmp_path
    assert seen["call"] == policy.CALL
    assert "12.300" in capsys.readouterr().out

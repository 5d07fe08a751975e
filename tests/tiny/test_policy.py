# SPDX-License-Identifier: Apache-2.0
"""The bundled policies are what `rapid3rt.tiny.policy` makes and `training.run tiny-MODEL-allocation` adds to it."""

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
    searched = folder.provenance["searched"]
    assert searched["prompts"] == policy.NUM_PROMPTS
    assert searched["call"] == policy.CALL
    assert folder.heads.config.heads == ("allocation",)
    assert folder.provenance["recipe"]["name"] == f"tiny-{model}-allocation"
    costs = [dial.equivalent_steps for dial in folder.calibration]
    assert costs[0] < 5 < 14 < costs[-1]


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

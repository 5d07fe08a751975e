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
from diffusers import (
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from PIL import Image
from safetensors.torch import save_file

import rapid3rt
from rapid3rt.calibrate import measure
from rapid3rt.calibrate.allocate import fit
from rapid3rt.calibrate.arguments import check_call, told_apart
from rapid3rt.calibrate.measure import Bench, Stop
from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.planning import sparsity
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.tiny.scenes import sample

PROMPTS = [s.caption for s in sample(2, 0, "calibration")]
CALL: dict[str, Any] = {"max_sequence_length": 32}
PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 8,
    "evaluations": 10,
    "call": CALL,
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
    fits = {key for key in measured if key.startswith("fit ")}
    assert len(fits) == 4  # k of 4, 5, 6 and 8: the first prompt is fitted, the second one judges
    pairs = {
        key: len(value["errors"])
        for key, value in measured.items()
        if " k=" in key and key not in fits
    }
    searched = [number for key, number in pairs.items() if key.endswith("first=1")]
    assert len(searched) >= SETTINGS["evaluations"]
    assert set(searched) == {1}
    judged = {key for key in pairs if key.endswith("pairs=1")}
    assert len(judged) == 2 * len(fits)
    assert {pairs[key] for key in judged} == {1}
    others = {key for key in pairs if not key.endswith("first=1")} - judged
    assert {pairs[key] for key in others} == {2}
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": []}, "prompts must be a list of at least one prompt, got none"),
        ({"prompts": "ab"}, "prompts must be a list of at least one prompt, got 'ab'"),
        ({"evaluations": 0}, "evaluations must be an integer of at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be an integer of at least 1, got -1"),
        ({"num_inference_steps": 8.0}, "num_inference_steps must be an integer .*, got 8.0"),
        ({"num_inference_steps": 7}, "num_inference_steps must be at least 8, got 7"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    pipe: Any, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rapid3rt.calibrate(
            pipe, **{"prompts": PROMPTS, "out": tmp_path / "new", **SETTINGS, **wrong}
        )
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_accelerated_cannot_be_calibrated(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="transformer must be of a supported family"):
        rapid3rt.calibrate(None, PROMPTS, tmp_path / "new", **SETTINGS)
    rapid3rt.accelerate(pipe, "dense")
    try:
        with pytest.raises(StateError):
            rapid3rt.calibrate(pipe, PROMPTS, tmp_path / "new", **SETTINGS)
    finally:
        rapid3rt.restore(pipe)
    assert not (tmp_path / "new").exists()


def test_measurements_belong_to_weights_scheduler_and_prompts(tmp_path: Path) -> None:
    def bench(prompts: list[str] = PROMPTS) -> Bench:
        return Bench(pipe, prompts, tmp_path, 8, 0, 8, dict(SETTINGS["call"]), False)

    pipe = rapid3rt.load_tiny("sd3")
    first = bench()
    first.remember("a number", lambda: 5)
    assert bench().remember("a number", lambda: 6) == 5
    images = torch.ones(2, 3, 4, 4)
    save_file({"images": images}, tmp_path / "references.safetensors", {"calibration": first.key})
    assert torch.equal(bench().reference(), images)
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config, shift=1.0)
    with pytest.raises(ValueError, match="out must be a new folder or one of the same calibration"):
        bench()
    pipe.scheduler = own
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 0.1
    with pytest.raises(ValueError, match="made with another model, other weights, scheduler"):
        bench()
    (tmp_path / "measurements.json").unlink()
    other = bench()
    other.images = lambda *_arguments, **_options: (torch.zeros(2, 3, 4, 4), [])  # type: ignore[method-assign]
    assert not other.reference().any()  # those of the other weights were not taken


# A ControlNet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def controlled() -> Any:
    """The tiny pipeline with a ControlNet of two blocks."""
    tiny = rapid3rt.load_tiny("sd3")
    torch.manual_seed(1)
    net = SD3ControlNetModel.from_transformer(
        tiny.transformer, num_layers=2, num_extra_conditioning_channels=0
    )
    pipe = StableDiffusion3ControlNetPipeline(**tiny.components, controlnet=net.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({}, "none"),
        ({"control_image": None}, "none"),
        ({"control_image": []}, "none"),
        ({"control_image": torch.rand(2, 3, 64, 64)}, "2"),
        ({"control_image": [PICTURE, PICTURE]}, "2"),
    ],
    ids=["missing", "None", "empty", "a batch", "two"],
)
def test_a_controlnet_is_calibrated_with_one_picture_or_not_at_all(
    controlled: Any, tmp_path: Path, given: dict[str, Any], got: str
) -> None:
    message = rf"call\['control_image'\] must be one picture for all prompts .*, got {got}$"
    with pytest.raises(ValueError, match=message):
        rapid3rt.calibrate(
            controlled, PROMPTS, tmp_path / "new", **{**SETTINGS, "call": {**CALL, **given}}
        )
    assert not (tmp_path / "new").exists()
    controlled.controlnet = SD3MultiControlNetModel([controlled.controlnet] * 2)
    check_call(controlled, {"control_image": [PICTURE, torch.rand(1, 3, 64, 64)]})


@pytest.mark.slow
def test_costs_include_the_controlnet_and_belong_to_it(
    controlled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench() -> Bench:
        return Bench(controlled, PROMPTS, tmp_path, 4, 0, 8, call, False)

    monkeypatch.setattr(measure, "COST_BATCH", 1)
    call, calls = {**CALL, "control_image": PICTURE, "height": 32, "width": 32}, []
    first = bench()
    controlled.controlnet.register_forward_hook(lambda *_: calls.append(0))
    first.costs()
    # Three times: four steps of the plain pipeline and of each level, and the one that is then reused.
    assert len(calls) == 3 * (4 + 4 * sparsity.num_levels() + 1)
    call["control_image"] = PICTURE.copy()
    assert bench().key == first.key
    with torch.no_grad():
        controlled.controlnet.pos_embed.proj.bias += 0.1
    with pytest.raises(ValueError, match="out must be a new folder or one of the same calibration"):
        bench()


def test_arguments_are_told_apart_by_what_they_hold() -> None:
    plain = {"guidance_scale": 3.5, "height": 64, "sizes": [1, (2, 3)], "kwargs": {"scale": 1}}
    assert told_apart(plain) == sorted(map(str, plain.items()))
    large = torch.zeros(100, 100)
    for value in (large, large.bfloat16(), large.numpy(), PICTURE, torch.tensor(1.0)):
        other = value.copy() if hasattr(value, "copy") else value.clone()
        for nest in (lambda x: x, lambda x: [x], lambda x: {"of": (x,)}):
            assert told_apart({"a": nest(value)}) == told_apart({"a": nest(other)})
    changed = large.clone()
    changed[50, 50] = 1  # which printing a large tensor leaves out
    assert told_apart({"a": changed}) != told_apart({"a": large})
    assert told_apart({"a": PICTURE.rotate(90)}) != told_apart({"a": PICTURE})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff"])
def test_damaged_measurements_are_named(pipe: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "measurements.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"measurements\.json must be|out must be a new folder"):
        rapid3rt.calibrate(pipe, PROMPTS, tmp_path, **SETTINGS)


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


def test_a_file_that_was_cut_off_is_made_again(pipe: Any, tmp_path: Path) -> None:
    bench = Bench(pipe, PROMPTS, tmp_path, 8, 0, 2, dict(CALL), False)
    made = bench.keep("x", lambda: {"a": torch.ones(3)})
    path = tmp_path / "x.safetensors"
    for content in (path.read_bytes()[:-4], b""):
        path.write_bytes(content)
        again = bench.keep("x", lambda: {"a": torch.ones(3)})
        assert torch.equal(again["a"], made["a"])
        assert bench.keep("x", lambda: pytest.fail("made again"))["a"].tolist() == [1.0] * 3

# SPDX-License-Identifier: Apache-2.0
"""Bad input gives one clear error, before a transformer block is computed, and leaves the pipeline usable.

Where an error can only come later (a policy answers step by step), the test says after how many ticks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from test_layouts import call, make_pipeline

import rapid3rt
from rapid3rt.ops import flex
from rapid3rt.policies import FixedPlan, ScheduleTick, WarpFamily, save_schedule
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.types import (
    FORECAST_1,
    ActionCosts,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """Matrices of 64 rows gain nothing from a second one."""
    torch.set_num_threads(1)


def make(**scheduler: Any) -> Any:
    """A plain tiny SD3 pipeline, always with the same weights."""
    return make_pipeline("sd3", torch.float32, **scheduler)


@pytest.fixture
def pipe() -> Any:
    return make()


def run(pipe: Any, steps: int = 4, **kwargs: Any) -> torch.Tensor:
    """Latents of two images of 8 x 8 tokens."""
    return call(pipe, steps, (8, 8), **kwargs)


@cache
def plain(steps: int = 4) -> torch.Tensor:
    """What the plain pipeline gives."""
    return run(make(), steps)


@contextmanager
def blocks(pipe: Any) -> Iterator[list[int]]:
    """A list that grows by one whenever the first transformer block is called."""
    calls: list[int] = []
    first = pipe.transformer.transformer_blocks[0]
    handle = first.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def refuses(
    pipe: Any, error: type[Exception], match: str, action: Callable[[], Any], computed: int = 0
) -> None:
    """The action raises this error, in one line, after so many transformer blocks; hooks and slots are as before."""
    with blocks(pipe) as calls, pytest.raises(error, match=match) as caught:
        action()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(calls) == computed
    assert "forward" not in pipe.transformer.__dict__


def refuses_to_accelerate(pipe: Any, error: type[Exception], match: str, **arguments: Any) -> None:
    """`accelerate` raises, and the pipeline is the plain one that it was."""
    parts = pipe.transformer, pipe.scheduler
    refuses(pipe, error, match, lambda: rapid3rt.accelerate(pipe, **arguments))
    assert (pipe.transformer, pipe.scheduler) == parts
    assert type(pipe.transformer) is SD3Transformer2DModel
    assert torch.equal(run(pipe), plain())


# Names and numbers ---------------------------------------------------------------------------------------------------

NAMES = {
    "treshold:0.1": r"policy must be one of threshold:X.*steps:K.*got 'treshold:0\.1'",
    "Step:5": r"policy must be one of steps:K.*got 'Step:5'",
    "contoller:0.1": r"policy must be one of controller:TOL.*got 'contoller:0\.1'",
    "fast": r"policy must be one of .*dense.*got 'fast'",
    "steps:0": r"steps must be an integer of at least 1, got 0",
    "steps:-3": r"policy 'steps' must be written steps:K.*got 'steps:-3'",
    "steps:x": r"policy 'steps' must be written steps:K.*got 'steps:x'",
    "steps:2.5": r"policy 'steps' must be written steps:K.*got 'steps:2\.5'",
    "steps:": r"policy 'steps' must be written steps:K.*got 'steps:'",
    "steps": r"policy 'steps' must be written steps:K.*got 'steps'",
    "steps:5/foo": r"policy 'steps' must be written steps:K\[/trim\]\[/ab2\|/auto\], got 'steps:5/foo'",
    "steps:5/trim/trim": r"policy 'steps' must be written steps:K.*got 'steps:5/trim/trim'",
    "threshold:-1": r"threshold must be a finite number of at least 0, got -1",
    "threshold:nan": r"threshold must be a finite number.*got nan",
    "threshold:inf": r"threshold must be a finite number.*got inf",
    "threshold:little": r"policy 'threshold' must be written threshold:X.*got 'threshold:little'",
    "threshold:0.1/trim": r"policy 'threshold' must be written.*got 'threshold:0\.1/trim'",
    "controller:0": r"tolerance must be a number above 0 and at most 1, got 0",
    "controller:2": r"tolerance must be a number above 0 and at most 1, got 2",
    "controller:nan": r"tolerance must be a number above 0.*got nan",
    "dense:3": r"policy 'dense' must be written dense, got 'dense:3'",
    "schedule:": r"policy 'schedule' must be written schedule:FILE, got 'schedule:'",
    "replay": r"policy 'replay' must be written replay:FILE, got 'replay'",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_name_is_unknown_or_malformed(pipe: Any, name: str) -> None:
    refuses_to_accelerate(pipe, ValueError, NAMES[name], policy=name)


def test_an_unknown_name_lists_every_known_one(pipe: Any) -> None:
    for known in ("dense", "steps:", "threshold:", "controller:", "schedule:", "replay:"):
        refuses_to_accelerate(pipe, ValueError, f"policy must be one of .*{known}", policy="none")


def test_a_hub_id_that_cannot_be_had_is_named(pipe: Any) -> None:
    refuses_to_accelerate(
        pipe, ValueError, r"policy 'no-one/nothing' is neither a folder", policy="no-one/nothing"
    )


def test_a_folder_that_cannot_be_one_is_named(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    wrong = {
        "mine": "or a policy folder that is here, got 'mine'",
        "./mine": "a folder that exists, got './mine', which is not there",
        "a/b/mine": "a folder that exists, got 'a/b/mine', which is not there",
        "./run:1": "a folder that exists, got './run:1', which is not there",
        str(tmp_path / "config.json"): "which is a file",
        "config.json": "which is a file",
        "empty": "policy must be a folder with a config.json, got 'empty'",
    }
    for policy, match in wrong.items():
        refuses_to_accelerate(pipe, ValueError, match, policy=policy)


def test_a_folder_may_have_a_colon_in_its_name_and_be_a_path(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = WarpFamily(family="sd3", num_ticks=28, shift=3.0, order=1, knots=((0.5, 0.4),))
    folder = PolicyFolder(model="M", schedule=schedule, costs=ActionCosts(), provenance={})
    folder.save(tmp_path / "run:1")
    monkeypatch.chdir(tmp_path)
    for policy in ("run:1", "./run:1", str(tmp_path / "run:1"), tmp_path / "run:1", Path("run:1")):
        rapid3rt.accelerate(pipe, policy, budget=2)
        run(pipe)
        assert {image.nfe for image in rapid3rt.report(pipe).images} == {2}
        rapid3rt.restore(pipe)
    (tmp_path / "run:1" / "schedule.json").unlink()
    refuses_to_accelerate(pipe, ValueError, "must hold a schedule.json, got none", policy="run:1")


def test_an_object_is_no_policy(pipe: Any) -> None:
    class Half:
        def begin(self, run: Run) -> None: ...

    match = r"policy must be a name or have begin, decide_compute and decide_step, got"
    for thing in (None, 5, Half(), ["dense"]):
        refuses_to_accelerate(pipe, ValueError, f"{match} {type(thing).__name__}", policy=thing)


def test_a_policy_class_is_no_policy(pipe: Any) -> None:
    refuses_to_accelerate(pipe, ValueError, "policy must be .*got", policy=Own)


def test_a_folder_of_the_users_does_not_change_what_a_rule_means(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dense").mkdir()
    monkeypatch.chdir(tmp_path)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(run(pipe), plain())


DIALS: list[tuple[dict[str, Any], str]] = [
    ({"budget": 0}, r"budget must be an integer of at least 1, got 0"),
    ({"budget": -1}, r"budget must be an integer of at least 1, got -1"),
    ({"budget": True}, r"budget must be an integer of at least 1, got True"),
    ({"budget": 2.5}, r"budget must be an integer of at least 1, got 2\.5"),
    ({"budget": "3"}, r"budget must be an integer of at least 1, got '3'"),
    ({"speed": 0.5}, r"speed must be .*at least 1, got 0\.5"),
    ({"speed": 0}, r"speed must be .*at least 1, got 0"),
    ({"speed": -2.0}, r"speed must be .*at least 1, got -2\.0"),
    ({"speed": NAN}, r"speed must be .*at least 1, got nan"),
    ({"speed": INF, "policy": "dense"}, r"speed must be .*at least 1, got inf"),
    ({"budget": 2, "speed": 2.0}, r"budget and speed must not both be given.*2.*2\.0"),
    ({"attention": "slow"}, r"attention must be 'exact' or 'fast', got 'slow'"),
    ({"attention": None}, r"attention must be 'exact' or 'fast', got None"),
    ({"backend": "cuda"}, r"backend must be one of native, flex, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("arguments", "match"), DIALS, ids=lambda x: str(x)[:40])
def test_an_argument_is_out_of_range(pipe: Any, arguments: dict[str, Any], match: str) -> None:
    refuses_to_accelerate(pipe, ValueError, match, **arguments)


@pytest.mark.parametrize("speed", [INF, True, "2"])
def test_a_speed_that_is_no_finite_number_is_refused_by_the_automatic_policy_too(
    pipe: Any, speed: Any
) -> None:
    refuses_to_accelerate(pipe, ValueError, f"speed must be .*got {speed!r}", speed=speed)


def test_a_backend_that_is_not_there_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_CPU_TORCH", "3")
    refuses_to_accelerate(
        pipe, rapid3rt.UnsupportedError, r"backend 'flex' on device 'cpu'", backend="flex"
    )


@pytest.mark.parametrize("dial", [{"budget": 2}, {"speed": 2.0}, {"speed": 1}], ids=str)
@pytest.mark.parametrize("kind", ["steps:3", "steps:3/trim", "replay", "schedule"])
def test_a_dial_on_a_policy_that_fixes_its_evaluations(
    pipe: Any, kind: str, dial: dict[str, Any], files: dict[str, Path]
) -> None:
    policy = f"{kind}:{files[kind]}" if kind in files else kind
    refuses_to_accelerate(
        pipe,
        ValueError,
        f"{next(iter(dial))} must not be given with '{kind}",
        policy=policy,
        **dial,
    )


# Runs that are too short ---------------------------------------------------------------------------------------------

TOO_LONG: list[tuple[dict[str, Any], str]] = [
    ({"policy": "dense", "budget": 9}, r"budget must be 1 to 4 .*got 9"),
    ({"policy": "threshold:0.1", "budget": 5}, r"budget must be 1 to 4 .*got 5"),
    ({"budget": 9}, r"budget must be 1 to 4 .*got 9"),
    ({"policy": "steps:9"}, r"steps of policy 'steps:9' must be at most .*4.*got 9"),
    ({"policy": "steps:9/trim"}, r"steps:9/trim must fit the run: .*at most 4, got 9"),
    ({"policy": "steps:5/trim/ab2"}, r"steps:5/trim/ab2 must fit the run: .*at most 4, got 5"),
]


@pytest.mark.parametrize(("arguments", "match"), TOO_LONG, ids=lambda x: str(x)[:40])
def test_a_policy_wants_more_steps_than_the_call_has(
    pipe: Any, arguments: dict[str, Any], match: str
) -> None:
    rapid3rt.accelerate(pipe, **arguments)
    refuses(pipe, ValueError, match, lambda: run(pipe, 4))
    fresh = rapid3rt.accelerate(make(), **arguments)
    assert torch.equal(run(pipe, 9), run(fresh, 9))
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe), plain())


def test_a_grid_of_the_users_own_cannot_be_made_shorter(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "steps:3")
    sigmas = {"sigmas": [1.0, 0.8, 0.5, 0.2]}
    match = r"policy 'steps:3' sets its own grid and cannot follow sigmas="
    refuses(pipe, rapid3rt.UnsupportedError, match, lambda: run(pipe, 4, **sigmas))
    assert torch.equal(run(pipe, 4), plain(3))
    rapid3rt.restore(pipe)
    expected = run(pipe, 4, **sigmas)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(run(pipe, 4, **sigmas), expected)


@pytest.mark.parametrize("policy", ["steps:3", "steps:3/trim", "controller:0.2"])
def test_a_policy_that_leaves_the_grid_under_something_that_counts_steps(
    pipe: Any, policy: str
) -> None:
    rapid3rt.accelerate(pipe, policy)
    usual = run(pipe, 4)
    cases: tuple[dict[str, Any], ...] = (
        {"callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=0.5), "images": 1},
        {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9},
    )
    for counting in cases:
        match = rf"policy '{policy}' .*counts something in steps.*threshold"
        refuses(pipe, rapid3rt.UnsupportedError, match, partial(run, pipe, 4, **counting))
    assert torch.equal(run(pipe, 4), usual)


# Pipelines that cannot be served, and calls out of order -------------------------------------------------------------


def auraflow() -> Any:
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
    )
    return AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make().vae,
        text_encoder=None,
        tokenizer=None,
    )


def unet() -> Any:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    net = UNet2DModel(8, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, **blocks)
    return DDPMPipeline(net, DDPMScheduler())


@pytest.mark.parametrize(
    ("family", "match"),
    [
        (
            auraflow,
            r"must be of a supported family \(sd3, flux, .*\), got AuraFlowTransformer2DModel",
        ),
        (
            unet,
            r"transformer must be of a supported family \(sd3, flux, .*\), got .*in DDPMPipeline",
        ),
    ],
)
def test_a_pipeline_family_has_no_adapter(family: Callable[[], Any], match: str) -> None:
    other = family()
    before = dict(other.components)
    with pytest.raises(rapid3rt.UnsupportedError, match=match) as caught:
        rapid3rt.accelerate(other)
    assert "\n" not in str(caught.value)
    assert all(c is before[name] for name, c in other.components.items())
    answer = rapid3rt.check(other)
    assert not answer.supported
    assert "transformer: not supported" in str(answer)


def test_a_thing_that_is_no_pipeline() -> None:
    with pytest.raises(rapid3rt.UnsupportedError, match=r"transformer must be .*in str"):
        rapid3rt.accelerate("a pipeline")
    for function in (rapid3rt.report, rapid3rt.restore):
        with pytest.raises(rapid3rt.StateError, match="must be accelerated first"):
            function("a pipeline")


def test_sigmas_that_rise() -> None:
    pipe = make(invert_sigmas=True)
    parts = pipe.transformer, pipe.scheduler
    match = r"scheduler option invert_sigmas must be off, got True"
    refuses(pipe, rapid3rt.UnsupportedError, match, lambda: rapid3rt.accelerate(pipe, "dense"))
    assert (pipe.transformer, pipe.scheduler) == parts
    assert "invert_sigmas" in str(rapid3rt.check(pipe))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(run(rapid3rt.accelerate(pipe, "dense")), plain())


def test_an_unknown_scheduler_is_refused_with_the_way_out(pipe: Any) -> None:
    pipe.scheduler = FlowMatchLCMScheduler(shift=3.0)
    torch.manual_seed(3)  # it draws noise of its own
    expected = run(pipe)
    match = r"scheduler must be a FlowMatchEuler.*got FlowMatchLCMScheduler; .*from_config"
    refuses(pipe, rapid3rt.UnsupportedError, match, lambda: rapid3rt.accelerate(pipe, "dense"))
    torch.manual_seed(3)
    assert torch.equal(run(pipe), expected)
    assert not rapid3rt.check(pipe).supported


def test_accelerating_twice(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "steps:3")
    match = r"must not be accelerated already.*rapid3rt\.restore"
    refuses(pipe, rapid3rt.StateError, match, lambda: rapid3rt.accelerate(pipe, "dense"))
    assert torch.equal(run(pipe, 6), plain(3))
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe), plain())


@pytest.mark.parametrize("function", [rapid3rt.report, rapid3rt.restore])
def test_a_plain_or_a_restored_pipeline_has_nothing_to_report_or_restore(
    pipe: Any, function: Callable[[Any], Any]
) -> None:
    for _ in range(2):
        refuses(pipe, rapid3rt.StateError, "must be accelerated first", lambda: function(pipe))
        assert torch.equal(run(pipe), plain())
        rapid3rt.accelerate(pipe, "threshold:0.4")
        run(pipe)
        rapid3rt.restore(pipe)


def test_a_report_before_the_first_call(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "dense")
    match = "call the pipeline first"
    refuses(pipe, rapid3rt.StateError, match, lambda: rapid3rt.report(pipe))
    assert torch.equal(run(pipe), plain())
    assert [image.nfe for image in rapid3rt.report(pipe).images] == [4, 4]


def test_set_timesteps_from_outside_and_from_another_pipeline(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "threshold:0.4")
    expected, match = run(pipe), r"set_timesteps .*must be called by that pipeline"
    refuses(pipe, rapid3rt.StateError, match, lambda: pipe.scheduler.set_timesteps(4))
    other = StableDiffusion3Pipeline(**{**make().components, "scheduler": pipe.scheduler})
    refuses(other, rapid3rt.StateError, match, lambda: run(other))
    assert torch.equal(run(pipe), expected)


def test_the_transformer_is_called_before_any_run(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "dense")
    match = r"transformer of an accelerated pipeline must be called by that pipeline"
    refuses(pipe, rapid3rt.StateError, match, lambda: pipe.transformer(**transformer_inputs()))
    assert torch.equal(run(pipe), plain())


def transformer_inputs() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (4, 4, 8, 8),
        "encoder_hidden_states": (4, 9, 32),
        "pooled_projections": (4, 64),
    }
    random = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    return {**random, "timestep": torch.full((4,), 500.0)}


def test_the_transformer_is_called_after_a_run(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "dense")
    run(pipe)
    match = r"must be called by that pipeline"
    refuses(pipe, rapid3rt.StateError, match, lambda: pipe.transformer(**transformer_inputs()))


@pytest.mark.parametrize("end", ["interrupted", "failed"])
def test_the_transformer_is_called_after_a_run_that_did_not_end(pipe: Any, end: str) -> None:
    def stop(pipe: Any, step: int, _t: Any, _kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1 and end == "failed":
            raise LookupError
        pipe._interrupt = True
        return {}

    rapid3rt.accelerate(pipe, "dense")
    with suppress(LookupError):
        run(pipe, callback_on_step_end=stop)
    match = r"must be called by that pipeline"
    refuses(pipe, rapid3rt.StateError, match, lambda: pipe.transformer(**transformer_inputs()))
    assert torch.equal(run(pipe), plain())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_scheduler_is_exchanged_after_accelerating(pipe: Any, steps: int) -> None:
    rapid3rt.accelerate(pipe, "dense")
    run(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=1.0)
    match = r"scheduler|that pipeline"
    refuses(pipe, rapid3rt.StateError, match, lambda: run(pipe, steps))


def test_the_transformer_is_exchanged_after_accelerating(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "dense")
    run(pipe)
    pipe.transformer = make().transformer
    with pytest.raises(rapid3rt.StateError, match="transformer"):
        run(pipe)


def test_there_is_a_way_back_after_the_transformer_was_exchanged(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, "dense")
    pipe.transformer = make().transformer
    with suppress(rapid3rt.StateError):
        rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(run(pipe), plain())


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good trace of four ticks and two images, and a good fixed schedule of the same grid."""
    folder = tmp_path_factory.mktemp("good")
    pipe = rapid3rt.accelerate(make(), "threshold:0.4")
    run(pipe)
    report = rapid3rt.report(pipe)
    report.save(folder / "trace.json")
    ticks = tuple(ScheduleTick(sigma=s) for s in report.trace.sigmas[:-1])
    save_schedule(FixedPlan(family="sd3", ticks=ticks), folder / "fixed.json")
    return {"replay": folder / "trace.json", "schedule": folder / "fixed.json"}


def test_the_good_files_are_taken(pipe: Any, files: dict[str, Path]) -> None:
    expected = run(rapid3rt.accelerate(make(), "threshold:0.4"))
    rapid3rt.accelerate(pipe, f"replay:{files['replay']}")
    assert torch.equal(run(pipe), expected)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"schedule:{files['schedule']}")
    assert torch.equal(run(pipe), plain())


def put(path: str, value: Any) -> Callable[[str], str]:
    """Set one field, such as `images.0.ticks.1.sigma`, of a JSON document."""

    def edit(text: str) -> str:
        document = place = json.loads(text)
        *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        for step in parents:
            place = place[step]
        place[last] = value
        return json.dumps(document)

    return edit


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda _: "", r"content must be one complete JSON document"),
    "truncated": (lambda text: text[: len(text) // 2], r"content must be one complete JSON"),
    "no JSON": (lambda _: "sigma: 1.0\n", r"content must be one complete JSON document"),
    "a list": (lambda _: "[1, 2]", r"content must be an object, got \[1, 2\]"),
    "foreign": (lambda _: '{"steps": [1]}', r"format must be present, got nothing"),
    "another format": (put("format", "comfy"), r"format must be 'rapid3rt\.\w+', got 'comfy'"),
    "wrong version": (put("version", 7), r"version must be 1, got 7"),
    "version as text": (put("version", "1"), r"version must be an integer.*got '1'"),
    "family missing": (put("family", None), r"family must be a string, got None"),
}
BROKEN_TRACE = {
    "ticks as text": (put("ticks", "four"), r"ticks must be an integer.*got 'four'"),
    "images as object": (put("images", {}), r"images must be a list, got \{\}"),
    "no images": (put("images", []), r"images must hold at least one image"),
    "NaN": (put("images.1.ticks.0.sigma", NAN), r"NaN is not a number"),
    "Infinity": (put("costs.reuse", INF), r"Infinity is not a number"),
    "sigma as text": (
        put("images.1.ticks.0.sigma", "x"),
        r"images\[1\]\.ticks\[0\]\.sigma must be a number, got 'x'",
    ),
    "unknown action": (
        put("images.0.ticks.1.action", "jump"),
        r"images\[0\]\.ticks\[1\]\.action must be one of compute.*got 'jump'",
    ),
    "order 4": (
        put("images.0.ticks.1.order", 4),
        r"images\[0\]\.ticks\[1\]\.order must be an integer in 0\.\.3, got 4",
    ),
    "rising sigmas": (put("sigmas", [0.5, 1.0, 0.0]), r"sigmas must never rise"),
    "an end above 0": (
        put("images.0.ticks.3.next_sigma", 0.001),
        r"images\[0\]\.ticks must end at sigma 0.*got 0\.001",
    ),
    "interrupted": (put("interrupted", True), r"must be of a finished run, got .*interrupted"),
}
BROKEN_SCHEDULE = {
    "unknown kind": (put("kind", "loop"), r"kind must be one of fixed, family, got 'loop'"),
    "no ticks": (put("ticks", []), r"ticks must have num_ticks = 4 entries, got 0"),
    "fewer ticks": (put("num_ticks", 9), r"ticks must have num_ticks = 9 entries, got 4"),
    "NaN": (put("ticks.2.sigma", NAN), r"NaN is not a number"),
    "sigma as list": (put("ticks.2.sigma", [1]), r"ticks\[2\]\.sigma must be a number, got \[1\]"),
    "a rise": (put("ticks.2.sigma", 0.99), r"ticks\[1\]\.sigma must be above the next one, 0\.99"),
    "reuse first": (put("ticks.0.action", "reuse"), r"ticks\[0\]\.action must be compute"),
    "order 4": (put("ticks.1.order", 4), r"ticks\[1\]\.order must be an integer in 0\.\.3, got 4"),
    "order 3 alone": (put("ticks.1.order", 3), r"ticks\[1\]\.weights must be present"),
    "negative level": (put("ticks.1.level", -1), r"ticks\[1\]\.level must be an integer.*got -1"),
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [("replay", case) for case in (*BROKEN, *BROKEN_TRACE)]
    + [("schedule", case) for case in (*BROKEN, *BROKEN_SCHEDULE)],
)
def test_a_broken_file_is_named_with_its_field(
    pipe: Any, kind: str, case: str, files: dict[str, Path], tmp_path: Path
) -> None:
    own = BROKEN_TRACE if kind == "replay" else BROKEN_SCHEDULE
    edit, match = (BROKEN | own)[case]
    path = tmp_path / "broken.json"
    path.write_text(edit(files[kind].read_text()))
    refuses_to_accelerate(pipe, ValueError, rf"broken\.json:? .*{match}", policy=f"{kind}:{path}")


@pytest.mark.parametrize("kind", ["replay", "schedule"])
def test_a_file_that_is_not_there_or_no_text(pipe: Any, kind: str, tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing.json", tmp_path / "binary.json"
    binary.write_bytes(b"\x89PNG\r\n\xff\xfe")
    refuses_to_accelerate(pipe, FileNotFoundError, r"missing\.json", policy=f"{kind}:{missing}")
    refuses_to_accelerate(
        pipe, ValueError, r"binary\.json: content must be UTF-8", policy=f"{kind}:{binary}"
    )
    refuses_to_accelerate(pipe, IsADirectoryError, tmp_path.name, policy=f"{kind}:{tmp_path}")


@pytest.mark.parametrize(
    ("kind", "path"), [("replay", "images.0.ticks.2"), ("schedule", "ticks.2")]
)
@pytest.mark.parametrize(("field", "value"), [("level", 9), ("action", "forecast_1")])
def test_a_file_with_a_decision_that_cannot_be_run(
    pipe: Any,
    kind: str,
    path: str,
    field: str,
    value: Any,
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    edited = tmp_path / "edited.json"
    edited.write_text(put(f"{path}.{field}", value)(files[kind].read_text()))

    def use() -> None:
        rapid3rt.accelerate(pipe, f"{kind}:{edited}")
        run(pipe)

    with blocks(pipe) as calls, pytest.raises((ValueError, rapid3rt.UnsupportedError), match=field):
        use()
    assert not calls


OTHER_RUNS: dict[str, tuple[Callable[[str], str] | None, dict[str, Any], str]] = {
    "model": (put("model", "Other-123"), {}, r"model 'Other-123' in the trace, 'SD3"),
    "family": (put("family", "flux"), {}, r"family 'flux' in the trace, 'sd3' in the run"),
    "steps": (None, {"steps": 5}, r"ticks 4 in the trace, 5 in the run"),
    "batch": (None, {"images": 3}, r"images 2 in the trace, 3 in the run"),
    "fewer images": (None, {"images": 1}, r"images 2 in the trace, 1 in the run"),
    "block size": (
        lambda text: put("block_kv", 64)(put("block_q", 64)(text)),
        {},
        r"block size \(64, 64\) in the trace, \(32, 32\) in the run",
    ),
    "grid": (None, {"sigmas": [1.0, 0.8, 0.5, 0.2]}, r"the grid of sigmas"),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_trace_of_another_run(
    pipe: Any, case: str, files: dict[str, Path], tmp_path: Path
) -> None:
    edit, arguments, difference = OTHER_RUNS[case]
    path = tmp_path / "other.json"
    text = files["replay"].read_text()
    path.write_text(edit(text) if edit else text)
    rapid3rt.accelerate(pipe, f"replay:{path}")
    match = rf"other\.json must be of the same run, got another: {difference}"
    refuses(pipe, ValueError, match, lambda: run(pipe, **{"steps": 4, **arguments}))
    if edit is None:
        assert torch.equal(run(pipe), run(rapid3rt.accelerate(make(), "threshold:0.4")))
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe), plain())


def test_a_fixed_schedule_of_another_run(pipe: Any, files: dict[str, Path], tmp_path: Path) -> None:
    text = files["schedule"].read_text()
    (tmp_path / "flux.json").write_text(put("family", "flux")(text))
    (tmp_path / "late.json").write_text(put("ticks.0.sigma", 0.95)(text))
    cases: tuple[tuple[Path, dict[str, Any], str], ...] = (
        (
            files["schedule"],
            {"steps": 3},
            r"fixed\.json must have at most the run's 3 ticks, got 4",
        ),
        (tmp_path / "flux.json", {}, r"family must be 'flux', for which .*flux\.json.* got 'sd3'"),
        (tmp_path / "late.json", {}, r"late\.json must start at the run's sigma 1, got 0\.95"),
    )
    for path, arguments, match in cases:
        rapid3rt.accelerate(pipe, f"schedule:{path}")
        refuses(pipe, ValueError, match, partial(run, pipe, **arguments))
        rapid3rt.restore(pipe)
        assert torch.equal(run(pipe), plain())


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    """A calibrated policy without a model to speak of."""
    schedule = WarpFamily(family="sd3", num_ticks=4, shift=3.0, order=2, knots=())
    folder = PolicyFolder(model="M", schedule=schedule, costs=ActionCosts(), provenance={})
    folder.save(tmp_path / "folder")
    return tmp_path / "folder"


def test_a_policy_folder_is_taken_and_says_that_it_is_of_another_model(
    pipe: Any, policy_folder: Path
) -> None:
    rapid3rt.accelerate(pipe, str(policy_folder), budget=2)
    run(pipe)
    report = rapid3rt.report(pipe)
    assert [image.nfe for image in report.images] == [2, 2]
    assert any("calibrated on M" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "edit", "match"),
    [
        ("config.json", None, r"policy must be a folder with a config\.json, got '.*folder'"),
        ("config.json", put("version", 2), r"config\.json: version must be 1, got 2"),
        ("config.json", put("kind", "heads"), r"config\.json: kind must be one of schedule"),
        ("config.json", put("reuse", "free"), r"config\.json: reuse must be a number, got 'free'"),
        ("config.json", put("levels", [-1]), r"config\.json: levels\[0\] must be in 0\.\.inf"),
        ("schedule.json", lambda _: "", r"schedule\.json: content must be one complete JSON"),
        ("schedule.json", put("knots", [[0.5, 2]]), r"schedule\.json: knots must rise strictly"),
        ("schedule.json", put("family", "flux"), r"folder' must be for a sd3 model, got .*flux"),
        ("config.json", put("levels", []), r"config\.json: levels must"),
    ],
)
def test_a_policy_folder_is_broken(
    pipe: Any,
    policy_folder: Path,
    name: str,
    edit: Callable[[str], str] | None,
    match: str,
) -> None:
    path = policy_folder / name
    if edit is None:
        path.unlink()
    else:
        path.write_text(edit(path.read_text()))
    refuses_to_accelerate(pipe, ValueError, match, policy=str(policy_folder))


# Policies of the user's own ------------------------------------------------------------------------------------------


class Own:
    """Dense, until told otherwise for a tick: what it answers there is `compute(good)` or `step(good)`."""

    name, leaves_grid, reuses = "own", False, True

    def __init__(
        self,
        tick: int = -1,
        compute: Callable[[ComputeDecision], Any] = lambda good: good,
        step: Callable[[StepDecision], Any] = lambda good: good,
    ) -> None:
        self.tick, self.compute, self.step = tick, compute, step

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> Any:
        good = ComputeDecision(
            action=torch.zeros_like(state.nfe, dtype=torch.int8),
            sparsity=torch.zeros_like(state.nfe),
        )
        return self.compute(good) if state.tick == self.tick else good

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> Any:
        good = StepDecision(next_sigma=self.sigmas[state.step.long() + 1])
        return self.step(good) if state.tick == self.tick else good


def acted(action: Any = None, sparsity: Any = None) -> Callable[[ComputeDecision], Any]:
    """An answer with another action or sparsity."""
    return lambda good: ComputeDecision(
        action=good.action if action is None else action,
        sparsity=good.sparsity if sparsity is None else sparsity,
    )


def stepped(
    next_sigma: Any = None, order: Any = None, weights: Any = None
) -> Callable[[StepDecision], Any]:
    """An answer with another next sigma, order or weights."""
    return lambda good: StepDecision(
        next_sigma=good.next_sigma if next_sigma is None else next_sigma,
        order=order,
        weights=weights,
    )


def int8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def refuses_the_answer(policy: Own, error: type[Exception], match: str, computed: int) -> None:
    """The answer raises after so many computed ticks; without it the same pipeline and policy then work."""
    pipe = rapid3rt.accelerate(make(), policy)
    refuses(pipe, error, match, lambda: run(pipe), computed)
    policy.tick = -1
    assert torch.equal(run(pipe), plain())
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe), plain())


def test_the_policy_of_these_tests_is_dense_when_nothing_is_wrong(pipe: Any) -> None:
    rapid3rt.accelerate(pipe, Own())
    assert torch.equal(run(pipe), plain())
    assert rapid3rt.report(pipe).policy == "own"


COMPUTE_ANSWERS: dict[str, tuple[Any, str]] = {
    "three actions": (acted(int8(0, 0, 0)), r"action of policy 'own' .*shape \(2,\), got \(3,\)"),
    "one action": (acted(int8(0)), r"action of policy 'own' must have shape \(2,\), got \(1,\)"),
    "scalar action": (acted(int8(0)[0]), r"action of policy 'own' .*shape \(2,\), got \(\)"),
    "a column": (acted(int8(0, 0)[:, None]), r"action of policy 'own' .*got \(2, 1\)"),
    "three levels": (
        acted(sparsity=int32(0, 0, 0)),
        r"sparsity of policy 'own' must have shape \(2,\), got \(3,\)",
    ),
    "level 4": (
        acted(sparsity=int32(0, 4)),
        r"sparsity of policy 'own' for image 1 must be 0 to 3, got 4",
    ),
    "level -1": (
        acted(sparsity=int32(-1, 0)),
        r"sparsity of policy 'own' for image 0 must be 0 to 3, got -1",
    ),
    "action 7": (
        acted(int8(0, 7)),
        r"action of policy 'own' for image 1 must be 0 \(compute\) or 1 \(reuse\), got 7",
    ),
    "action -1": (acted(int8(-1, 0)), r"action of policy 'own' for image 0 must be 0 .*got -1"),
}
# The first tick computes whatever is answered, so a wrong action shows in the second.
SHOWS_LATER = ("action 7", "action -1")


@pytest.mark.parametrize("tick", [0, 1, 3])
@pytest.mark.parametrize("case", COMPUTE_ANSWERS)
def test_an_answer_before_the_forward_has_a_wrong_shape_or_value(case: str, tick: int) -> None:
    answer, match = COMPUTE_ANSWERS[case]
    if tick == 0 and case in SHOWS_LATER:
        pipe = rapid3rt.accelerate(make(), Own(tick, compute=answer))
        assert torch.equal(run(pipe), plain())
        return
    refuses_the_answer(Own(tick, compute=answer), ValueError, match, computed=tick)


def test_a_forecast_is_refused_as_not_built_yet() -> None:
    answer = acted(int8(FORECAST_1, 0))
    match = r"action of policy 'own' for image 0 is a forecast"
    refuses_the_answer(Own(1, compute=answer), rapid3rt.UnsupportedError, match, computed=1)


def test_a_policy_that_said_it_never_reuses_does() -> None:
    policy = Own(2, compute=acted(int8(0, 1)))
    policy.reuses = False
    match = r"action of policy 'own' for image 1 .*reuses = False, got 1"
    refuses_the_answer(policy, ValueError, match, computed=2)


@pytest.mark.parametrize(
    "answer",
    [
        acted(torch.tensor([0.6, 0.2])),
        acted(torch.tensor([0.0, NAN])),
        acted(torch.tensor([True, False])),
        acted(torch.tensor([256, 0])),
        acted(sparsity=torch.tensor([0.5, 0.0])),
        acted(sparsity=torch.tensor([False, True])),
        acted(sparsity=torch.tensor([2**32, 0])),
    ],
    ids=["fraction", "nan", "bool", "wrap", "level fraction", "level bool", "level wrap"],
)
def test_an_answer_before_the_forward_has_a_wrong_dtype(answer: Any) -> None:
    match = r"(action|sparsity) of policy 'own'"
    refuses_the_answer(Own(1, compute=answer), ValueError, match, computed=1)


@pytest.mark.parametrize(
    ("half", "answer"),
    [
        ("compute", lambda _: None),
        ("compute", acted([0, 0])),
        ("step", lambda _: None),
        ("step", lambda good: good.next_sigma),
        ("step", stepped([0.0, 0.0])),
    ],
    ids=["none", "list", "no step", "bare tensor", "list of sigmas"],
)
def test_an_answer_is_no_decision(half: str, answer: Any) -> None:
    policy = Own(1, **{half: answer})
    refuses_the_answer(policy, ValueError, r"policy 'own'", computed=1 + (half == "step"))


@pytest.mark.parametrize("tick", [0, 2, 3])
@pytest.mark.parametrize("shape", [(1,), (3,), (), (2, 1)])
def test_next_sigma_has_a_wrong_shape(shape: tuple[int, ...], tick: int) -> None:
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    match = rf"next_sigma of policy 'own' must have shape \(2,\), got {got}"
    policy = Own(tick, step=stepped(torch.zeros(shape)))
    refuses_the_answer(policy, ValueError, match, computed=tick + 1)


@pytest.mark.parametrize("tick", [0, 2, 3])
@pytest.mark.parametrize("images", [(0,), (1,), (0, 1)])
def test_next_sigma_is_nan_for_some_images(images: tuple[int, ...], tick: int) -> None:
    """Found at the next plan; after the last tick at once."""

    def spoil(good: StepDecision) -> StepDecision:
        sigma = good.next_sigma.clone()
        sigma[list(images)] = NAN
        return StepDecision(next_sigma=sigma)

    listed = ", ".join(map(str, images))
    match = rf"next_sigma of policy 'own' must be a number, got nan for image {listed}$"
    refuses_the_answer(Own(tick, step=spoil), ValueError, match, computed=tick + 1)


def test_a_nan_for_an_image_that_is_done_is_nobodys_business(pipe: Any) -> None:
    class Early(Own):
        def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
            good = super().decide_step(state, velocity).next_sigma
            good[0] = 0.0 if state.tick == 1 else NAN if state.tick > 1 else good[0]
            return StepDecision(next_sigma=good)

    rapid3rt.accelerate(pipe, Early())
    image = run(pipe)
    assert image.isfinite().all()
    # Not bit for bit: from the third tick on it is computed without its neighbour.
    torch.testing.assert_close(image[1], plain()[1], rtol=1e-4, atol=1e-4)
    assert [i.nfe for i in rapid3rt.report(pipe).images] == [2, 4]


@pytest.mark.parametrize("value", [-0.5, -INF])
def test_next_sigma_below_zero_is_zero(pipe: Any, value: float) -> None:
    images = []
    for sigma in (value, 0.0):
        rapid3rt.accelerate(pipe, Own(2, step=stepped(torch.tensor([sigma, sigma]))))
        images.append(run(pipe))
        report = rapid3rt.report(pipe)
        assert [len(ticks) for ticks in report.trace.images] == [3, 3]
        assert all(ticks[-1].next_sigma == 0 for ticks in report.trace.images)
        rapid3rt.restore(pipe)
    assert images[0].isfinite().all()
    assert torch.equal(*images)


@pytest.mark.parametrize("value", [1.5, 1e30, INF])
def test_next_sigma_above_sigma_stands_still_and_every_image_ends(
    pipe: Any, value: float, tmp_path: Path
) -> None:
    latents: list[torch.Tensor] = []

    def watch(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents.append(kwargs["latents"].clone())
        return {}

    def rise(good: StepDecision) -> StepDecision:
        return StepDecision(next_sigma=torch.stack([good.next_sigma[0], torch.tensor(value)]))

    rapid3rt.accelerate(pipe, Own(2, step=rise))
    image = run(pipe, callback_on_step_end=watch)
    assert torch.equal(latents[2][1], latents[1][1])
    assert torch.equal(image[0], plain()[0])
    report = rapid3rt.report(pipe)
    ticks = report.trace.images[1]
    assert ticks[2].next_sigma == ticks[2].sigma
    assert [t[-1].next_sigma for t in report.trace.images] == [0, 0]
    report.save(tmp_path / "trace.json")
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(run(pipe), image)


@pytest.mark.parametrize(
    "order",
    [int8(1, 4), int8(-1, 2), torch.tensor([1.5, 1.0]), int8(2), int8(1, 1, 1)],
    ids=["4", "-1", "fraction", "one", "three"],
)
def test_an_order_is_out_of_range_or_of_a_wrong_shape(order: torch.Tensor) -> None:
    policy = Own(1, step=stepped(order=order))
    pipe = rapid3rt.accelerate(make(), policy)
    with pytest.raises(ValueError, match=r"order of policy 'own'"):
        run(pipe)
    policy.tick = -1
    assert torch.equal(run(pipe), plain())


@pytest.mark.parametrize(
    "weights",
    [
        None,
        torch.tensor([[0.0] * 4, [0.0, math.nan, 0.0, 0.0]]),
        torch.tensor([[0.0] * 4, [0.0, 0.0, math.inf, 0.0]]),
        torch.zeros(2, 3),
        torch.zeros(1, 4),
        torch.zeros(2, 4, dtype=torch.int32),
        [[0.0] * 4] * 2,
    ],
    ids=["none", "nan", "inf", "three", "one image", "integers", "list"],
)
def test_a_fitted_step_needs_finite_weights_for_its_image(weights: Any) -> None:
    policy = Own(1, step=stepped(order=int8(1, 3), weights=weights))
    pipe = rapid3rt.accelerate(make(), policy)
    with pytest.raises(ValueError, match=r"weights of policy 'own'"):
        run(pipe)
    policy.tick = -1
    assert torch.equal(run(pipe), plain())


def test_weights_of_an_image_that_does_not_ask_for_them_may_be_anything() -> None:
    weights = torch.tensor([[math.nan] * 4, [0.0] * 4])
    pipe = rapid3rt.accelerate(make(), Own(1, step=stepped(order=int8(1, 3), weights=weights)))
    assert torch.equal(run(pipe), plain())  # no weights at all are Euler's


@pytest.mark.parametrize("half", ["begin", "compute", "step"])
def test_a_policy_raises_in_the_middle_and_the_next_run_is_clean(half: str) -> None:
    class Moody(Own):
        angry = True

        def begin(self, run: Run) -> None:
            if half == "begin" and self.angry:
                raise LookupError("no such run")
            super().begin(run)

    def shout(_: Any) -> Any:
        raise LookupError("no such answer")

    policy = Moody(2, **({} if half == "begin" else {half: shout}))
    pipe = rapid3rt.accelerate(make(), policy)
    computed = {"begin": 0, "compute": 2, "step": 3}[half]
    refuses(pipe, LookupError, "no such", lambda: run(pipe), computed)
    assert rapid3rt.report(pipe).trace.interrupted
    policy.angry, policy.tick = False, -1
    assert torch.equal(run(pipe), plain())
    assert not rapid3rt.report(pipe).trace.interrupted


def test_a_budget_on_a_policy_of_the_users_own_makes_it_reuse() -> None:
    pipe = rapid3rt.accelerate(make(), Own(), budget=2)
    run(pipe)
    assert [image.timeline for image in rapid3rt.report(pipe).images] == ["CC..", "CC.."]


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["dense", "threshold:0.4"])
@pytest.mark.parametrize("images", [1, 3])
def test_the_batch_changes_in_the_middle(pipe: Any, policy: str, images: int) -> None:
    def change(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            take = torch.arange(images) % 2
            rows = torch.cat([take, take + 2])
            kwargs["latents"] = kwargs["latents"][take]
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                kwargs[name] = kwargs[name][rows]
        return kwargs

    rapid3rt.accelerate(pipe, policy)
    expected, computed = run(pipe), []
    with blocks(pipe) as calls:
        run(pipe, 2)
        computed = list(calls)
    arguments: dict[str, Any] = {
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    match = rf"must have 2 images x 2 branches .*got {2 * images} rows: the batch may not change"
    with blocks(pipe) as calls, pytest.raises(rapid3rt.StateError, match=match):
        run(pipe, **arguments)
    assert len(calls) <= len(computed)
    assert torch.equal(run(pipe), expected)

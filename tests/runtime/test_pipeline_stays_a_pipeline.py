# SPDX-License-Identifier: Apache-2.0
"""Rule R8: an accelerated pipeline stays a pipeline.

LoRA, hooks, offloading, saving, casting, callbacks, interruption and compilation do what they do on the plain one:
each is compared bit for bit with a plain pipeline that was put into the same state. Rule R3 (one host read per tick)
and what of R4 concerns several pipelines and garbage are here too.
"""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate as offloading
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.callbacks import SD3CFGCutoffCallback
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from test_layouts import call, make_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

import rapid3rt
from rapid3rt.runtime.twins.base import session_of
from rapid3rt.types import ComputeDecision, DenoiseState, Run, StepDecision

CPU = torch.device("cpu")
NO_TEXT: dict[str, None] = {
    f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
}
Change = Callable[[Any], Any]


def make(policy: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny SD3 pipeline, always with the same weights; plain, or accelerated with a policy."""
    pipe = make_pipeline("sd3", dtype)
    return pipe if policy is None else rapid3rt.accelerate(pipe, policy)


def run(pipe: Any, steps: int = 4, **kwargs: Any) -> torch.Tensor:
    """Latents of two images of 8 x 8 tokens."""
    return call(pipe, steps, (8, 8), **kwargs)


def changed(change: Change, when: str, policy: str) -> Any:
    """An accelerated pipeline that was changed before or after it was accelerated."""
    pipe = make()
    if when == "before":
        change(pipe)
    rapid3rt.accelerate(pipe, policy)
    if when == "after":
        change(pipe)
    return pipe


def is_far(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two images differ by far more than rounding."""
    return bool((a - b).abs().max() > 1e-2 * b.abs().max())


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """Matrices of 64 rows gain nothing from a second one."""
    torch.set_num_threads(1)


before_and_after = pytest.mark.parametrize("when", ["before", "after"])
# The second policy ends after three of six ticks: what it gives is the plain pipeline of three steps.
dense_and_shorter = pytest.mark.parametrize(
    ("policy", "plain_steps", "steps"), [("dense", 4, 4), ("steps:3", 3, 6)]
)


# LoRA ----------------------------------------------------------------------------------------------------------------

ADAPTED = (
    *("to_q", "to_v", "add_k_proj", "ff.net.0.proj"),  # in the blocks
    *("context_embedder", "norm_out.linear", "proj_out"),  # around them
)


def lora(seed: int) -> dict[str, torch.Tensor]:
    """Weights of a rank 2 adapter that changes the image, under the names of a diffusers LoRA file."""
    source, state = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for name, module in make().transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(ADAPTED):
            down = 0.3 * torch.randn(2, module.in_features, generator=source)
            up = 0.3 * torch.randn(module.out_features, 2, generator=source)
            state |= {f"transformer.{name}.lora_A.weight": down}
            state |= {f"transformer.{name}.lora_B.weight": up}
    return state


def load(name: str, seed: int) -> Change:
    return lambda pipe: pipe.load_lora_weights(lora(seed), adapter_name=name)


@before_and_after
@dense_and_shorter
def test_a_lora_file_is_at_work_whenever_it_was_loaded(
    policy: str, plain_steps: int, steps: int, when: str
) -> None:
    plain = make()
    bare = run(plain, plain_steps)
    load("one", 1)(plain)
    adapted = run(plain, plain_steps)
    assert is_far(adapted, bare)
    ours = changed(load("one", 1), when, policy)
    assert torch.equal(run(ours, steps), adapted)
    rapid3rt.restore(ours)
    assert torch.equal(run(ours, plain_steps), adapted)


@before_and_after
@dense_and_shorter
def test_an_adapter_added_by_peft_is_at_work(
    policy: str, plain_steps: int, steps: int, when: str
) -> None:
    def add(pipe: Any) -> None:
        torch.manual_seed(3)  # random weights in both matrices
        pipe.transformer.add_adapter(
            LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=["to_q", "to_k"])
        )

    plain = make()
    bare = run(plain, plain_steps)
    add(plain)
    adapted = run(plain, plain_steps)
    assert not torch.equal(adapted, bare)
    assert torch.equal(run(changed(add, when, policy), steps), adapted)


@pytest.mark.parametrize("scale", [0.0, 0.5])
@dense_and_shorter
def test_the_scale_of_a_call_reaches_the_lora(
    policy: str, plain_steps: int, steps: int, scale: float
) -> None:
    plain, ours = make(), make(policy)
    bare = run(plain, plain_steps)
    for pipe in (plain, ours):
        load("one", 1)(pipe)
    full, scaled = (
        run(plain, plain_steps, joint_attention_kwargs={"scale": s}) for s in (1.0, scale)
    )
    assert is_far(scaled, full)
    assert is_far(scaled, bare) == (scale > 0)
    assert torch.equal(run(ours, steps, joint_attention_kwargs={"scale": scale}), scaled)
    # The scale was of that call only.
    assert torch.equal(run(ours, steps), full)


LORA_LIFE: dict[str, tuple[bool, Change]] = {
    "loaded": (True, load("one", 1)),
    "weighted": (True, lambda pipe: pipe.set_adapters("one", 0.5)),
    "second loaded": (True, load("two", 2)),
    "both": (True, lambda pipe: pipe.set_adapters(["one", "two"], [0.3, 0.8])),
    "disabled": (False, lambda pipe: pipe.disable_lora()),
    "enabled": (True, lambda pipe: pipe.enable_lora()),
    "second deleted": (True, lambda pipe: pipe.delete_adapters("two")),
    "fused": (True, lambda pipe: pipe.fuse_lora(components=["transformer"], lora_scale=0.7)),
    "unfused": (True, lambda pipe: pipe.unfuse_lora(components=["transformer"])),
    "unloaded": (False, lambda pipe: pipe.unload_lora_weights()),
}


@dense_and_shorter
def test_the_life_of_a_lora_on_an_accelerated_pipeline_is_that_on_a_plain_one(
    policy: str, plain_steps: int, steps: int
) -> None:
    plain, ours = make(), make(policy)
    bare = run(plain, plain_steps)
    for stage, (adapts, change) in LORA_LIFE.items():
        for pipe in (plain, ours):
            change(pipe)
        expected = run(plain, plain_steps)
        assert is_far(expected, bare) == adapts, stage
        assert torch.equal(run(ours, steps), expected), stage
        assert plain.get_list_adapters() == ours.get_list_adapters(), stage


def test_a_policy_that_reuses_sees_the_lora_and_forgets_it() -> None:
    pipe = make("threshold:0.4")
    bare = run(pipe)
    assert "." in rapid3rt.report(pipe).images[0].timeline
    load("one", 1)(pipe)
    adapted = run(pipe)
    assert is_far(adapted, bare)
    assert torch.equal(adapted, run(changed(load("one", 1), "before", "threshold:0.4")))
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), bare)


class Sparse:
    """Computes every tick with half of the image key blocks, on the pipeline's own grid."""

    name, leaves_grid, reuses = "sparse", False, False

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        return ComputeDecision(
            action=torch.zeros_like(state.nfe, dtype=torch.int8),
            sparsity=torch.full_like(state.nfe, 2),
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=self.sigmas[state.step.long() + 1])


@before_and_after
def test_sparse_attention_goes_through_the_lora_and_its_scale(when: str) -> None:
    bare = run(rapid3rt.accelerate(make(), Sparse()))
    assert not torch.equal(bare, run(make()))
    pipe = make()
    if when == "before":
        load("one", 1)(pipe)
    rapid3rt.accelerate(pipe, Sparse())
    if when == "after":
        load("one", 1)(pipe)
    full, half, none = (run(pipe, joint_attention_kwargs={"scale": s}) for s in (1.0, 0.5, 0.0))
    assert rapid3rt.report(pipe).images[0].timeline == "2222"
    assert is_far(full, bare)
    assert is_far(half, full)
    assert not is_far(none, bare)
    dense = make()
    load("one", 1)(dense)
    assert (full - run(dense)).abs().mean() < (full - bare).abs().mean()


def test_sparse_levels_are_dense_where_the_attention_processors_are_not_the_stock_ones() -> None:
    pipe, plain = make(), make()
    for p in (pipe, plain):
        p.transformer.fuse_qkv_projections()
    rapid3rt.accelerate(pipe, Sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say so by a warning or in the report
        assert torch.equal(run(pipe), run(plain))


# Hooks and offloading ------------------------------------------------------------------------------------------------


class Count(ModelHook):  # type: ignore[misc]
    """Counts the calls that go through it, and scales the velocity."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.calls, self.scale = 0, scale

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        return (self.scale * output[0],)


class Around(Count):
    """The same for a hook that stands in for the forward and calls the original itself."""

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs)


def register(pipe: Any, hook: ModelHook, name: str) -> None:
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(hook, name)


@pytest.mark.parametrize("kinds", [(Count, Count), (Around, Count), (Count, Around)])
@pytest.mark.parametrize(
    "whens", [("before", "before"), ("before", "after"), ("after", "after")], ids="-".join
)
@dense_and_shorter
def test_two_stacked_hooks_fire_once_per_call_and_may_change_the_output(
    policy: str,
    plain_steps: int,
    steps: int,
    whens: tuple[str, str],
    kinds: tuple[type[Count], type[Count]],
) -> None:
    bare, plain = run(make(), plain_steps), make()
    for name, scale, kind in zip("ab", (0.8, 0.9), kinds, strict=True):
        register(plain, kind(scale), name)
    expected = run(plain, plain_steps)
    assert is_far(expected, bare)

    pipe, hooks = make(), (kinds[0](0.8), kinds[1](0.9))
    for now in ("before", "after"):
        if now == "after":
            rapid3rt.accelerate(pipe, policy)
        for name, hook, when in zip("ab", hooks, whens, strict=True):
            if when == now:
                register(pipe, hook, name)
    assert torch.equal(run(pipe, steps), expected)
    assert [hook.calls for hook in hooks] == [steps, steps]

    for name in "ba":  # diffusers itself cannot take a lower hook out from under one that stands in
        pipe.transformer._diffusers_hook.remove_hook(name)
    assert torch.equal(run(pipe, steps), bare)
    assert [hook.calls for hook in hooks] == [steps, steps]
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe, plain_steps), bare)


def test_hooks_of_both_libraries_stack_in_either_order() -> None:
    class Passing(offloading.hooks.ModelHook):  # type: ignore[misc]
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    plain = run(make())
    for ours_first in (True, False):
        pipe, one, two = make("dense"), Count(), Passing()
        if ours_first:
            register(pipe, one, "one")
        offloading.hooks.add_hook_to_module(pipe.transformer, two)
        if not ours_first:
            register(pipe, one, "one")
        assert torch.equal(run(pipe), plain)
        assert (one.calls, two.calls) == (4, 4)


def test_a_hook_registered_while_accelerated_goes_on_after_restore() -> None:
    pipe, hook = make("dense"), Count(0.9)
    register(pipe, hook, "scaling")
    expected = run(pipe)
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe), expected)
    assert hook.calls == 8


def offload_all(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does, which itself refuses the CPU."""
    for part in (pipe.vae, pipe.transformer):
        offloading.cpu_offload(part, execution_device=CPU)


def offload_groups(**kind: Any) -> Change:
    return lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, **kind
    )


MOVES: dict[str, Change] = {
    "sequential": offload_all,
    # What `enable_model_cpu_offload` does, which refuses the CPU too.
    "model": lambda pipe: offloading.cpu_offload_with_hook(pipe.transformer, execution_device=CPU),
    "leaf groups": offload_groups(offload_type="leaf_level"),
    "block groups": offload_groups(offload_type="block_level", num_blocks_per_group=1),
    "casting": lambda pipe: pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
}


@pytest.mark.slow
@before_and_after
@pytest.mark.parametrize("move", MOVES)
def test_offloading_and_casting_change_nothing(move: str, when: str) -> None:
    plain = make()
    MOVES[move](plain)
    expected = run(plain)
    assert torch.equal(run(changed(MOVES[move], when, "dense")), expected)
    reusing = changed(MOVES[move], when, "threshold:0.4")
    first = run(reusing)
    assert not torch.equal(first, expected)
    assert torch.equal(run(reusing), first)
    if move != "casting":  # which rounds the weights
        assert torch.equal(first, run(make("threshold:0.4")))


def test_offloading_can_be_removed_while_accelerated() -> None:
    pipe, plain = make("dense"), run(make())
    offload_all(pipe)
    assert pipe.transformer.device.type == "meta"
    assert torch.equal(run(pipe), plain)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe), plain)
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe), plain)


# Saving, casting, identity -------------------------------------------------------------------------------------------


def test_a_pipeline_saved_while_accelerated_is_the_plain_one(tmp_path: Path) -> None:
    plain, ours = make(), make("steps:2/trim")
    assert not torch.equal(run(plain), run(ours))
    plain.save_pretrained(tmp_path / "plain")
    ours.save_pretrained(tmp_path / "ours")
    files = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.*"))
    assert len(files) >= 5
    assert files == sorted(
        p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*.*")
    )
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path / "ours", **NO_TEXT)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is SD3Transformer2DModel
    assert torch.equal(run(loaded), run(plain))


def test_components_and_configuration_look_as_before() -> None:
    pipe = make()
    components, config = dict(pipe.components), dict(pipe.config)
    weights = dict(pipe.transformer.state_dict())
    rapid3rt.accelerate(pipe, "threshold:0.4")
    run(pipe)
    assert list(pipe.components) == list(components)
    assert dict(pipe.config) == config
    assert {n for n, c in pipe.components.items() if c is not components[n]} == {
        "transformer",
        "scheduler",
    }
    for name in ("transformer", "scheduler"):
        twin, real = pipe.components[name], components[name]
        assert isinstance(twin, type(real))
        assert type(twin).__name__ == type(real).__name__
        assert type(twin).__module__ == type(real).__module__
        assert dict(twin.config) == dict(real.config)
    assert list(pipe.transformer.state_dict()) == list(weights)
    for name, tensor in pipe.transformer.named_parameters():
        assert tensor.data_ptr() == weights[name].data_ptr()
    rapid3rt.restore(pipe)
    assert all(c is components[n] for n, c in pipe.components.items())
    assert dict(pipe.config) == config


@dense_and_shorter
def test_a_cast_after_accelerating_is_the_cast_of_the_plain_pipeline(
    policy: str, plain_steps: int, steps: int
) -> None:
    ours, plain = make(policy), make()
    exact = run(ours, steps)
    for pipe in (ours, plain):
        pipe.to(torch.bfloat16)
    rounded = run(ours, steps)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, run(plain, plain_steps))
    assert not torch.equal(rounded.float(), exact)


# Pipelines made from an accelerated one ------------------------------------------------------------------------------

DERIVED: dict[str, Change] = {
    "components": lambda pipe: StableDiffusion3Pipeline(**pipe.components),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", DERIVED)
def test_a_pipeline_made_from_an_accelerated_one_is_refused_and_disturbs_nothing(way: str) -> None:
    pipe = make("threshold:0.4")
    expected = run(pipe)
    derived = DERIVED[way](pipe)
    derived.set_progress_bar_config(disable=True)
    for _ in range(2):
        with pytest.raises(rapid3rt.StateError, match=r"another pipeline.*rapid3rt\.restore"):
            run(derived)
        with pytest.raises(rapid3rt.StateError, match="must not be accelerated already"):
            rapid3rt.accelerate(derived, "dense")
        assert torch.equal(run(pipe), expected)
    # restore is the way out that the message names, and leaves the first pipeline accelerated.
    rapid3rt.restore(derived)
    assert torch.equal(run(derived), run(make()))
    assert torch.equal(run(pipe), expected)


def test_from_pipe_refuses_an_accelerated_pipeline_and_disturbs_nothing() -> None:
    pipe = make("threshold:0.4")
    expected = run(pipe)
    # The refusal is of diffusers: it wants the very class of each component, and names the one it lacks.
    with pytest.raises(ValueError, match=r"expected .*transformer"):
        StableDiffusion3Pipeline.from_pipe(pipe, **NO_TEXT)
    assert torch.equal(run(pipe), expected)


def test_from_pipe_before_accelerating_gives_an_independent_plain_pipeline() -> None:
    pipe = make()
    derived = StableDiffusion3Pipeline.from_pipe(pipe, **NO_TEXT)
    derived.set_progress_bar_config(disable=True)
    plain = run(derived)
    rapid3rt.accelerate(pipe, "threshold:0.4")
    assert not torch.equal(run(pipe), plain)
    assert torch.equal(run(derived), plain)


def test_a_derived_pipeline_is_refused_inside_a_callback_of_the_accelerated_one_too() -> None:
    pipe = make("dense")
    expected, derived, refused = run(pipe), DERIVED["components"](pipe), []
    derived.set_progress_bar_config(disable=True)

    def nested(_pipe: Any, step: int, _t: Any, _kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            try:
                run(derived)
            except rapid3rt.StateError as error:
                refused.append(error)
        return {}

    assert torch.equal(run(pipe, callback_on_step_end=nested), expected)
    assert len(refused) == 1


def test_a_pipeline_that_borrows_an_accelerated_scheduler_is_refused() -> None:
    pipe = make("dense")
    other = StableDiffusion3Pipeline(**{**make().components, "scheduler": pipe.scheduler})
    other.set_progress_bar_config(disable=True)
    with pytest.raises(rapid3rt.StateError, match="scheduler"):
        rapid3rt.accelerate(other, "dense")
    rapid3rt.restore(other)
    rapid3rt.accelerate(other, "dense")
    assert torch.equal(run(other), run(make()))
    assert torch.equal(run(pipe), run(make()))


# Callbacks, progress, interruption -----------------------------------------------------------------------------------

POLICIES = ["dense", "steps:3", "steps:3/trim/ab2", "threshold:0.4", "controller:0.15"]


@pytest.mark.parametrize("policy", POLICIES)
def test_callbacks_fire_once_per_tick_with_the_timesteps_of_the_plain_pipeline(policy: str) -> None:
    def watched(pipe: Any) -> list[tuple[int, float, bool]]:
        seen: list[tuple[int, float, bool]] = []

        def callback(caller: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            seen.append((step, float(t), caller is pipe))
            assert set(kwargs) == {"latents", "prompt_embeds"}
            assert kwargs["latents"].shape == (2, 4, 8, 8)
            return kwargs

        run(
            pipe,
            6,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
        return seen

    plain = watched(make())
    assert [step for step, _, _ in plain] == list(range(6))
    assert watched(make(policy)) == plain


def test_what_a_callback_changes_is_what_the_next_tick_sees() -> None:
    def callback(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        changes = {"latents": 0.9 * kwargs["latents"]}
        if step == 1:
            changes["prompt_embeds"] = kwargs["prompt_embeds"].flip(0)
        return changes

    arguments: dict[str, Any] = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    plain = run(make(), **arguments)
    assert is_far(plain, run(make()))
    assert torch.equal(run(make("dense"), **arguments), plain)
    reused = run(make("threshold:0.4"), **arguments)
    assert is_far(reused, run(make("threshold:0.4")))


def test_a_callback_that_cuts_guidance_off_halves_the_rows_as_in_the_plain_pipeline() -> None:
    def arguments() -> dict[str, Any]:
        callback = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
        return {"images": 1, "callback_on_step_end": callback}

    plain = run(make(), 5, **arguments())
    assert not torch.equal(plain, run(make(), 5, images=1))
    ours = make("dense")
    assert torch.equal(run(ours, 5, **arguments()), plain)
    assert torch.equal(run(ours, 5, images=1), run(make(), 5, images=1))
    reusing = make("threshold:0.4")
    run(reusing, 5, **arguments())
    assert "." in rapid3rt.report(reusing).images[0].timeline


@pytest.mark.parametrize("policy", POLICIES)
def test_the_progress_bar_has_its_total_and_fills(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar:
        def __init__(self, iterable: Any = None, total: int | None = None) -> None:
            bars.append(self)
            self.total, self.updates = total, 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self) -> None:
            self.updates += 1

    bars: list[Bar] = []
    pipe = make(policy)
    monkeypatch.setattr(pipe, "progress_bar", Bar)
    run(pipe, 6)
    assert [(bar.total, bar.updates) for bar in bars] == [(6, 6)]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_interrupted_run_leaves_latents_as_they_stand_and_the_next_one_is_clean(
    policy: str,
) -> None:
    stages: list[torch.Tensor] = []

    def stop(pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        stages.append(kwargs["latents"].clone())
        if step == 1:
            pipe._interrupt = True
        return {}

    pipe, plain = make(policy), make()
    whole = run(pipe, 6)
    assert not rapid3rt.report(pipe).trace.interrupted
    stopped = run(pipe, 6, callback_on_step_end=stop)
    assert pipe.interrupt
    assert len(stages) == 2
    assert torch.equal(stopped, stages[-1])
    report = rapid3rt.report(pipe)
    assert report.trace.interrupted
    assert "interrupted" in str(report)
    assert [len(ticks) for ticks in report.trace.images] == [2, 2]
    assert all(ticks[-1].next_sigma > 0 for ticks in report.trace.images)
    if policy == "dense":
        assert torch.equal(stopped, run(plain, 6, callback_on_step_end=stop))
    assert torch.equal(run(pipe, 6), whole)
    assert not rapid3rt.report(pipe).trace.interrupted


def test_an_interruption_after_every_image_has_ended_is_none() -> None:
    def stop(pipe: Any, step: int, _t: Any, _kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 4
        return {}

    pipe = make("steps:3")
    assert torch.equal(run(pipe, 6, callback_on_step_end=stop), run(make(), 3))
    assert not rapid3rt.report(pipe).trace.interrupted


# Compilation ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@before_and_after
def test_compiled_blocks_stay_compiled(when: str) -> None:
    def compile_blocks(pipe: Any) -> None:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")

    plain = make()
    compile_blocks(plain)
    assert torch.equal(run(changed(compile_blocks, when, "dense")), run(plain))


def test_a_transformer_compiled_after_accelerating_is_refused_before_it_runs() -> None:
    pipe = make("dense")
    pipe.transformer.compile(backend="eager")
    calls = count_blocks(pipe)
    with pytest.raises(rapid3rt.UnsupportedError, match=r"compil.*blocks"):
        run(pipe)
    assert not calls
    pipe.transformer._compiled_call_impl = None  # there is no other way back in torch
    assert torch.equal(run(pipe), run(make()))


def test_a_transformer_compiled_before_is_refused_by_accelerate() -> None:
    pipe = make()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(rapid3rt.UnsupportedError, match="compil"):
        rapid3rt.accelerate(pipe, "dense")


def test_a_compiled_module_in_place_of_the_transformer_is_refused_by_accelerate() -> None:
    pipe = make()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(rapid3rt.UnsupportedError, match="OptimizedModule"):
        rapid3rt.accelerate(pipe, "dense")


def test_what_the_refusal_of_a_compiled_transformer_recommends_works() -> None:
    pipe = make("dense")
    pipe.transformer.compile(backend="eager")
    with pytest.raises(rapid3rt.UnsupportedError) as refusal:
        run(pipe)
    pipe.transformer._compiled_call_impl = None
    # diffusers knows the repeated blocks of some families only.
    if "compile_repeated_blocks" in str(refusal.value):
        pipe.transformer.compile_repeated_blocks(backend="eager")
    else:
        assert "for block in pipe.transformer.transformer_blocks" in str(refusal.value)
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")
    assert torch.equal(run(pipe), run(make()))


def test_a_pipeline_whose_twin_was_wrapped_can_still_be_restored() -> None:
    pipe = make("dense")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    rapid3rt.restore(pipe)
    assert torch.equal(run(pipe), run(make()))


# Host reads ----------------------------------------------------------------------------------------------------------


def count_blocks(pipe: Any) -> list[int]:
    """A list that grows by one whenever the first transformer block is called."""
    calls: list[int] = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


class Reads(TorchDispatchMode):
    """Writes down who reads tensor values on the host: (package, file, function).

    `item`, `bool`, `int`, `float` and indexing by a tensor end in the dispatcher, as do ops whose output size depends
    on values. `tolist`, `numpy` and (on this device) `cpu` do not, so those methods are exchanged.
    """

    DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, str, str]] = []
        self._copy: torch.Tensor | None = None
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self._watched(getattr(torch.Tensor, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket.__name__.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if by_mask or func.overloadpacket.__name__ in self.DEPENDENT:
            self._note()
        return func(*args, **(kwargs or {}))

    def _watched(self, method: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            copied, self._copy = self._copy is tensor, None
            if not copied:  # reading what `cpu` has just brought over costs nothing more
                self._note()
            out = method(tensor, *args, **kwargs)
            self._copy = out if isinstance(out, torch.Tensor) else None
            return out

        return read

    def _note(self) -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None:
            parts = Path(frame.f_code.co_filename).parts
            for package in ("rapid3rt", "diffusers"):
                if package in parts:
                    inside = parts[len(parts) - parts[::-1].index(package) :]
                    self.found.append((package, "/".join(inside), frame.f_code.co_name))
                    return
            frame = frame.f_back


def reads_per_tick(
    pipe: Any, steps: int, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any] = run
) -> list[list[tuple[str, str, str]]]:
    """Reads of each tick; the first has those of the run's begin, the last those of its end."""
    ticks: list[list[tuple[str, str, str]]] = []

    def callback(_pipe: Any, _step: int, _t: Any, _kwargs: dict[str, Any]) -> dict[str, Any]:
        ticks.append(list(reads.found))
        reads.found.clear()
        return {}

    with monkeypatch.context() as patches:
        reads = Reads(patches)
        with reads:
            run(pipe, steps, callback_on_step_end=callback)
    return ticks


PLANNER = ("rapid3rt", "planning/planner.py", "plan")


def test_the_count_of_host_reads_sees_every_way_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import rapid3rt.planning.planner as planner

    x = torch.ones(2)
    ways: list[tuple[str, int]] = [
        ("x.tolist()", 1),
        ("x.cpu().tolist()", 1),
        ("[x.tolist(), x.tolist()]", 2),
        ("x[0].item()", 1),
        ("bool(x[0] > 0)", 1),
        ("int(x[0]) + float(x[1])", 2),
        ("x.numpy()", 1),
        ("x[x > 0]", 1),
        ("torch.where(x > 0, x, 2 * x)", 0),
    ]
    for source, count in ways:
        code = compile(source, planner.__file__, "eval")
        with monkeypatch.context() as patches, Reads(patches) as reads:
            eval(code, {"x": x, "torch": torch})
        assert len(reads.found) == count, source
        assert {read[:2] for read in reads.found} <= {PLANNER[:2]}, source


@pytest.mark.parametrize("policy", [*POLICIES, "budgeted"])
def test_every_tick_reads_the_device_once_and_in_the_planner_only(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make()
    theirs = reads_per_tick(pipe, 6, monkeypatch)
    assert not any(read[0] == "rapid3rt" for tick in theirs for read in tick)
    if policy == "budgeted":
        rapid3rt.accelerate(pipe, "threshold:0.01", budget=2)
    else:
        rapid3rt.accelerate(pipe, policy)
    ticks = reads_per_tick(pipe, 6, monkeypatch)
    longest = max(len(image) for image in rapid3rt.report(pipe).trace.images)
    for tick, reads in enumerate(ticks):
        # One tick finds out that all images are done; after it there is nothing to ask.
        assert reads.count(PLANNER) == (1 if tick <= longest else 0), (tick, reads)
        ours_elsewhere = [read for read in reads if read[0] == "rapid3rt" and read != PLANNER]
        assert not ours_elsewhere or tick in (0, len(ticks) - 1), (tick, reads)
        assert len([read for read in reads if read[0] == "diffusers"]) <= len(theirs[tick])


# Several pipelines, and none -----------------------------------------------------------------------------------------


def test_two_accelerated_pipelines_run_inside_one_another_undisturbed() -> None:
    first, second = make("threshold:0.4"), make_pipeline("sd35", torch.float32)
    rapid3rt.accelerate(second, "controller:0.15")
    alone, inside = (run(first, 5), run(second, 7)), []

    def meanwhile(_pipe: Any, step: int, _t: Any, _kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            inside.append(run(second, 7))
        return {}

    assert torch.equal(run(first, 5, callback_on_step_end=meanwhile), alone[0])
    assert torch.equal(inside[0], alone[1])
    reports = rapid3rt.report(first), rapid3rt.report(second)
    assert [r.policy for r in reports] == ["threshold:0.4", "controller:0.15"]
    assert [r.trace.ticks for r in reports] == [5, 7]
    rapid3rt.restore(first)
    assert torch.equal(run(second, 7), alone[1])


def in_threads(*jobs: Callable[[], torch.Tensor]) -> list[list[torch.Tensor]]:
    """What each job gives in five runs, all jobs at once."""
    results: list[list[torch.Tensor]] = [[] for _ in jobs]
    start = threading.Barrier(len(jobs))

    def work(job: Callable[[], torch.Tensor], into: list[torch.Tensor]) -> None:
        torch.set_num_threads(1)  # it is counted per thread
        start.wait()
        into.extend(job() for _ in range(5))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_accelerated_pipelines_run_in_two_threads() -> None:
    first, second = make("threshold:0.4"), make("controller:0.15")
    alone = run(first), run(second)
    results = in_threads(lambda: run(first), lambda: run(second))
    for expected, several in zip(alone, results, strict=True):
        assert len(several) == 5
        assert all(torch.equal(expected, image) for image in several)


def sharing(pipe: Any) -> Any:
    """A plain pipeline with the same transformer and a scheduler of its own."""
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = StableDiffusion3Pipeline(**parts)
    other.set_progress_bar_config(disable=True)
    return other


def test_a_plain_pipeline_that_shares_the_transformer_runs_in_another_thread() -> None:
    first = make()
    plain, second = run(first), sharing(first)
    rapid3rt.accelerate(first, "threshold:0.4")
    reused = run(first)
    results = in_threads(lambda: run(first), lambda: run(second))
    for expected, several in zip((reused, plain), results, strict=True):
        assert len(several) == 5
        assert all(torch.equal(expected, image) for image in several)


@pytest.mark.parametrize("policy", ["threshold:0.4", Sparse()], ids=["reusing", "sparse"])
def test_a_plain_pipeline_runs_undisturbed_while_the_blocks_of_an_accelerated_one_run(
    policy: Any,
) -> None:
    first, meanwhile = make(), list[torch.Tensor]()
    plain, second, here = run(first), sharing(first), threading.get_ident()
    rapid3rt.accelerate(first, policy)
    alone = run(first)

    def between_blocks(*_: object) -> None:
        if threading.get_ident() == here and not meanwhile:
            meanwhile.extend(in_threads(lambda: run(second))[0])

    first.transformer.transformer_blocks[1].register_forward_pre_hook(between_blocks)
    assert torch.equal(run(first), alone)
    assert len(meanwhile) == 5
    assert all(torch.equal(image, plain) for image in meanwhile)


def test_restore_frees_what_was_kept_for_the_pipeline_and_the_pipeline_itself() -> None:
    pipe = make("threshold:0.4")
    transformer = pipe.transformer
    run(pipe)
    kept, whole = weakref.ref(session_of(pipe.transformer)), weakref.ref(pipe)
    real = rapid3rt.restore(pipe).transformer
    del transformer
    gc.collect()
    assert kept() is None
    del pipe
    gc.collect()
    assert whole() is None
    assert "forward" not in real.__dict__


def test_an_accelerated_pipeline_can_be_dropped_without_restore() -> None:
    pipe = make("threshold:0.4")
    run(pipe)
    kept, whole = weakref.ref(session_of(pipe.transformer)), weakref.ref(pipe)
    del pipe
    gc.collect()
    assert kept() is None
    assert whole() is None


def test_a_hook_that_outlives_restore_does_not_keep_the_pipeline_alive() -> None:
    pipe = make("threshold:0.4")
    register(pipe, Count(), "counting")
    run(pipe)
    whole, real = weakref.ref(pipe), rapid3rt.restore(pipe).transformer
    del pipe
    gc.collect()
    assert isinstance(real, SD3Transformer2DModel)
    assert whole() is None

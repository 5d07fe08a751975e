# SPDX-License-Identifier: Apache-2.0
"""ControlNet on SD3 and FLUX, single and Multi: dense equals plain, and every row gets the residuals of its own sigma.

Scripted runs are compared with the slow loop in `controlnet_loop.py`, which never sees the runtime.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accelerate as offloading
import pytest
import torch
from controlnet_loop import GUIDANCE, TRUE_CFG, Word, denoise
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
)
from test_flux import make_flux
from test_layouts import make_pipeline
from test_pipeline_stays_a_pipeline import PLANNER, Reads

import rapid3rt
from rapid3rt.adapters import FluxAdapter
from rapid3rt.runtime.deferred import DeferredCall
from rapid3rt.types import COMPUTE, REUSE, ComputeDecision, DenoiseState, Run, StepDecision

TICKS = 6
TOLERANCE = 1e-5  # float32 rounding, GEMMs of other shapes included (DESIGN.md, R2)
KINDS = ("sd3", "sd35", "dev", "schnell")
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """Matrices of 64 rows gain nothing from a second one."""
    torch.set_num_threads(1)


# Pipelines -----------------------------------------------------------------------------------------------------------


def is_flux(pipe: Any) -> bool:
    return "Flux" in type(pipe).__name__


def make_nets(kind: str, num: int, **config: Any) -> list[Any]:
    """ControlNets of one block of each kind less than their transformer, with outputs that are not zero."""
    torch.manual_seed(1)
    shared = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    if kind in ("sd3", "sd35"):
        own = {"num_layers": 4, "in_channels": 4, "out_channels": 4}
        own |= {"sample_size": 16, "patch_size": 1}
        own |= {"caption_projection_dim": 32, "pooled_projection_dim": 64}
        own["qk_norm"] = "rms_norm" if kind == "sd35" else None
        nets = [SD3ControlNetModel(**{**shared, **own, **config}) for _ in range(num)]
    else:
        own = {"num_layers": 3, "num_single_layers": 3, "in_channels": 16}
        own["pooled_projection_dim"] = 32
        own |= {"guidance_embeds": kind == "dev", "axes_dims_rope": (4, 4, 8)}
        nets = [FluxControlNetModel(**{**shared, **own, **config}) for _ in range(num)]
    for net in nets:
        for name, weight in net.named_parameters():
            if name.startswith(("controlnet_", "pos_embed_input")):
                torch.nn.init.normal_(weight, std=0.3)
    return nets


def make_plain(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A text-to-image pipeline, always with the same weights.

    Five blocks, or four of each kind: the fewest for which no other way to share residuals out is the right one.
    """
    flux = kind in ("dev", "schnell")
    pipe = make_flux(kind) if flux else make_pipeline(kind, torch.float32)
    torch.manual_seed(0)
    blocks = {"num_layers": 4, "num_single_layers": 4} if flux else {"num_layers": 5}
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, **blocks).eval()
    return pipe.to(dtype)


def make(
    kind: str,
    nets: int = 1,
    cls: type | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """A ControlNet pipeline without text encoders; more than one net makes a Multi."""
    plain = make_plain(kind, dtype)
    flux = kind in ("dev", "schnell")
    cls = cls or (FluxControlNetPipeline if flux else StableDiffusion3ControlNetPipeline)
    net: Any = [n.to(dtype).eval() for n in make_nets(kind, nets, **config)]
    parts = {n: c for n, c in plain.components.items() if n in inspect.signature(cls).parameters}
    # SD3 pipelines draw from the VAE's posterior with a generator of nobody's: leave it next to nothing to draw.
    out = parts["vae"].encoder.conv_out
    with torch.no_grad():
        out.weight[4:], out.bias[4:] = 0.0, -30.0
    pipe = cls(**parts, controlnet=net if nets > 1 else net[0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(kind: str, images: int = 2, nets: int = 1, cfg: bool = False) -> Arguments:
    """Noise, embeddings and control images of 64 tokens, other ones for each image."""
    flux, source = kind in ("dev", "schnell"), torch.Generator().manual_seed(5)
    pooled, noise, pixels = (32, (64, 16), 16) if flux else (64, (4, 8, 8), 8)
    shapes = {"prompt_embeds": (images, 9, 32), "pooled_prompt_embeds": (images, pooled)}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    shapes["latents"] = (images, *noise)
    out: Arguments = {n: torch.randn(s, generator=source) for n, s in shapes.items()}
    control = [torch.rand(images, 3, pixels, pixels, generator=source) for _ in range(nets)]
    scales = [0.7, 1.2, 0.4][:nets]
    out |= {"height": pixels, "width": pixels}
    out["control_image"] = control if nets > 1 else control[0]
    out["controlnet_conditioning_scale"] = scales if nets > 1 else scales[0]
    if flux:
        out["guidance_scale"] = GUIDANCE
        out["true_cfg_scale"] = TRUE_CFG if cfg else 1.0
    else:
        out["guidance_scale"] = GUIDANCE if cfg else 1.0
    if flux and not cfg:
        del out["negative_prompt_embeds"], out["negative_pooled_prompt_embeds"]
    return out


def pick(arguments: Arguments, *images: int) -> Arguments:
    """Some images of a call."""

    def rows(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[list(images)]
        return [rows(item) for item in value] if isinstance(value, list) else value

    return {name: rows(value) for name, value in arguments.items()}


def call(pipe: Any, arguments: Arguments, steps: int = 4, **more: Any) -> torch.Tensor:
    """Latents of one call."""
    dtype, given = pipe.transformer.dtype, {**arguments, **more}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            given[name] = value.to(dtype)
    torch.manual_seed(7)
    source = torch.Generator().manual_seed(1)
    out: torch.Tensor = pipe(
        num_inference_steps=steps, generator=source, output_type="latent", **given
    ).images
    return out


def is_far(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two images differ by far more than rounding."""
    return relative_error(a, b) > 1e-2


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest value."""
    return float((got - want).abs().max() / want.abs().max())


# Dense and shorter runs ----------------------------------------------------------------------------------------------

kinds = pytest.mark.parametrize("kind", KINDS)
singles_and_multis = pytest.mark.parametrize("nets", [1, 2], ids=["single", "multi"])
guidances = pytest.mark.parametrize("cfg", [False, True], ids=["", "cfg"])


def window(nets: int) -> Arguments:
    if nets == 1:
        return {"control_guidance_start": 0.25, "control_guidance_end": 0.75}
    return {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0]}


@pytest.mark.slow
@kinds
@singles_and_multis
@guidances
def test_dense_is_plain(kind: str, nets: int, cfg: bool) -> None:
    pipe, arguments = make(kind, nets), inputs(kind, nets=nets, cfg=cfg)
    plain = call(pipe, arguments)
    off = [0.0] * nets if nets > 1 else 0.0
    assert is_far(plain, call(pipe, arguments, controlnet_conditioning_scale=off))
    turned = [c.flip(2) for c in arguments["control_image"]]
    other = {"control_image": turned if nets > 1 else torch.stack(turned)}
    assert not torch.equal(plain, call(pipe, {**arguments, **other}))
    windowed = call(pipe, arguments, **window(nets))
    assert is_far(plain, windowed)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments))
    assert torch.equal(windowed, call(pipe, arguments, **window(nets)))


@pytest.mark.parametrize("kind", ["sd35", "dev"])
@singles_and_multis
def test_dense_is_plain_in_bf16(kind: str, nets: int) -> None:
    pipe, arguments = make(kind, nets, dtype=torch.bfloat16), inputs(kind, nets=nets, cfg=True)
    arguments["control_image"] = [c.bfloat16() for c in inputs(kind, nets=2)["control_image"]]
    if nets == 1:
        arguments["control_image"] = arguments["control_image"][0]
    plain = call(pipe, arguments)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments))


@pytest.mark.slow
@kinds
@singles_and_multis
@guidances
def test_fewer_steps_are_the_plain_fewer_steps(kind: str, nets: int, cfg: bool) -> None:
    pipe, arguments = make(kind, nets), inputs(kind, nets=nets, cfg=cfg)
    plain = call(pipe, arguments, 3)
    rapid3rt.accelerate(pipe, "steps:3")
    assert torch.equal(plain, call(pipe, arguments, 7))


VARIANTS: dict[str, tuple[str, int, Arguments, Arguments]] = {
    "no text, positions of the transformer": (
        "sd35",
        1,
        {
            "joint_attention_dim": None,
            "use_pos_embed": False,
            "force_zeros_for_pooled_projection": False,
        },
        {},
    ),
    "three nets": ("sd3", 3, {}, {}),
    "as many blocks as the transformer": ("sd3", 1, {"num_layers": 5}, {}),
    "no single blocks": ("dev", 1, {"num_single_layers": 0}, {}),
    "no guidance of its own": ("dev", 1, {"guidance_embeds": False}, {}),
    "union": ("dev", 1, {"num_mode": 3}, {"control_mode": 2}),
    "several of union": ("schnell", 2, {"num_mode": 3}, {"control_mode": [2, 0]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_dense_is_plain_and_reuse_depends_on_no_neighbour_in_every_variant(variant: str) -> None:
    kind, nets, config, more = VARIANTS[variant]
    pipe, arguments = make(kind, nets, **config), inputs(kind, images=3, nets=nets, cfg=True)
    arguments |= more
    plain = call(pipe, arguments)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments))
    rapid3rt.restore(pipe)
    compare_with_singles(pipe, arguments)


def test_hint_blocks_repeat_their_residuals() -> None:
    """Another kind of FLUX ControlNet sees pixels and adds its residuals in turn."""
    hint = {"conditioning_embedding_channels": 4, "patch_size": 2, "num_layers": 2}
    pipe, arguments = make("dev", num_single_layers=0, **hint), inputs("dev", images=3)
    # 16 pixels are 64 tokens here; the hint block makes one position of 8 x 8 pixels, two by two of them a token.
    arguments["control_image"] = torch.rand(3, 3, 128, 128, generator=torch.manual_seed(0))
    pipe.vae_scale_factor = 8
    arguments |= {"height": 128, "width": 128}
    plain = call(pipe, arguments)
    assert is_far(plain, call(pipe, arguments, controlnet_conditioning_scale=0.0))
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments))
    rapid3rt.restore(pipe)
    compare_with_singles(pipe, arguments)


# Decisions -----------------------------------------------------------------------------------------------------------


ON_GRID = tuple(range(1, TICKS + 1))
WORDS = (
    Word("crcrcr", ON_GRID),
    Word("crrrcr", ON_GRID),
    Word("cccccc", ON_GRID),
    Word("crc", (0.61, 0.2, 0.0)),
    Word("c", (0.0,)),
    Word("crrccr", (0.97, 0.8, 0.55, 4, 0.1, 0.0)),
)


class Scripted:
    """Every image plays its own word."""

    name = "scripted"

    def __init__(self, words: Sequence[Word], leaves_grid: bool = True) -> None:
        self.words, self.leaves_grid = words, leaves_grid
        self.grid: tuple[float, ...] = ()

    def begin(self, run: Run) -> None:
        assert (run.images, run.ticks) == (len(self.words), TICKS)
        self.grid = run.sigmas

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        reuses = [w.actions[state.tick : state.tick + 1] == "r" for w in self.words]
        action = torch.tensor([REUSE if r else COMPUTE for r in reuses], dtype=torch.int8)
        return ComputeDecision(action=action, sparsity=torch.zeros(len(action), dtype=torch.int32))

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        sigmas = [
            w.sigma(state.tick, self.grid) if state.tick < len(w.targets) else 0.0
            for w in self.words
        ]
        return StepDecision(next_sigma=torch.tensor(sigmas))


def play(pipe: Any, words: Sequence[Word], arguments: Arguments) -> torch.Tensor:
    """Latents of an accelerated run of these words; the pipeline is restored."""
    rapid3rt.accelerate(pipe, Scripted(words))
    latents = call(pipe, arguments, TICKS)
    rapid3rt.restore(pipe)
    return latents


def compare_with_singles(pipe: Any, arguments: Arguments) -> None:
    """Images of a batch equal themselves alone, although their neighbours do something else."""
    words = (WORDS[0], WORDS[5], WORDS[3])
    batch = play(pipe, words, arguments)
    for i, word in enumerate(words):
        single = play(pipe, [word], pick(arguments, i))
        assert relative_error(single[0], batch[i]) <= TOLERANCE, i


@pytest.mark.slow
@kinds
@singles_and_multis
@guidances
def test_decisions_give_the_latents_of_the_slow_loop(kind: str, nets: int, cfg: bool) -> None:
    pipe, arguments = make(kind, nets), inputs(kind, len(WORDS), nets, cfg)
    policy = Scripted(WORDS)
    rapid3rt.accelerate(pipe, policy)
    latents = call(pipe, arguments, TICKS)
    assert [i.nfe for i in rapid3rt.report(pipe).images] == [w.actions.count("c") for w in WORDS]
    other = make(kind, nets)
    for i, word in enumerate(WORDS):
        walked = denoise(other, pick(arguments, i), word, policy.grid, cfg)
        assert relative_error(latents[i], walked[0]) <= TOLERANCE, i
        without = {**pick(arguments, i), "controlnet_conditioning_scale": [0.0] * nets}
        if nets == 1:
            without["controlnet_conditioning_scale"] = 0.0
        assert is_far(walked, denoise(other, without, word, policy.grid, cfg)), i


@pytest.mark.slow
@kinds
@singles_and_multis
@guidances
def test_an_image_depends_on_no_neighbour(kind: str, nets: int, cfg: bool) -> None:
    compare_with_singles(make(kind, nets), inputs(kind, 3, nets, cfg))


@pytest.mark.parametrize("policy", ["threshold:0.4", "steps:3/trim/ab2", "controller:0.3"])
@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_policies_decide_for_each_image_alone(kind: str, policy: str) -> None:
    pipe, arguments = make(kind), inputs(kind, 3, cfg=True)
    arguments["latents"] *= torch.tensor([0.5, 1.0, 2.0]).view(
        -1, *[1] * (arguments["latents"].ndim - 1)
    )
    rapid3rt.accelerate(pipe, policy)
    batch, report = call(pipe, arguments, TICKS), rapid3rt.report(pipe)
    for i in range(3):
        single = call(pipe, pick(arguments, i), TICKS)
        assert rapid3rt.report(pipe).images[0].nfe == report.images[i].nfe
        assert relative_error(single[0], batch[i]) <= TOLERANCE


def test_sparse_levels_beside_dense_take_the_residuals_of_their_own_rows() -> None:
    class Levels(Scripted):
        def decide_compute(self, state: DenoiseState) -> ComputeDecision:
            levels = torch.tensor([3, 0, 1][: len(self.words)], dtype=torch.int32)
            return ComputeDecision(action=torch.zeros_like(levels).to(torch.int8), sparsity=levels)

    for kind in ("sd3", "dev"):
        pipe, arguments = make(kind), inputs(kind, 3, cfg=True)
        rapid3rt.accelerate(pipe, Levels([WORDS[2]] * 3))
        batch = call(pipe, arguments, TICKS)
        rapid3rt.restore(pipe)
        assert relative_error(play(pipe, [WORDS[2]], pick(arguments, 1))[0], batch[1]) <= TOLERANCE
        rapid3rt.accelerate(pipe, Levels([WORDS[2]]))
        assert relative_error(call(pipe, pick(arguments, 0), TICKS)[0], batch[0]) <= TOLERANCE


# How often it runs ---------------------------------------------------------------------------------------------------


def count_rows(net: torch.nn.Module) -> list[int]:
    """Rows of every call that reaches the real ControlNet."""
    calls: list[int] = []
    net.register_forward_pre_hook(
        lambda _net, _args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    return calls


@pytest.mark.slow
@kinds
@singles_and_multis
@guidances
def test_it_runs_once_per_tick_for_the_rows_that_compute(kind: str, nets: int, cfg: bool) -> None:
    pipe, arguments = make(kind, nets), inputs(kind, 3, nets, cfg)
    rows = 2 if cfg and kind in ("sd3", "sd35") else 1  # FLUX: two transformer calls share one run
    words = (Word("crcrcr", ON_GRID), Word("crrrcr", ON_GRID), Word("crc", (0.6, 0.3, 0.0)))
    rapid3rt.accelerate(pipe, Scripted(words))
    calls = count_rows(pipe.controlnet)
    call(pipe, arguments, TICKS)
    assert calls == [3 * rows, 2 * rows, 2 * rows]  # ticks 0, 2, 4; nobody computes in the others
    calls.clear()
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "steps:2")
    call(pipe, arguments, TICKS)
    assert calls == [3 * rows, 3 * rows]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_hooks_of_offloading_fire_once_per_computing_tick(kind: str, when: str) -> None:
    class Count(offloading.hooks.ModelHook):  # type: ignore[misc]
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    arguments, hook = inputs(kind, cfg=True), Count()
    expected = play(make(kind), WORDS[:2], arguments)
    pipe = make(kind)
    if when == "before":
        offloading.hooks.add_hook_to_module(pipe.controlnet, hook)
    rapid3rt.accelerate(pipe, Scripted(WORDS[:2]))
    if when == "after":
        offloading.hooks.add_hook_to_module(pipe.controlnet, hook)
    assert torch.equal(call(pipe, arguments, TICKS), expected)
    assert hook.calls == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading_changes_nothing(when: str) -> None:
    def offload(pipe: Any) -> None:
        for part in (pipe.vae, pipe.transformer, pipe.controlnet):
            offloading.cpu_offload(part, execution_device=torch.device("cpu"))

    arguments = inputs("sd3", cfg=True)
    expected = play(make("sd3"), WORDS[:2], arguments)
    pipe = make("sd3")
    if when == "before":
        offload(pipe)
    rapid3rt.accelerate(pipe, Scripted(WORDS[:2]))
    if when == "after":
        offload(pipe)
    assert torch.equal(call(pipe, arguments, TICKS), expected)


@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_nothing_of_ours_reads_the_device_but_the_plan(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, arguments = make(kind, 2), inputs(kind, 2, 2, cfg=True)
    rapid3rt.accelerate(pipe, Scripted(WORDS[:2]))
    ticks: list[list[tuple[str, str, str]]] = []

    def callback(_pipe: Any, _step: int, _t: Any, _kwargs: Arguments) -> Arguments:
        ticks.append(list(reads.found))
        reads.found.clear()
        return {}

    with monkeypatch.context() as patches:
        reads = Reads(patches)
        with reads:
            call(pipe, arguments, TICKS, callback_on_step_end=callback)
    for found in ticks[1:-1]:
        assert [read for read in found if read[0] == "rapid3rt"] == [PLANNER]


def test_a_deferred_call_runs_for_rows_that_are_missing_only() -> None:
    net = make_nets("dev", 1)[0]
    source, rows = torch.Generator().manual_seed(0), 4
    shapes = {"hidden_states": (64, 16), "controlnet_cond": (64, 16)}
    shapes |= {"encoder_hidden_states": (9, 32), "pooled_projections": (32,)}
    arguments: Arguments = {
        name: torch.randn(rows, *shape, generator=source) for name, shape in shapes.items()
    }
    # As many positions as rows would have, were they counted: they must not be gathered.
    arguments |= {"img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(9, 3), "return_dict": False}
    arguments["guidance"] = torch.rand(rows, generator=source)
    time = torch.rand(rows, generator=source)
    with torch.no_grad():
        double, single = net(**arguments, timestep=time)
        calls, deferred = count_rows(net), DeferredCall(net, arguments, FluxAdapter.controlnet)
        for wanted, ran in (([2, 0], [2]), ([2, 0], []), ([0, 2], []), ([3, 0, 1], [2]), ([1], [])):
            calls.clear()
            got = deferred.samples(wanted, time)
            assert calls == ran
            for kind, expected in zip(got, (double, single), strict=True):
                assert kind is not None
                for block, whole in zip(kind, expected, strict=True):
                    assert relative_error(block, whole[wanted]) <= TOLERANCE


# Windows -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["steps:3", "steps:3/trim", "controller:0.3"])
@pytest.mark.parametrize(
    "counting",
    [
        {"control_guidance_start": 0.2},
        {"control_guidance_end": 0.8},
        {"control_guidance_end": [1.0, 0.5]},
        {"control_guidance_start": [0.3, 0.0]},
    ],
    ids=str,
)
def test_a_window_refuses_a_policy_that_leaves_the_grid(policy: str, counting: Arguments) -> None:
    nets = 2 if isinstance(next(iter(counting.values())), list) else 1
    for kind in ("sd3", "dev"):
        pipe, arguments = make(kind, nets), inputs(kind, nets=nets)
        rapid3rt.accelerate(pipe, policy)
        usual, calls = call(pipe, arguments), count_rows(pipe.controlnet)
        with pytest.raises(rapid3rt.UnsupportedError, match=r"counts something in steps") as error:
            call(pipe, arguments, **counting)
        assert "\n" not in str(error.value)
        assert not calls
        whole = {"control_guidance_start": [0.0] * nets, "control_guidance_end": 1.0}
        assert torch.equal(usual, call(pipe, arguments, **whole))


@pytest.mark.slow
@kinds
@singles_and_multis
def test_a_policy_on_the_grid_works_with_a_window(kind: str, nets: int) -> None:
    pipe, arguments = make(kind, nets), inputs(kind, 2, nets, cfg=True)
    words = (WORDS[2], Word("crccrc", ON_GRID))
    plain = call(pipe, arguments, TICKS, **window(nets))
    rapid3rt.accelerate(pipe, Scripted(words, leaves_grid=False))
    latents = call(pipe, arguments, TICKS, **window(nets))
    assert relative_error(latents[0], plain[0]) <= TOLERANCE
    assert relative_error(latents[1], plain[1]) > 1e-3
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "threshold:0.4")
    call(pipe, arguments, TICKS, **window(nets))
    assert "." in rapid3rt.report(pipe).images[0].timeline


# Other pipelines with a ControlNet -----------------------------------------------------------------------------------


def sd3_inpaint(nets: int) -> tuple[Any, Arguments]:
    pipe = make(
        "sd3", nets, StableDiffusion3ControlNetInpaintingPipeline, extra_conditioning_channels=1
    )
    arguments = inputs("sd3", 2, nets, cfg=True)
    arguments["control_mask"] = torch.zeros(2, 1, 8, 8)
    arguments["control_mask"][..., :4] = 1.0
    return pipe, arguments


def flux_img2img(
    kind: str, nets: int, cls: type = FluxControlNetImg2ImgPipeline
) -> tuple[Any, Arguments]:
    arguments = inputs(kind, 2, nets)
    for name in ("latents", "true_cfg_scale"):
        del arguments[name]
    if nets > 1:
        arguments["control_mode"] = [0, 0]  # without it diffusers runs no net at all
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return make(kind, nets, cls), {**arguments, "image": image, "strength": 0.75}


def flux_inpaint(kind: str, nets: int) -> tuple[Any, Arguments]:
    pipe, arguments = flux_img2img(kind, nets, FluxControlNetInpaintPipeline)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1.0
    return pipe, {**arguments, "mask_image": mask}


OTHERS: dict[str, Callable[[int], tuple[Any, Arguments]]] = {
    "sd3 inpainting": sd3_inpaint,
    "dev image to image": lambda nets: flux_img2img("dev", nets),
    "schnell image to image": lambda nets: flux_img2img("schnell", nets),
    "dev inpainting": lambda nets: flux_inpaint("dev", nets),
    "schnell inpainting": lambda nets: flux_inpaint("schnell", nets),
}


@pytest.mark.slow
@singles_and_multis
@pytest.mark.parametrize("other", list(OTHERS))
def test_dense_is_plain_in_the_other_pipelines(other: str, nets: int) -> None:
    pipe, arguments = OTHERS[other](nets)
    plain = call(pipe, arguments, 5)
    off = [0.0] * nets if nets > 1 else 0.0
    assert is_far(plain, call(pipe, arguments, 5, controlnet_conditioning_scale=off))
    windowed = call(pipe, arguments, 5, **window(nets))
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments, 5))
    assert torch.equal(windowed, call(pipe, arguments, 5, **window(nets)))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "threshold:0.4")
    reused = call(pipe, arguments, 5)
    assert "." in rapid3rt.report(pipe).images[0].timeline
    assert torch.isfinite(reused).all()


# Components, restore, sharing ----------------------------------------------------------------------------------------


@pytest.mark.slow
@kinds
@singles_and_multis
def test_restore_leaves_no_trace(kind: str, nets: int) -> None:
    pipe, arguments = make(kind, nets), inputs(kind, nets=nets)
    plain = call(pipe, arguments)
    real = pipe.controlnet
    before, components = dict(real.__dict__), dict(pipe.components)
    rapid3rt.accelerate(pipe, Scripted(WORDS[:2]))
    twin = pipe.controlnet
    assert twin is not real
    assert isinstance(twin, type(real))
    assert (type(twin).__name__, type(twin).__module__) == (
        type(real).__name__,
        type(real).__module__,
    )
    call(pipe, arguments, TICKS)
    rapid3rt.restore(pipe)
    assert pipe.controlnet is real
    assert all(c is components[name] for name, c in pipe.components.items())
    assert real.__dict__.keys() == before.keys()
    assert all(real.__dict__[name] is value for name, value in before.items())
    assert torch.equal(plain, call(pipe, arguments))
    names = ("hidden_states", "controlnet_cond", "pooled_projections", "conditioning_scale")
    given = dict.fromkeys((*names, *(("controlnet_mode",) if is_flux(pipe) else ())))
    with pytest.raises(rapid3rt.StateError, match=r"ControlNet .*must be called by that pipeline"):
        twin(**given, return_dict=False)


@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_two_accelerated_pipelines_share_one_controlnet_undisturbed(kind: str) -> None:
    first, arguments = make(kind), inputs(kind, cfg=True)
    second = type(first)(**{**first.components, "scheduler": copy.deepcopy(first.scheduler)})
    second.set_progress_bar_config(disable=True)
    plain, real = call(first, arguments), first.controlnet
    rapid3rt.accelerate(first, "dense")
    assert torch.equal(plain, call(second, arguments))
    rapid3rt.accelerate(second, "threshold:0.4")
    reused = call(second, arguments)
    assert is_far(reused, plain)
    assert torch.equal(plain, call(first, arguments))
    assert torch.equal(reused, call(second, arguments))
    rapid3rt.restore(first)
    assert first.controlnet is real
    assert torch.equal(reused, call(second, arguments))
    assert torch.equal(plain, call(first, arguments))


def test_a_second_call_may_have_another_size_and_batch() -> None:
    for kind in ("sd3", "dev"):
        pipe, fresh = make(kind), make(kind)
        for p in (pipe, fresh):
            rapid3rt.accelerate(p, "threshold:0.4")
        arguments = inputs(kind, 3, cfg=True)
        call(pipe, arguments, 5)
        one = pick(arguments, 1)
        assert torch.equal(call(pipe, one, 4), call(fresh, one, 4))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["controlnet", "transformer", "callback"])
@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_an_exception_in_the_middle_leaves_the_next_run_clean(kind: str, where: str) -> None:
    pipe, arguments, failing = make(kind), inputs(kind, cfg=True), [2]
    words = (WORDS[2], WORDS[5])
    expected = play(make(kind), words, arguments)

    def fail(*_: object) -> None:
        failing[0] -= 1
        if failing[0] == 0:
            raise LookupError

    def callback(*_: object) -> Arguments:
        fail()
        return {}

    rapid3rt.accelerate(pipe, Scripted(words))
    more: Arguments = {"callback_on_step_end": callback} if where == "callback" else {}
    if where != "callback":
        getattr(pipe, where).transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(LookupError):
        call(pipe, arguments, TICKS, **more)
    assert torch.equal(call(pipe, arguments, TICKS), expected)
    rapid3rt.restore(pipe)
    assert torch.equal(call(pipe, arguments), call(make(kind), arguments))


def test_check_names_the_controlnet() -> None:
    for nets, name in ((1, "SD3ControlNetModel"), (2, "SD3MultiControlNetModel")):
        answer = rapid3rt.check(make("sd3", nets))
        assert answer.supported
        assert dict(answer.rows)["controlnet"].startswith(f"{name}, runs for")
    pipe = make("sd3")
    pipe.controlnet = make_nets("dev", 1)[0]
    answer = rapid3rt.check(pipe)
    assert not answer.supported
    text = dict(answer.rows)["controlnet"]
    assert text.startswith("not supported: controlnet must be one of SD3ControlNetModel")
    before = dict(pipe.components)
    with pytest.raises(rapid3rt.UnsupportedError, match="got FluxControlNetModel"):
        rapid3rt.accelerate(pipe)
    assert all(c is before[name] for name, c in pipe.components.items())


def test_a_pipeline_saved_while_accelerated_keeps_its_controlnet(tmp_path: Path) -> None:
    pipe, arguments = make("sd3"), inputs("sd3")
    plain = call(pipe, arguments)
    rapid3rt.accelerate(pipe, "threshold:0.4")
    pipe.controlnet.save_pretrained(tmp_path)
    loaded = SD3ControlNetModel.from_pretrained(tmp_path)
    assert type(loaded) is SD3ControlNetModel
    other = make("sd3")
    other.controlnet = loaded
    assert torch.equal(plain, call(other, arguments))


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_residuals_of_another_controlnet_are_refused(kind: str) -> None:
    pipe, arguments = make(kind), inputs(kind)
    plain = call(pipe, arguments)
    rapid3rt.accelerate(pipe, "dense")
    twin, pipe.controlnet = pipe.controlnet, make_nets(kind, 1)[0]
    blocks: list[int] = []
    first = pipe.transformer.transformer_blocks[0]
    handle = first.register_forward_pre_hook(lambda *_: blocks.append(1))
    match = r"must be what the accelerated pipeline's own ControlNet returned, got list; .*restore"
    with pytest.raises(rapid3rt.UnsupportedError, match=match) as error:
        call(pipe, arguments)
    assert "\n" not in str(error.value)
    assert not blocks
    handle.remove()
    pipe.controlnet = twin
    assert torch.equal(plain, call(pipe, arguments))


@pytest.mark.parametrize("kind", ["sd3", "dev"])
def test_a_plain_transformer_behind_an_accelerated_controlnet_is_refused(kind: str) -> None:
    pipe, arguments = make(kind), inputs(kind)
    rapid3rt.accelerate(pipe, "dense")
    pipe.transformer = make(kind).transformer
    with pytest.raises(rapid3rt.StateError, match=r"ControlNet .*own transformer.*restore"):
        call(pipe, arguments)


def test_a_pipeline_that_borrows_an_accelerated_controlnet_is_refused() -> None:
    pipe, arguments = make("sd3"), inputs("sd3")
    expected = call(pipe, arguments)
    rapid3rt.accelerate(pipe, "dense")
    parts = {**make("sd3").components, "controlnet": pipe.controlnet}
    other = StableDiffusion3ControlNetPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(rapid3rt.StateError, match=r"ControlNet .*must be called by that pipeline"):
        call(other, arguments)
    with pytest.raises(rapid3rt.StateError, match="nor have the controlnet of an accelerated"):
        rapid3rt.accelerate(other, "dense")
    rapid3rt.restore(other)
    assert type(other.controlnet) is SD3ControlNetModel
    rapid3rt.accelerate(other, "dense")
    assert torch.equal(call(other, arguments), expected)
    assert torch.equal(call(pipe, arguments), expected)


@pytest.mark.parametrize("way", ["components", "deepcopy"])
@singles_and_multis
def test_a_pipeline_made_from_an_accelerated_one_is_refused_until_restored(
    nets: int, way: str
) -> None:
    pipe, arguments = make("dev", nets), inputs("dev", nets=nets)
    plain = call(pipe, arguments)
    rapid3rt.accelerate(pipe, "threshold:0.4")
    expected = call(pipe, arguments)
    derived = copy.deepcopy(pipe) if way == "deepcopy" else type(pipe)(**pipe.components)
    derived.set_progress_bar_config(disable=True)
    with pytest.raises(rapid3rt.StateError, match=r"another pipeline.*rapid3rt\.restore"):
        call(derived, arguments)
    rapid3rt.restore(derived)
    assert torch.equal(call(derived, arguments), plain)
    assert torch.equal(call(pipe, arguments), expected)
    twin, real = type(pipe.controlnet), type(derived.controlnet)
    assert twin is not real
    assert issubclass(twin, real)


def test_the_controlnet_is_called_out_of_order() -> None:
    pipe, arguments = make("sd3"), inputs("sd3")
    rapid3rt.accelerate(pipe, "dense")
    given = {"hidden_states": arguments["latents"], "controlnet_cond": arguments["latents"]}
    for _ in range(2):
        with pytest.raises(rapid3rt.StateError, match=r"ControlNet .*must be called by that"):
            pipe.controlnet(**given, return_dict=False)
        with pytest.raises(rapid3rt.UnsupportedError, match=r"return_dict .*must be False"):
            pipe.controlnet(**given)
        call(pipe, arguments)


@pytest.mark.parametrize(("images", "controls"), [(2, 3), (1, 2)])
def test_more_control_images_than_images_are_refused(images: int, controls: int) -> None:
    pipe, arguments = make("sd3"), inputs("sd3", images)
    rapid3rt.accelerate(pipe, "dense")
    expected = call(pipe, arguments)
    more = {"control_image": inputs("sd3", controls)["control_image"]}
    match = rf"controlnet_cond of the ControlNet must have {images} rows .*got {controls}"
    with pytest.raises(ValueError, match=match):
        call(pipe, {**arguments, **more})
    assert torch.equal(call(pipe, arguments), expected)

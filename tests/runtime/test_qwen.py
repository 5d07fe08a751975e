# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image with random weights: dense equals plain bit for bit; every decision equals the loop in `packed_loop.py`.

Prompts of a batch differ in length; what pads them is noise that nobody may see.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.transformers import transformer_qwenimage
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from packed_loop import TICKS, WORDS, Model, Scripted, Word, denoise, relative_error
from PIL import Image
from test_pipeline_stays_a_pipeline import PLANNER, reads_per_tick
from torch.utils.flop_counter import FlopCounterMode

import rapid3rt

TOLERANCE = 1e-5  # float32 rounding, GEMMs of other shapes included (DESIGN.md, R2)
GUIDANCE = 3.0
SIZE = (96, 112)  # 12 x 14 tokens: five blocks of 32 and a seam
LENGTHS = (9, 5, 7, 9, 2, 8)
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """Matrices of 168 rows gain nothing from a second one."""
    torch.set_num_threads(1)


def make(cls: Any = QwenImagePipeline, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A pipeline without text encoder: three blocks of width 32, attention that matters, 8 pixels a token."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        **{
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
            **config,
        }
    )
    with torch.no_grad():
        for name, weight in transformer.transformer_blocks.named_parameters():
            if ".attn.norm" in name:
                weight.uniform_(1, 3)  # the same everywhere would hide one taken for another
            elif ".attn." in name:
                weight.mul_(2)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    parts: Arguments = {
        "transformer": transformer.to(dtype).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, base_image_seq_len=64
        ),
        "vae": vae.to(dtype).eval(),
    }
    others = set(inspect.signature(cls).parameters) - set(parts)
    pipe = cls(**parts, **dict.fromkeys(others))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(images: int = 2, cfg: bool = True, padded: bool = True) -> Arguments:
    """Noise and embeddings, other ones for each image. padded: prompts of their own lengths, with masks."""
    source = torch.Generator().manual_seed(5)
    out: Arguments = {"true_cfg_scale": GUIDANCE if cfg else 1.0}
    out["latents"] = torch.randn(6, 168, 16, generator=source)
    for sign, length, order in (("", 9, 1), ("negative_", 8, -1)):
        embeds = torch.randn(6, length, 32, generator=source)
        there = torch.tensor([min(n, length) for n in LENGTHS[::order]])
        mask = torch.arange(length) < there[:, None]
        if sign and not cfg:
            continue
        # The padding is large, so that it shows wherever it is seen.
        out[f"{sign}prompt_embeds"] = torch.where(mask[..., None], embeds, 5 * embeds)
        out[f"{sign}prompt_embeds_mask"] = mask
    if not padded:
        out = {name: value for name, value in out.items() if not name.endswith("_mask")}
    return pick(out, *range(images))


def pick(arguments: Arguments, *images: int) -> Arguments:
    """Some images of a call."""
    return {
        name: value[list(images)] if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def unpadded(arguments: Arguments) -> Arguments:
    """The arguments of one image without what its prompts were padded with."""
    out = dict(arguments)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        if f"{name}_mask" in out:
            out[name] = out[name][out.pop(f"{name}_mask")][None]
    return out


def call(
    pipe: Any, arguments: Arguments, steps: int = 4, size: tuple[int, int] = SIZE, **more: Any
) -> torch.Tensor:
    """Packed latents of one call."""
    given = {**arguments, **more}
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            given[name] = value.to(pipe.transformer.dtype)
    out: torch.Tensor = pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **given,
    ).images
    return out


def play(pipe: Any, words: tuple[Word, ...], arguments: Arguments, **more: Any) -> torch.Tensor:
    """Latents of an accelerated run of these words; the pipeline is restored."""
    rapid3rt.accelerate(pipe, Scripted(words))
    latents = call(pipe, arguments, TICKS, **more)
    rapid3rt.restore(pipe)
    return latents


guidances = pytest.mark.parametrize("cfg", [False, True], ids=["", "cfg"])
lengths = pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])


# Dense and shorter runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("size", [SIZE, (64, 64)], ids=["12x14", "8x8"])
@guidances
@lengths
def test_dense_is_plain(cfg: bool, padded: bool, size: tuple[int, int], dtype: torch.dtype) -> None:
    pipe, arguments = make(dtype=dtype), inputs(3, cfg, padded)
    arguments["latents"] = arguments["latents"][:, : size[0] * size[1] // 64]
    plain = call(pipe, arguments, size=size)
    rapid3rt.accelerate(pipe, "dense")
    accelerated = call(pipe, arguments, size=size)
    assert accelerated.dtype == dtype
    assert torch.equal(plain, accelerated)


@guidances
def test_fewer_steps_are_the_plain_fewer_steps(cfg: bool) -> None:
    pipe, arguments = make(), inputs(2, cfg)
    plain = call(pipe, arguments, 3)
    assert float(pipe.scheduler.sigmas[2]) == pytest.approx(0.02)  # the terminal
    rapid3rt.accelerate(pipe, "steps:3")
    assert torch.equal(plain, call(pipe, arguments, 7))


def test_trim_walks_the_shift_of_the_image_size_and_no_terminal() -> None:
    pipe, arguments = make(), inputs(1)
    rapid3rt.accelerate(pipe, "steps:4/trim")
    call(pipe, arguments, 8)
    shift = math.exp(0.5 + (1.15 - 0.5) * (168 - 64) / (4096 - 64))
    walked = [tick.next_sigma for tick in rapid3rt.report(pipe).trace.images[0]]
    assert walked == pytest.approx(
        [shift * u / (1 + (shift - 1) * u) for u in (0.75, 0.5, 0.25, 0)]
    )


def test_one_step_of_the_schedulers_own_is_refused_where_it_is_not_defined() -> None:
    """A grid of one sigma cannot be stretched to the terminal: diffusers divides by zero."""
    pipe, arguments = make(), inputs(1)
    rapid3rt.accelerate(pipe, "steps:1")
    with pytest.raises(ValueError, match="at least 2 where the scheduler has a shift_terminal"):
        call(pipe, arguments)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "dense", budget=1)
    assert torch.isfinite(call(pipe, arguments)).all()
    assert rapid3rt.report(pipe).images[0].nfe == 1


def test_several_images_per_prompt_are_a_batch() -> None:
    pipe, arguments = make(), inputs(2)
    del arguments["latents"]
    plain = call(pipe, arguments, num_images_per_prompt=2)
    assert len(plain) == 4
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments, num_images_per_prompt=2))


@pytest.mark.parametrize(
    "policy", ["steps:3/trim", "steps:3/trim/ab2", "threshold:0.2/auto", "controller:0.3"]
)
def test_policies_decide_for_each_image_alone(policy: str) -> None:
    pipe, arguments = make(), inputs(3)
    arguments["latents"] *= torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    rapid3rt.accelerate(pipe, policy)
    batch, report = call(pipe, arguments, 8), rapid3rt.report(pipe)
    assert not torch.isnan(batch).any()
    assert sum(image.nfe for image in report.images) < 24
    for i in range(3):
        single = call(pipe, unpadded(pick(arguments, i)), 8)
        assert rapid3rt.report(pipe).images[0].nfe == report.images[i].nfe
        assert relative_error(single[0], batch[i]) <= TOLERANCE


# Decisions -----------------------------------------------------------------------------------------------------------


class Qwen(Model):
    """shapes: (frames, rows, columns) of the noise and of each reference."""

    shapes: tuple[tuple[int, int, int], ...] = ((1, 12, 14),)

    def arguments(self, branch: int, sigma: float) -> Arguments:
        return {
            "encoder_hidden_states": self.prompts[branch],
            "timestep": torch.tensor([sigma]),
            "img_shapes": [list(self.shapes)],
        }

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.transformer.img_in(tokens)
        return out

    def temb(self, tokens: torch.Tensor, sigma: float) -> torch.Tensor:
        out: torch.Tensor = self.transformer.time_text_embed(torch.tensor([sigma]), tokens)
        return out

    def combine(self, velocities: list[torch.Tensor]) -> torch.Tensor:
        if len(velocities) == 1:
            return velocities[0]
        cond, uncond = velocities
        mixed = uncond + GUIDANCE * (cond - uncond)
        out: torch.Tensor = mixed * (
            cond.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
        )
        return out


def loop_of(pipe: Any, arguments: Arguments, references: torch.Tensor | None = None) -> Qwen:
    one = unpadded(arguments)
    prompts = [one[n] for n in ("prompt_embeds", "negative_prompt_embeds") if n in one]
    references = arguments["latents"][:, :0] if references is None else references
    return Qwen(pipe.transformer, prompts, transformer_qwenimage, False, references)


@guidances
@lengths
def test_decisions_give_the_latents_of_the_slow_loop(cfg: bool, padded: bool) -> None:
    pipe, arguments = make(), inputs(len(WORDS), cfg, padded)
    policy = Scripted(WORDS)
    rapid3rt.accelerate(pipe, policy)
    latents = call(pipe, arguments, TICKS)
    assert torch.equal(policy.latents, arguments["latents"].mT.unflatten(2, (12, 14)))
    assert policy.at_done == 0  # although the pipeline divides by the norm of what it guides
    report, other = rapid3rt.report(pipe), make()
    for i, word in enumerate(WORDS):
        assert report.images[i].nfe == len(word.actions.replace("r", ""))
        one = pick(arguments, i)
        walked = denoise(loop_of(other, one), one["latents"], word, policy.grid)
        assert relative_error(latents[i], walked[0]) <= TOLERANCE, i


@pytest.mark.parametrize("word", [Word("1", (0.0,)), Word("2", (0.0,)), Word("3", (0.0,))])
def test_a_level_shows(word: Word) -> None:
    pipe, arguments = make(), inputs(1)
    dense = play(pipe, (Word("c", (0.0,)),), arguments)
    assert relative_error(play(pipe, (word,), arguments), dense) > 20 * TOLERANCE


@guidances
def test_an_image_depends_on_no_neighbour_and_no_padding(cfg: bool) -> None:
    pipe, arguments = make(), inputs(3, cfg)
    words = (WORDS[1], WORDS[5], WORDS[3])
    batch = play(pipe, words, arguments)
    for i, word in enumerate(words):
        single = play(pipe, (word,), unpadded(pick(arguments, i)))
        assert relative_error(single[0], batch[i]) <= TOLERANCE, i


def test_dense_rows_beside_sparse_ones_keep_the_models_own_attention() -> None:
    pipe, arguments = make(), inputs(2)
    batch = play(pipe, (WORDS[2], Word("333333", (1, 2, 3, 4, 5, 6))), arguments)
    assert relative_error(batch[:1], call(pipe, pick(arguments, 0), TICKS)) <= TOLERANCE


def test_text_that_is_missing_in_the_middle_is_not_seen_either() -> None:
    pipe, arguments = make(), inputs(1)
    arguments["prompt_embeds_mask"] = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0]]).bool()
    first = play(pipe, (Word("33", (0.5, 0.0)),), arguments)
    arguments["prompt_embeds"][:, [2, 4, 5, 8]] *= -3
    assert torch.equal(first, play(pipe, (Word("33", (0.5, 0.0)),), arguments))


def test_every_row_may_go_to_the_sparse_kernel() -> None:
    pipe, arguments = make(), inputs(3)
    plain = call(pipe, arguments, TICKS)
    levels = play(pipe, (WORDS[2], WORDS[1], WORDS[2]), arguments)
    rapid3rt.accelerate(pipe, Scripted((WORDS[2], WORDS[1], WORDS[2])), attention="fast")
    fast = call(pipe, arguments, TICKS)
    assert relative_error(fast[[0, 2]], plain[[0, 2]]) <= TOLERANCE
    assert relative_error(fast[1], levels[1]) <= TOLERANCE


def test_the_device_is_read_once_per_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = make(), inputs(2)
    rapid3rt.accelerate(pipe, Scripted((WORDS[0], WORDS[3])))
    ticks = reads_per_tick(
        pipe, TICKS, monkeypatch, lambda p, n, **more: call(p, arguments, n, **more)
    )
    for found in ticks[1:-1]:
        assert [read for read in found if read[0] == "rapid3rt"] == [PLANNER]


def test_the_estimate_of_a_level_counts_what_the_blocks_compute() -> None:
    pipe, arguments = make(), inputs(1, cfg=False, padded=False)
    with FlopCounterMode(display=False, depth=6) as counter:  # counts linears, not attention
        call(pipe, arguments, 2)
    counts = counter.get_flop_counts()
    linears = sum(
        sum(counts[name].values())
        for name in counts
        if re.fullmatch(r".*transformer_blocks\.\d\.(attn|img_mlp|txt_mlp)", name)
    )
    linears //= 2
    image, text, width = 168, 9, 32
    pairs = 3 * 4 * width * image**2
    share = pairs / (3 * 4 * width * (image + text) ** 2 + linears)
    rapid3rt.accelerate(pipe, "dense")
    call(pipe, arguments, 2)
    costs = rapid3rt.report(pipe).trace.costs
    assert costs.levels[2] == pytest.approx(1 - share * 3 / 6, abs=1e-6)  # three of six key blocks


# Other pipelines -----------------------------------------------------------------------------------------------------


def pictures(images: int) -> torch.Tensor:
    return torch.rand(images, 3, *SIZE, generator=torch.Generator().manual_seed(3))


def image_arguments(cls: Any) -> Arguments:
    arguments = inputs(2)
    del arguments["latents"]
    arguments |= {"image": pictures(2), "strength": 0.7}
    if cls is QwenImageInpaintPipeline:
        mask = torch.zeros(2, 1, *SIZE)
        mask[:, :, 16:64, 24:72] = 1.0
        arguments["mask_image"] = mask
    return arguments


@pytest.mark.parametrize("cls", [QwenImageImg2ImgPipeline, QwenImageInpaintPipeline])
def test_dense_and_fewer_steps_from_an_image(cls: Any) -> None:
    pipe, arguments = make(cls), image_arguments(cls)
    plain, fewer = (call(pipe, arguments, steps) for steps in (6, 4))
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments, 6))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "steps:4")
    assert torch.equal(fewer, call(pipe, arguments, 9))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "steps:3/trim")
    assert torch.isfinite(call(pipe, arguments, 9)).all()


@pytest.fixture
def small_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference images of 8 x 6 tokens; the pipeline makes every one a megapixel."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (48, 64, None))


REFERENCE = Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(64, 48, 3))


@pytest.mark.usefixtures("small_edits")
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_references_of_edit_are_seen_and_never_moved(zero_cond_t: bool) -> None:
    pipe = make(QwenImageEditPipeline, zero_cond_t=zero_cond_t)
    arguments = inputs(3) | {"image": REFERENCE}
    plain, fewer = (call(pipe, arguments, steps) for steps in (4, 3))
    assert plain.shape == (3, 168, 16)
    assert relative_error(call(make(zero_cond_t=zero_cond_t), inputs(3)), plain) > 1e-2
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "steps:3")
    assert torch.equal(fewer, call(pipe, arguments, 7))


@pytest.mark.usefixtures("small_edits")
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_decisions_of_edit_give_the_latents_of_the_slow_loop(zero_cond_t: bool) -> None:
    pipe = make(QwenImageEditPipeline, zero_cond_t=zero_cond_t)
    arguments = inputs(len(WORDS))
    seen = list[torch.Tensor]()
    handle = pipe.transformer.img_in.register_forward_pre_hook(lambda _, given: seen.append(*given))
    call(pipe, pick(arguments, 0) | {"image": REFERENCE}, 2)
    handle.remove()
    policy = Scripted(WORDS)
    rapid3rt.accelerate(pipe, policy)
    latents = call(pipe, arguments | {"image": REFERENCE}, TICKS)
    assert torch.equal(policy.latents, arguments["latents"].mT.unflatten(2, (12, 14)))
    other = make(zero_cond_t=zero_cond_t)
    for i, word in enumerate(WORDS):
        one = pick(arguments, i)
        loop = loop_of(other, one, references=seen[0][:, 168:])
        loop.shapes = ((1, 12, 14), (1, 8, 6))
        walked = denoise(loop, one["latents"], word, policy.grid)
        assert relative_error(latents[i], walked[0]) <= TOLERANCE, i


def controlled() -> Any:
    """A pipeline whose ControlNet has three blocks for the five of the transformer, with outputs that are not zero."""
    parts = make(num_layers=5).components
    torch.manual_seed(1)
    net = QwenImageControlNetModel(
        in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for name, weight in net.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(weight, std=0.3)
    pipe = QwenImageControlNetPipeline(**parts, controlnet=net.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Controlled(Qwen):
    """net: the ControlNet. condition: what it sees beside the noise. The negative branch shares its samples."""

    net: Any = None
    condition: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    samples: Any = None

    def compute(self, branch: int, x: torch.Tensor, sigma: float, level: int) -> torch.Tensor:
        if branch == 0:
            given = Qwen.arguments(self, 0, sigma)
            self.samples = self.net(x, self.condition, **given, return_dict=False)
        return super().compute(branch, x, sigma, level)

    def arguments(self, branch: int, sigma: float) -> Arguments:
        return super().arguments(branch, sigma) | {"controlnet_block_samples": self.samples}


@guidances
def test_a_controlnet_runs_for_the_images_that_compute_each_at_its_own_sigma(cfg: bool) -> None:
    pipe, arguments = controlled(), inputs(len(WORDS), cfg)
    arguments["control_image"] = pictures(len(WORDS))
    seen = list[torch.Tensor]()
    embedder = pipe.controlnet.controlnet_x_embedder
    handle = embedder.register_forward_pre_hook(lambda _, given: seen.append(*given))
    call(pipe, arguments, 2)
    handle.remove()
    policy, other = Scripted(WORDS), controlled()
    rapid3rt.accelerate(pipe, policy)
    latents = call(pipe, arguments, TICKS)
    for i, word in enumerate(WORDS):
        one = pick(arguments, i)
        loop = Controlled(
            **vars(loop_of(other, one)), net=other.controlnet, condition=seen[0][i : i + 1]
        )
        walked = denoise(loop, one["latents"], word, policy.grid)
        assert relative_error(latents[i], walked[0]) <= TOLERANCE, i


# It stays a pipeline -------------------------------------------------------------------------------------------------


def test_the_scale_of_a_lora_is_followed() -> None:
    from peft import LoraConfig

    pipe, arguments = make(), inputs(2)
    torch.manual_seed(3)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=["to_q", "to_out.0"])
    )
    full, half = (call(pipe, arguments, attention_kwargs={"scale": s}) for s in (1.0, 0.5))
    assert relative_error(half, full) > 1e-3
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(full, call(pipe, arguments))
    assert torch.equal(half, call(pipe, arguments, attention_kwargs={"scale": 0.5}))


def test_restore_leaves_no_trace() -> None:
    pipe, arguments = make(), inputs(2)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    plain = call(pipe, arguments)
    before = {name: id(value) for name, value in vars(transformer).items()}
    processors = [block.attn.processor for block in transformer.transformer_blocks]
    play(pipe, (WORDS[1], WORDS[4]), arguments)
    assert pipe.transformer is transformer
    assert pipe.scheduler is scheduler
    assert {name: id(value) for name, value in vars(transformer).items()} == before
    assert [block.attn.processor for block in transformer.transformer_blocks] == processors
    assert torch.equal(plain, call(pipe, arguments))


def test_contexts_of_caches_are_entered_by_name() -> None:
    """A cache of diffusers keeps one state for each branch, told apart by these names."""
    names = list[str]()
    pipe, arguments = make(), inputs(1)
    rapid3rt.accelerate(pipe, "dense")
    own = type(pipe.transformer).cache_context

    def context(self: Any, name: str) -> Any:
        names.append(name)
        return own(self, name)

    type(pipe.transformer).cache_context = context  # the twin's own class
    call(pipe, arguments, 2)
    assert names == ["cond", "uncond"] * 2


def test_check_says_what_is_supported() -> None:
    checked = rapid3rt.check(make())
    assert checked.supported
    assert "QwenImageTransformer2DModel (qwen), supported" in str(checked)
    layered = rapid3rt.check(make(use_layer3d_rope=True))
    assert not layered.supported
    assert "use_layer3d_rope of the Qwen-Image transformer must be off" in str(layered)


def test_other_processors_run_dense_and_say_so() -> None:
    class Other(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):  # type: ignore[misc]
        pass

    pipe, arguments = make(), inputs(1)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(Other())
    plain = call(pipe, arguments, TICKS)
    rapid3rt.accelerate(pipe, Scripted((Word("333333", (1, 2, 3, 4, 5, 6)),)))
    assert torch.equal(plain, call(pipe, arguments, TICKS))
    assert "no attention processor of the transformer is the stock one" in str(
        rapid3rt.report(pipe)
    )

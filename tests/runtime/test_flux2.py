# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 with random weights: dense equals plain bit for bit; every decision equals the loop in `packed_loop.py`."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.models.transformers import transformer_flux2
from packed_loop import TICKS, WORDS, Model, Scripted, Word, denoise, relative_error
from PIL import Image
from test_pipeline_stays_a_pipeline import PLANNER, reads_per_tick
from torch.utils.flop_counter import FlopCounterMode

import rapid3rt

TOLERANCE = 1e-5  # float32 rounding, GEMMs of other shapes included (DESIGN.md, R2)
GUIDANCE = 3.0
SIZE = (96, 112)  # 12 x 14 tokens behind 9 of text: five blocks of 32 and a seam
REFERENCE = Image.fromarray(
    np.arange(64 * 72 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 72, 3)
)
KINDS = ("dev", "klein", "distilled")
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """Matrices of 168 rows gain nothing from a second one."""
    torch.set_num_threads(1)


def make(kind: str, cls: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline without text encoder: two blocks of each kind of width 32, 8 pixels a token."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind == "dev",
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".attn.norm" in name:
                weight.uniform_(1, 3)  # the same everywhere would hide one taken for another
            elif "blocks" in name and name.endswith(("to_q.weight", "to_k.weight", "proj.weight")):
                weight.mul_(2)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_var.fill_(0.5)
    parts: Arguments = {
        "transformer": transformer.to(dtype).eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": vae.to(dtype).eval(),
        "text_encoder": None,
        "tokenizer": None,
    }
    cls = cls or (Flux2Pipeline if kind == "dev" else Flux2KleinPipeline)
    if "is_distilled" in inspect.signature(cls).parameters:
        parts["is_distilled"] = kind == "distilled"
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(kind: str, images: int = 2) -> Arguments:
    """Noise and embeddings, other ones for each image; Klein's negative prompt is shorter."""
    source = torch.Generator().manual_seed(5)
    out: Arguments = {"latents": torch.randn(6, 16, 12, 14, generator=source)}
    out["prompt_embeds"] = torch.randn(6, 9, 32, generator=source)
    if kind == "klein":
        out["negative_prompt_embeds"] = torch.randn(6, 7, 32, generator=source)
    out["guidance_scale"] = GUIDANCE
    return pick(out, *range(images))


def pick(arguments: Arguments, *images: int) -> Arguments:
    """Some images of a call."""
    return {
        name: value[list(images)] if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def call(
    pipe: Any, arguments: Arguments, steps: int = 4, size: tuple[int, int] = SIZE, **more: Any
) -> torch.Tensor:
    """Packed latents behind the last step of one call."""
    given, last = {**arguments, **more}, list[torch.Tensor]()
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            given[name] = value.to(pipe.transformer.dtype)

    def callback(_pipe: Any, _step: int, _t: Any, tensors: Arguments) -> Arguments:
        last[:] = [tensors["latents"]]
        return {}

    given.setdefault("callback_on_step_end", callback)
    pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **given,
    )
    return last[0] if last else torch.empty(0)


def play(pipe: Any, words: tuple[Word, ...], arguments: Arguments, **more: Any) -> torch.Tensor:
    """Latents of an accelerated run of these words; the pipeline is restored."""
    rapid3rt.accelerate(pipe, Scripted(words))
    latents = call(pipe, arguments, TICKS, **more)
    rapid3rt.restore(pipe)
    return latents


kinds = pytest.mark.parametrize("kind", KINDS)
references = pytest.mark.parametrize("image", [None, REFERENCE], ids=["", "reference"])


# Dense and shorter runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("size", [SIZE, (64, 64)], ids=["12x14", "8x8"])
@kinds
@references
def test_dense_is_plain(kind: str, image: Any, size: tuple[int, int], dtype: torch.dtype) -> None:
    pipe, arguments = make(kind, dtype=dtype), inputs(kind, 3) | {"image": image}
    arguments["latents"] = arguments["latents"][:, :, : size[0] // 8, : size[1] // 8]
    plain = call(pipe, arguments, size=size)
    rapid3rt.accelerate(pipe, "dense")
    accelerated = call(pipe, arguments, size=size)
    assert accelerated.dtype == dtype
    assert torch.equal(plain, accelerated)


@pytest.mark.slow
@kinds
@references
def test_fewer_steps_are_the_plain_fewer_steps_with_the_shift_of_their_number(
    kind: str, image: Any
) -> None:
    pipe, arguments = make(kind), inputs(kind) | {"image": image}
    plain = call(pipe, arguments, 3)
    sigmas = pipe.scheduler.sigmas.tolist()
    rapid3rt.accelerate(pipe, "steps:3")
    assert torch.equal(plain, call(pipe, arguments, 40))
    trace = rapid3rt.report(pipe).trace
    assert trace.sigmas == tuple(sigmas)
    rapid3rt.restore(pipe)
    call(pipe, arguments, 40)
    assert pipe.scheduler.sigmas[-2] != pytest.approx(sigmas[-2], rel=0.1)


def test_the_image_is_that_of_the_plain_pipeline() -> None:
    for kind in KINDS:
        pipe, arguments = make(kind), inputs(kind)

        def decoded(pipe: Any = pipe, arguments: Arguments = arguments) -> Any:
            return pipe(
                **arguments, height=96, width=112, num_inference_steps=3, output_type="np"
            ).images

        plain = decoded()
        rapid3rt.accelerate(pipe, "dense")
        assert np.array_equal(plain, decoded())


@pytest.mark.parametrize(
    "policy", ["steps:3/trim", "steps:3/trim/ab2", "threshold:0.2/auto", "controller:0.3"]
)
@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_policies_decide_for_each_image_alone(kind: str, policy: str) -> None:
    pipe, arguments = make(kind), inputs(kind, 3) | {"image": REFERENCE}
    arguments["latents"] *= torch.tensor([0.5, 1.0, 2.0])[:, None, None, None]
    rapid3rt.accelerate(pipe, policy)
    batch, report = call(pipe, arguments, 8), rapid3rt.report(pipe)
    assert sum(image.nfe for image in report.images) < 24
    for i in range(3):
        single = call(pipe, pick(arguments, i), 8)
        assert rapid3rt.report(pipe).images[0].nfe == report.images[i].nfe
        assert relative_error(single[0], batch[i]) <= TOLERANCE


# Decisions -----------------------------------------------------------------------------------------------------------


class Flux2(Model):
    """guidance: of the model's own embedding; None: it has none. grid: rows and columns of each reference."""

    guidance: torch.Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()

    def arguments(self, branch: int, sigma: float) -> Arguments:
        text = self.prompts[branch]
        length, zero = text.shape[1], torch.zeros(1, dtype=torch.int64)
        images = [(12, 14), *self.grids]
        ids = [
            torch.cartesian_prod(torch.tensor([10 * i]), torch.arange(h), torch.arange(w), zero)
            for i, (h, w) in enumerate(images)
        ]
        return {
            "encoder_hidden_states": text,
            "timestep": torch.tensor([sigma]),
            "guidance": self.guidance,
            "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(length)),
            "img_ids": torch.cat(ids),
        }

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.transformer.x_embedder(tokens)
        return out

    def temb(self, tokens: torch.Tensor, sigma: float) -> torch.Tensor:
        guidance = None if self.guidance is None else 1000 * self.guidance
        time = torch.tensor([1000 * sigma])
        out: torch.Tensor = self.transformer.time_guidance_embed(time, guidance)
        return out

    def combine(self, velocities: list[torch.Tensor]) -> torch.Tensor:
        if len(velocities) == 1:
            return velocities[0]
        cond, uncond = velocities
        return uncond + GUIDANCE * (cond - uncond)


@kinds
@references
def test_decisions_give_the_latents_of_the_slow_loop(kind: str, image: Any) -> None:
    pipe, arguments = make(kind), inputs(kind, len(WORDS)) | {"image": image}
    seen = list[torch.Tensor]()
    handle = pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, x: seen.append(*x))
    call(pipe, pick(arguments, 0), 1)
    handle.remove()
    policy = Scripted(WORDS)
    rapid3rt.accelerate(pipe, policy)
    latents = call(pipe, arguments, TICKS)
    assert torch.equal(policy.latents, arguments["latents"])
    assert policy.at_done == 0
    report, other = rapid3rt.report(pipe), make(kind)
    for i, word in enumerate(WORDS):
        assert report.images[i].nfe == len(word.actions.replace("r", ""))
        one = pick(arguments, i)
        prompts = [one[n] for n in ("prompt_embeds", "negative_prompt_embeds") if n in one]
        loop = Flux2(other.transformer, prompts, transformer_flux2, True, seen[0][:, 168:])
        loop.guidance = torch.tensor([GUIDANCE]) if kind == "dev" else None
        loop.grids = () if image is None else ((8, 9),)
        x = one["latents"].flatten(2).mT
        assert relative_error(latents[i], denoise(loop, x, word, policy.grid)[0]) <= TOLERANCE, i


@pytest.mark.parametrize("level", ["1", "2", "3"])
def test_a_level_shows(level: str) -> None:
    pipe, arguments = make("dev"), inputs("dev", 1)
    dense = play(pipe, (Word("c", (0.0,)),), arguments)
    sparse = play(pipe, (Word(level, (0.0,)),), arguments)
    assert relative_error(sparse, dense) > 20 * TOLERANCE


@kinds
@references
def test_an_image_depends_on_no_neighbour(kind: str, image: Any) -> None:
    pipe, arguments = make(kind), inputs(kind, 3) | {"image": image}
    words = (WORDS[1], WORDS[5], WORDS[3])
    batch = play(pipe, words, arguments)
    for i, word in enumerate(words):
        single = play(pipe, (word,), pick(arguments, i))
        assert relative_error(single[0], batch[i]) <= TOLERANCE, i


def test_every_row_may_go_to_the_sparse_kernel() -> None:
    pipe, arguments = make("klein"), inputs("klein", 3)
    words = (WORDS[2], WORDS[1], WORDS[2])
    levels = play(pipe, words, arguments)
    rapid3rt.accelerate(pipe, Scripted(words), attention="fast")
    assert relative_error(call(pipe, arguments, TICKS), levels) <= TOLERANCE


def test_the_device_is_read_once_per_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = make("klein"), inputs("klein") | {"image": REFERENCE}
    rapid3rt.accelerate(pipe, Scripted((WORDS[0], WORDS[3])))
    ticks = reads_per_tick(
        pipe, TICKS, monkeypatch, lambda p, n, **more: call(p, arguments, n, **more)
    )
    for found in ticks[1:-1]:
        assert [read for read in found if read[0] == "rapid3rt"] == [PLANNER]


def test_the_estimate_of_a_level_counts_what_the_blocks_compute() -> None:
    pipe, arguments = make("dev"), inputs("dev", 1)
    with FlopCounterMode(display=False, depth=4) as counter:  # counts linears, not attention
        call(pipe, arguments, 1)
    linears = sum(
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if re.fullmatch(r".*transformer_blocks\.\d", name)
    )
    image, text, width = 168, 9, 32
    share = 4 * 4 * width * image**2 / (4 * 4 * width * (image + text) ** 2 + linears)
    rapid3rt.accelerate(pipe, "dense")
    call(pipe, arguments, 1)
    costs = rapid3rt.report(pipe).trace.costs
    assert costs.levels[2] == pytest.approx(1 - share * 3 / 6, abs=1e-6)  # three of six key blocks


# Other pipelines -----------------------------------------------------------------------------------------------------


def test_dense_and_fewer_steps_of_inpainting() -> None:
    pipe, arguments = make("klein", Flux2KleinInpaintPipeline), inputs("klein")
    del arguments["latents"]
    source = torch.Generator().manual_seed(3)
    mask = torch.zeros(1, 1, *SIZE)
    mask[:, :, 16:64, 24:72] = 1.0
    arguments |= {"image": torch.rand(1, 3, *SIZE, generator=source), "mask_image": mask}
    arguments["strength"] = 0.7
    plain, fewer = (call(pipe, arguments, steps) for steps in (6, 4))
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments, 6))
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, "steps:4")
    assert torch.equal(fewer, call(pipe, arguments, 9))


def test_a_key_value_cache_of_references_is_refused() -> None:
    pipe, arguments = make("distilled", Flux2KleinKVPipeline), inputs("distilled", 1)
    del arguments["guidance_scale"]
    plain = call(pipe, arguments)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(plain, call(pipe, arguments))  # without references there is no such cache
    with pytest.raises(rapid3rt.UnsupportedError, match="kv_cache_mode must be None"):
        call(pipe, arguments, image=REFERENCE)
    assert torch.equal(plain, call(pipe, arguments))


# It stays a pipeline -------------------------------------------------------------------------------------------------


def test_the_scale_of_a_lora_is_followed() -> None:
    from peft import LoraConfig

    pipe, arguments = make("dev"), inputs("dev")
    torch.manual_seed(3)
    names = ["to_q", "to_qkv_mlp_proj", "x_embedder"]
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=names)
    )
    full, half = (call(pipe, arguments, attention_kwargs={"scale": s}) for s in (1.0, 0.5))
    assert relative_error(half, full) > 1e-3
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(full, call(pipe, arguments))
    assert torch.equal(half, call(pipe, arguments, attention_kwargs={"scale": 0.5}))


@kinds
def test_restore_leaves_no_trace(kind: str) -> None:
    pipe, arguments = make(kind), inputs(kind)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    plain = call(pipe, arguments)
    before = {name: id(value) for name, value in vars(transformer).items()}
    processors = list(transformer.attn_processors.values())
    play(pipe, (WORDS[1], WORDS[4]), arguments)
    assert pipe.transformer is transformer
    assert pipe.scheduler is scheduler
    assert {name: id(value) for name, value in vars(transformer).items()} == before
    assert list(transformer.attn_processors.values()) == processors
    assert torch.equal(plain, call(pipe, arguments))


def test_check_says_what_is_supported() -> None:
    checked = rapid3rt.check(make("klein"))
    assert checked.supported
    assert "Flux2Transformer2DModel (flux2), supported" in str(checked)


def test_other_processors_run_dense_and_say_so() -> None:
    pipe, arguments = make("dev"), inputs("dev", 1)
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
    for block in pipe.transformer.single_transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    plain = call(pipe, arguments, TICKS)
    rapid3rt.accelerate(pipe, Scripted((Word("333333", (1, 2, 3, 4, 5, 6)),)))
    assert torch.equal(plain, call(pipe, arguments, TICKS))
    assert "no attention processor of the transformer is the stock one" in str(
        rapid3rt.report(pipe)
    )

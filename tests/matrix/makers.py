# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines with random weights, the calls they get, and what users do to them.

Image i of a call is always the same image, whatever its neighbours: seeds, prompts and pictures are numbered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import accelerate as offloading
import test_flux2
import test_qwen
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImageControlNetModel,
    QwenImageMultiControlNetModel,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from encoders import encoders
from PIL import Image
from test_controlnet import make_nets, make_plain
from test_flux import make_flux
from test_layouts import make_pipeline

from rapid3rt.runtime.twins.base import session_of

KINDS = ("sd3", "sd35", "dev", "schnell")
SD3, FLUX = KINDS[:2], KINDS[2:]
MORE = ("flux2", "klein", "qwen")  # as far as their pipelines have what a row asks for
ALL = KINDS + MORE
CPU = torch.device("cpu")
Arguments = dict[str, Any]
Images = Sequence[int]


# Pipelines -----------------------------------------------------------------------------------------------------------


def is_flux(kind: str) -> bool:
    return kind in FLUX


def _plain(kind: str, channels: int, nets: int) -> Any:
    """A text-to-image pipeline. A ControlNet needs more blocks than nets to share residuals out to."""
    if kind == "qwen":
        return test_qwen.make(num_layers=4 if nets else 3)
    if kind in MORE:
        return test_flux2.make("dev" if kind == "flux2" else kind)
    if nets:
        return make_plain(kind)
    return make_flux(kind) if is_flux(kind) else make_pipeline(kind, torch.float32, channels)


def make(
    kind: str,
    sd3: type = StableDiffusion3Pipeline,
    flux: type = FluxPipeline,
    klein: type = Flux2KleinPipeline,
    qwen: type = QwenImagePipeline,
    nets: int = 0,
    dtype: torch.dtype = torch.float32,
    channels: int = 4,
    scheduler: Arguments | None = None,
    scheduler_class: type = FlowMatchEulerDiscreteScheduler,
    extra: Arguments | None = None,
    **config: Any,
) -> Any:
    """A pipeline without text encoders, always with the same weights.

    sd3, flux, klein, qwen: its class in these families. nets: ControlNets, more than one in a Multi. channels: of
    SD3's latents.
    scheduler, scheduler_class: its options and class. extra: more arguments of the pipeline. config: of the
    transformer, where it is not the usual one.
    """
    plain = _plain(kind, channels, nets)
    components = plain.components
    if config:
        torch.manual_seed(0)
        real = plain.transformer
        components["transformer"] = type(real).from_config(real.config, **config).eval()
    if scheduler is not None or scheduler_class is not type(plain.scheduler):
        components["scheduler"] = scheduler_class.from_config(
            plain.scheduler.config, **(scheduler or {})
        )
    # Some pipelines draw from the VAE's posterior with a generator of nobody's: leave it next to nothing to draw.
    vae = components["vae"]
    out = getattr(vae, "quant_conv", None) or vae.encoder.conv_out
    with torch.no_grad():
        half = len(out.bias) // 2
        out.weight[half:], out.bias[half:] = 0.0, -30.0
    cls = {"flux2": type(plain), "klein": klein, "qwen": qwen}.get(
        kind, flux if is_flux(kind) else sd3
    )
    given = {
        name: components.get(name)
        for name, wanted in inspect.signature(cls).parameters.items()
        if name in components or wanted.default is inspect.Parameter.empty
    } | (extra or {})
    if nets:
        given["controlnet"] = _controlnet(kind, cls, nets)
    pipe = cls(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def _controlnet(kind: str, cls: type, nets: int) -> Any:
    """One net or the nets of a Multi, whose outputs are not zero. A Multi of Qwen-Image has one net for all images."""
    inpaints = "Inpaint" in cls.__name__ and not is_flux(kind)
    if kind == "qwen":
        torch.manual_seed(1)
        net = QwenImageControlNetModel(
            in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6), extra_condition_channels=4 * inpaints,
        ).eval()  # fmt: skip
        for name, weight in net.named_parameters():
            if name.startswith("controlnet_"):
                torch.nn.init.normal_(weight, std=0.3)
        return net if nets == 1 else QwenImageMultiControlNetModel([net])
    own = make_nets(kind, nets, **({"extra_conditioning_channels": 1} if inpaints else {}))
    return [net.eval() for net in own] if nets > 1 else own[0].eval()


def make_with_text(kind: str) -> Any:
    """A pipeline that reads prompts."""
    given, sizes = encoders(kind)
    return make(kind, extra=given, **sizes)


# Calls ---------------------------------------------------------------------------------------------------------------


def drawn(salt: int, images: Images, *shape: int, uniform: bool = False) -> torch.Tensor:
    """Random numbers of each image."""
    draw = torch.rand if uniform else torch.randn
    return torch.stack(
        [draw(shape, generator=torch.Generator().manual_seed(100 * salt + i)) for i in images]
    )


def pixels(kind: str) -> int:
    """The side of a picture of 64 tokens."""
    return 64 if kind in MORE else 16 if is_flux(kind) else 8


def picture(kind: str, images: Images, salt: int = 3) -> torch.Tensor:
    """A picture for each image."""
    return drawn(salt, images, 3, pixels(kind), pixels(kind), uniform=True)


def reference(size: int = 72) -> Image.Image:
    """A picture that all images of a call refer to."""
    pixels = torch.rand(64, size, 3, generator=torch.Generator().manual_seed(size))
    return Image.fromarray((255 * pixels).byte().numpy())


def mask(kind: str, images: Images, part: float = 0.5) -> torch.Tensor:
    """Repaint the left part of each picture."""
    side = pixels(kind)
    out = torch.zeros(len(images), 1, side, side)
    out[..., : round(part * side)] = 1.0
    return out


def generators(images: Images) -> list[torch.Generator]:
    """One for each image."""
    return [torch.Generator().manual_seed(50 + i) for i in images]


def embeds(kind: str, images: Images, negative: bool = False) -> Arguments:
    """Prompt embeddings; the first prompt is a faint one and the second a strong one, so that images differ."""
    strength = torch.tensor([0.3 if i % 2 == 0 else 3.0 for i in images]).view(-1, 1, 1)
    out = {"prompt_embeds": strength * drawn(1, images, 9, 32)}
    pooled = 32 if is_flux(kind) else 64
    if kind in KINDS:
        out["pooled_prompt_embeds"] = drawn(2, images, pooled)
    if negative:
        out["negative_prompt_embeds"] = drawn(11, images, 9, 32)
    if negative and kind in KINDS:
        out["negative_pooled_prompt_embeds"] = drawn(12, images, pooled)
    return out


def is_guided(kind: str) -> bool:
    """Whether the family is used with classifier-free guidance."""
    return kind in (*SD3, "klein", "qwen")


def guidance(kind: str) -> str:
    """What the family calls its guidance scale."""
    return "true_cfg_scale" if kind == "qwen" else "guidance_scale"


def calls_per_tick(kind: str) -> int:
    """Calls of the transformer in one step of a basic call."""
    return 1 + (kind in ("klein", "qwen"))


def basic(kind: str, images: Images) -> Arguments:
    """Arguments of every call: embeddings, size, noise, and guidance where the family is used with it."""
    out = embeds(kind, images, negative=is_guided(kind))
    if kind == "qwen":  # the prompt of an odd image is shorter
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            lengths = torch.tensor([9 - 4 * (i % 2) for i in images])
            out[f"{name}_mask"] = torch.arange(9) < lengths[:, None]
    out |= {"height": pixels(kind), "width": pixels(kind), "generator": generators(images)}
    out[guidance(kind)] = 3.5
    return out


def call(pipe: Any, arguments: Arguments, steps: int) -> torch.Tensor:
    """Latents of one call, with floats in the pipeline's type and tensors where it is.

    Embeddings that are given stay on their device in diffusers, so on a GPU they must be there; offloaded modules are
    on the CPU and fetch what they need.
    """
    dtype, moves = pipe.transformer.dtype, pipe.device.type == "cuda"

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(pipe.device) if moves else value
        return value.to(dtype) if value.is_floating_point() else value

    torch.manual_seed(7)
    given = {name: cast(value) for name, value in arguments.items()}
    with small_references():
        out: torch.Tensor = pipe(num_inference_steps=steps, output_type="latent", **given).images
    return out


@contextmanager
def small_references() -> Iterator[None]:
    """The Edit pipelines of Qwen-Image make every reference a megapixel."""
    name = "calculate_dimensions"
    with (
        patch.object(pipeline_qwenimage_edit, name, lambda *_: (48, 64, None)),
        patch.object(pipeline_qwenimage_edit_inpaint, name, lambda *_: (64, 64, None)),
        patch.object(pipeline_qwenimage_edit_plus, name, lambda *_: (48, 64)),
    ):
        yield


def held(pipe: Any) -> int:
    """Bytes that an accelerated pipeline keeps of the transformer's inside."""
    state = session_of(pipe.transformer)._state
    reference = () if state.reference is None else (state.reference,)
    return int(state.cache.num_bytes + sum(x.numel() * x.element_size() for x in reference))


# What users do to a pipeline -----------------------------------------------------------------------------------------

Change = Callable[[Any], None]
ADAPTED = (
    *("to_q", "to_v", "add_k_proj", "ff.net.0.proj", "to_qkv_mlp_proj", "img_mlp.net.0.proj"),
    *("context_embedder", "txt_in", "norm_out.linear", "proj_out"),  # around the blocks
)


def load_lora(pipe: Any) -> None:
    """A rank 2 adapter under the names of a diffusers file."""
    source, state = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(ADAPTED):
            down = 0.3 * torch.randn(2, module.in_features, generator=source)
            up = 0.3 * torch.randn(module.out_features, 2, generator=source)
            state |= {f"transformer.{name}.lora_A.weight": down}
            state |= {f"transformer.{name}.lora_B.weight": up}
    pipe.load_lora_weights(state, adapter_name="one")


def weigh_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.set_adapters("one", 0.5)


def fuse_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.fuse_lora(components=["transformer"], lora_scale=0.7)


def unload_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.unload_lora_weights()


def load_ip_adapter(pipe: Any) -> None:
    """Processors and projection of an IP-adapter, as `load_ip_adapter` leaves them."""
    torch.manual_seed(4)
    transformer = pipe.transformer
    if "Flux" in type(transformer).__name__:
        processors = {
            name: FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,))
            if name.startswith("transformer_blocks.")
            else stock
            for name, stock in transformer.attn_processors.items()
        }
        transformer.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(16, 32, 4)])
        transformer.config.encoder_hid_dim_type = "ip_image_proj"
    else:
        processors = {
            name: SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, 24, scale=1.0)
            for name in transformer.attn_processors
        }
    transformer.set_attn_processor(processors)
    if not hasattr(transformer, "x_embedder"):  # after the processors: it has attention of its own
        transformer.image_proj = IPAdapterTimeImageProjection(
            embed_dim=16,
            output_dim=32,
            hidden_dim=24,
            depth=1,
            dim_head=12,
            heads=2,
            num_queries=4,
            timestep_in_dim=24,
        )
    transformer.to(transformer.dtype).eval()


def offload_sequentially(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does, which itself refuses the CPU."""
    for part in (pipe.vae, pipe.transformer):
        offloading.cpu_offload(part, execution_device=CPU)


def offload_model(pipe: Any) -> None:
    """What `enable_model_cpu_offload` does, which refuses the CPU too."""
    offloading.cpu_offload_with_hook(pipe.transformer, execution_device=CPU)


def offload_leaves(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


def offload_blocks(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def cast_layerwise(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    )


def fuse_projections(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()


def fused_modules(pipe: Any) -> list[int]:
    """One for each attention whose projections are fused."""
    return [
        1 for module in pipe.transformer.modules() if getattr(module, "fused_projections", False)
    ]


COMPILED_CALLS: list[int] = []


def _counting(graph: Any, _inputs: Any) -> Callable[..., Any]:
    """A compiler that leaves a graph as it is and counts its calls."""

    def compiled(*args: Any) -> Any:
        COMPILED_CALLS.append(1)
        return graph.forward(*args)

    return compiled


def compile_blocks(pipe: Any) -> None:
    """diffusers knows the repeated blocks of FLUX; those of SD3 are compiled one by one."""
    if pipe.transformer._repeated_blocks:
        pipe.transformer.compile_repeated_blocks(backend=_counting)
        return
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend=_counting)


def compile_all(pipe: Any) -> None:
    """What hides the blocks."""
    pipe.transformer.compile(backend="eager")


def enable_cache(pipe: Any) -> None:
    """A cache of diffusers' own, which hooks the blocks."""
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def compiled_calls(pipe: Any) -> list[int]:
    """Grows with every call of a compiled graph."""
    del pipe
    torch._dynamo.reset()  # else earlier pipelines have used up the recompilations of a block's code
    COMPILED_CALLS.clear()
    return COMPILED_CALLS


def root_calls(pipe: Any) -> list[int]:
    """Grows by one whenever a hook on the root fires; groups of leaves put none there, so it is the last linear's."""
    holder: Any = None
    for module in (pipe.transformer, pipe.transformer.proj_out):
        registry = getattr(module, "_diffusers_hook", None)
        references = [r for r in getattr(registry, "_fn_refs", ()) if r.pre_forward is not None]
        holder = references[0] if references else getattr(module, "_hf_hook", None)
        if holder is not None:
            break
    calls: list[int] = []
    stock = holder.pre_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    holder.pre_forward = counted
    return calls

# SPDX-License-Identifier: Apache-2.0
"""The identity matrix as data: each row is something that users do, each column a layout of a transformer.

A row says how the pipeline is made and called, what the same call is without the feature (so that no row is empty),
and what is refused. `docs/matrix.md` is made from these rows and a real run of them: `make matrix`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import diffusers
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, SD3CFGCutoffCallback
from encoders import LAYERS
from makers import (
    ALL,
    FLUX,
    KINDS,
    MORE,
    SD3,
    Arguments,
    Change,
    Images,
    basic,
    call,
    cast_layerwise,
    compile_all,
    compile_blocks,
    compiled_calls,
    drawn,
    embeds,
    enable_cache,
    fuse_lora,
    fuse_projections,
    fused_modules,
    generators,
    guidance,
    is_flux,
    load_ip_adapter,
    load_lora,
    make,
    make_with_text,
    mask,
    offload_blocks,
    offload_leaves,
    offload_model,
    offload_sequentially,
    picture,
    pixels,
    reference,
    root_calls,
    unload_lora,
    weigh_lora,
)

COLUMNS = {
    **{"sd3": "SD3", "sd35": "SD3.5", "dev": "FLUX.1 dev", "schnell": "FLUX.1 schnell"},
    **{"flux2": "FLUX.2 dev", "klein": "FLUX.2 Klein", "qwen": "Qwen-Image"},
}
TICKS = 4
BATCH = (0, 1)

FLUX2, QWEN = ("flux2", "klein"), ("qwen",)

IN_STEPS = "counts something in steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row.

    Parameters
    ----------
    group, name: where it stands in the table, in plain words. kinds: where diffusers has it.
    make: the plain pipeline of a kind. change: what is done to it, before or after accelerating.
    given: arguments of the call beyond the basic ones, None removes one; images: of the batch.
    bare: makes the pipeline without the feature, without: arguments that switch it off; neither: switched off by
    leaving out `change`. least: how far the result moves at least when it is off, as a share of the largest value.
    used: for a feature that leaves the result as it is: a list that grows while it is at work; per_call: by one per
    transformer call. same: the feature has ended, and the result is that without it.
    wears: the call itself changes the pipeline for good. splits: an image of the plain pipeline's batch is what it is
    alone.
    refuses_steps: why a policy that leaves the pipeline's own grid is refused, empty where it is not.
    refused: why the row is refused altogether, as the error says it; at_call: not before it is called.
    """

    group: str
    name: str
    kinds: tuple[str, ...] = ALL
    make: Callable[[str], Any] = make
    change: Change | None = None
    after: bool = False
    given: Callable[[str, Images], Arguments] = lambda _kind, _images: {}
    images: Images = BATCH
    bare: Callable[[str], Any] | None = None
    without: Callable[[str, Images], Arguments] = lambda _kind, _images: {}
    least: float = 1e-3
    used: Callable[[Any], list[int]] | None = None
    per_call: bool = False
    same: bool = False
    wears: bool = False
    splits: bool = True
    refuses_steps: str = ""
    refused: str = ""
    at_call: bool = False

    @property
    def key(self) -> str:
        """Name of the row in test ids."""
        return f"{self.group}: {self.name}"

    def pipeline(self, kind: str, is_accelerated: bool = False) -> Any:
        """The pipeline as it is when it is accelerated, or as the plain one that it is compared with.

        One that nobody changes is shared by the rows, so each must leave it as it was.
        """
        if self.change is None:
            return shared(self.make, kind)
        pipe = self.make(kind)
        if not (self.after and is_accelerated):
            self.change(pipe)
        return pipe

    def run(self, pipe: Any, kind: str, images: Images | None = None) -> torch.Tensor:
        """Latents of the call."""
        return self._call(pipe, kind, images or self.images, self.given)

    def run_without(self, kind: str) -> torch.Tensor:
        """Latents of the plain pipeline without the feature."""

        def given(kind: str, images: Images) -> Arguments:
            return {**self.given(kind, images), **self.without(kind, images)}

        return self._call(shared(self.bare or self.make, kind), kind, self.images, given)

    def _call(
        self, pipe: Any, kind: str, images: Images, given: Callable[[str, Images], Arguments]
    ) -> torch.Tensor:
        arguments = {**basic(kind, images), **given(kind, images)}
        return call(pipe, {n: v for n, v in arguments.items() if v is not None}, TICKS)


@cache
def shared(made: Callable[[str], Any], kind: str) -> Any:
    """One plain pipeline for all who leave it as it was."""
    return made(kind)


# Arguments of calls --------------------------------------------------------------------------------------------------

Given = Callable[[str, Images], Arguments]
TRUE_CFG_OFF: Arguments = {"true_cfg_scale": 1.0}


def no_guidance(kind: str, _images: Images) -> Arguments:
    return {guidance(kind): 1.0}


def always(**arguments: Any) -> Given:
    """The same for every kind and image."""
    return lambda _kind, _images: dict(arguments)


def true_cfg(kind: str, images: Images) -> Arguments:
    """A negative prompt and a scale; other families are guided anyway."""
    if not is_flux(kind):
        return {}
    negative = embeds(kind, images, negative=True)
    return {n: v for n, v in negative.items() if "negative" in n} | {"true_cfg_scale": 3.0}


def other_prompt(_kind: str, images: Images) -> Arguments:
    return {"prompt_embeds": drawn(9, images, 9, 32)}


def with_picture(kind: str, images: Images, strength: float = 0.75) -> Arguments:
    return {"image": picture(kind, images), "strength": strength}


def with_mask(kind: str, images: Images, strength: float = 0.75) -> Arguments:
    return {**with_picture(kind, images, strength), "mask_image": mask(kind, images)}


def other_picture(kind: str, images: Images) -> Arguments:
    return {"image": picture(kind, images, salt=4)}


def other_mask(kind: str, images: Images) -> Arguments:
    return {"mask_image": mask(kind, images, part=1.0)}


def other_control(kind: str, images: Images) -> Arguments:
    return {"control_image": picture(kind, images, salt=6)}


def strings(kind: str, images: Images) -> Arguments:
    prompts = ["a red circle top-left on plain navy ground", "a green ring and a white cross"]
    out: Arguments = dict.fromkeys(basic(kind, images))
    out |= {n: v for n, v in basic(kind, images).items() if "embeds" not in n}
    out |= {"prompt": [prompts[i] for i in images], "max_sequence_length": 32}
    if kind in FLUX2:
        out["text_encoder_out_layers"] = LAYERS
    elif not is_flux(kind):
        out["negative_prompt"] = ["a blue square"] * len(images)
    return out


def several_each(kind: str, images: Images) -> Arguments:
    """Images of one prompt."""
    return {
        **strings(kind, (0,)),
        "num_images_per_prompt": len(images),
        "generator": generators(images),
    }


def control(nets: int = 1, windowed: bool = False, guided: bool = False) -> Given:
    """A call of a ControlNet, or of a Multi."""

    def given(kind: str, images: Images) -> Arguments:
        pictures = [picture(kind, images, salt=5 + net) for net in range(nets)]
        scales = [0.7, 1.2][:nets]
        out: Arguments = {
            "control_image": pictures if nets > 1 else pictures[0],
            "controlnet_conditioning_scale": scales if nets > 1 else scales[0],
        }
        if windowed:
            starts, ends = ([0.0, 0.5], [0.5, 1.0]) if nets > 1 else (0.25, 0.75)
            out |= {"control_guidance_start": starts, "control_guidance_end": ends}
        return out | (true_cfg(kind, images) if guided else {})

    return given


def no_control(nets: int = 1) -> Given:
    return always(controlnet_conditioning_scale=[0.0] * nets if nets > 1 else 0.0)


def control_mask(kind: str, images: Images) -> Arguments:
    """FLUX takes a picture to repaint, the others a mask of the control image."""
    if not is_flux(kind):
        return {"control_mask": mask(kind, images)}
    return with_mask(kind, images)


def image_prompt(kind: str, _images: Images, several: int = 1) -> Arguments:
    """Embeddings of an IP-adapter's image, for all images of the batch as the pipelines have it."""
    wanted = drawn(8, range(several), 1, 16)
    if is_flux(kind):
        return {
            "ip_adapter_image_embeds": [wanted],
            "negative_ip_adapter_image_embeds": [torch.zeros_like(wanted)],
        }
    return {"ip_adapter_image_embeds": torch.cat([torch.zeros_like(wanted), wanted])}


def no_image_prompt(_kind: str, _images: Images) -> Arguments:
    return dict.fromkeys(("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds"))


def cut_off(callback: type, **more: Any) -> Given:
    """A callback of diffusers that counts steps."""
    return lambda _kind, _images: {
        "callback_on_step_end": callback(cutoff_step_ratio=None, cutoff_step_index=1),
        **more,
    }


def changing(**tensors: Callable[[torch.Tensor], torch.Tensor]) -> Given:
    """A callback that changes tensors at every step."""

    def callback(_pipe: Any, _step: int, _t: Any, kwargs: Arguments) -> Arguments:
        return {name: change(kwargs[name]) for name, change in tensors.items()}

    return always(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=list(tensors))


def kontext(kind: str, images: Images, reference: str = "image") -> Arguments:
    """A reference of another size than the image; pictures keep their size."""
    side = pixels(kind)
    area = {"max_area": side * side, "_auto_resize": False}
    return {reference: drawn(7, images, 3, side, 2 * side, uniform=True), **area}


def joined(*several: Given) -> Given:
    """All of them, later ones first."""

    def given(kind: str, images: Images) -> Arguments:
        out: Arguments = {}
        for one in several:
            out |= one(kind, images)
        return out

    return given


# Rows ----------------------------------------------------------------------------------------------------------------

IMG2IMG = partial(
    make,
    sd3=diffusers.StableDiffusion3Img2ImgPipeline,
    flux=diffusers.FluxImg2ImgPipeline,
    qwen=diffusers.QwenImageImg2ImgPipeline,
)
INPAINT = partial(  # that of SD3 insists on 16 channels
    make,
    sd3=diffusers.StableDiffusion3InpaintPipeline,
    flux=diffusers.FluxInpaintPipeline,
    klein=diffusers.Flux2KleinInpaintPipeline,
    qwen=diffusers.QwenImageInpaintPipeline,
    channels=16,
)
CONTROLNET = partial(
    make,
    sd3=diffusers.StableDiffusion3ControlNetPipeline,
    flux=diffusers.FluxControlNetPipeline,
    qwen=diffusers.QwenImageControlNetPipeline,
    nets=1,
)
CONTROLNET_IMG2IMG = partial(make, flux=diffusers.FluxControlNetImg2ImgPipeline, nets=1)
CONTROLNET_INPAINT = partial(
    make,
    sd3=diffusers.StableDiffusion3ControlNetInpaintingPipeline,
    flux=diffusers.FluxControlNetInpaintPipeline,
    qwen=diffusers.QwenImageControlNetInpaintPipeline,
    nets=1,
)
PAG = partial(
    make,
    sd3=diffusers.StableDiffusion3PAGPipeline,
    extra={"pag_applied_layers": ["blocks.2"]},  # one without a second attention
)
CONTROL = {"in_channels": 32, "out_channels": 16}  # noise and one condition
FILL = {"in_channels": 36, "out_channels": 16}  # noise, picture and mask


def text_rows() -> list[Row]:
    row = partial(Row, group="text to image")
    return [
        row(name="no guidance", given=no_guidance, without=other_prompt),
        row(name="classifier-free guidance", kinds=(*SD3, "klein"), without=no_guidance),
        row(name="guidance embedding", kinds=("dev", "flux2"), without=no_guidance),
        row(
            name="true CFG",
            kinds=(*FLUX, "qwen"),
            given=true_cfg,
            without=always(**TRUE_CFG_OFF),
        ),
        row(
            name="skip-layer guidance",
            kinds=SD3,
            given=always(
                skip_guidance_layers=[1],
                skip_layer_guidance_start=0.0,
                skip_layer_guidance_stop=1.0,
            ),
            without=always(skip_guidance_layers=None),
            refuses_steps=IN_STEPS,
        ),
        row(
            name="skip-layer guidance, a part of the steps",
            kinds=SD3,
            given=always(
                skip_guidance_layers=[1],
                skip_layer_guidance_start=0.2,
                skip_layer_guidance_stop=0.6,
            ),
            without=always(skip_guidance_layers=None),
            refuses_steps=IN_STEPS,
        ),
        row(
            name="perturbed-attention guidance",
            kinds=SD3,
            make=PAG,
            given=always(pag_scale=3.0),
            bare=make,
            without=always(pag_scale=None),
        ),
        row(
            name="perturbed-attention guidance, no other",
            kinds=SD3,
            make=PAG,
            given=always(pag_scale=3.0, guidance_scale=1.0),
            bare=make,
            without=always(pag_scale=None),
        ),
        row(
            name="perturbed-attention guidance, adaptive",
            kinds=SD3,
            make=PAG,
            given=always(pag_scale=3.0, pag_adaptive_scale=0.005),
            without=always(pag_adaptive_scale=0.0),
            refuses_steps=IN_STEPS,
        ),
        row(
            name="prompt strings",
            make=make_with_text,
            given=strings,
            without=same_string,
        ),
        row(
            name="several images per prompt",
            make=make_with_text,
            given=several_each,
            without=lambda _kind, images: {
                "num_images_per_prompt": 1,
                "generator": generators(images[:1]),
            },
        ),
        row(name="prompt embeddings", without=other_prompt),
        row(
            name="several generators",
            without=lambda _kind, _images: {"generator": generators((0,))[0]},
        ),
        row(
            name="one generator for the batch",
            splits=False,
            given=lambda _kind, _images: {"generator": generators((0,))[0]},
            without=lambda _kind, images: {"generator": generators(images)},
        ),
        row(
            name="latents of the user's own",
            given=lambda kind, images: {"latents": drawn(13, images, *noise_shape(kind))},
            without=always(latents=None),
        ),
        row(
            name="not square",
            given=lambda kind, _images: {"height": pixels(kind), "width": 3 * pixels(kind)},
            without=lambda kind, _images: {"height": pixels(kind), "width": pixels(kind)},
        ),
    ]


def noise_shape(kind: str) -> tuple[int, ...]:
    """Latents of one image of 64 tokens, as the pipeline takes them."""
    if kind in SD3:
        return 4, 8, 8
    return (16, 8, 8) if kind in ("flux2", "klein") else (64, 16)


def same_string(_kind: str, images: Images) -> Arguments:
    return {"prompt": ["a white star"] * len(images)}


def callback_rows() -> list[Row]:
    row = partial(Row, group="callbacks")
    quiet = always(callback_on_step_end=None)
    return [
        row(
            name="latents changed at every step",
            given=changing(latents=lambda x: 0.9 * x),
            without=quiet,
        ),
        row(
            name="prompt changed at every step",
            given=changing(prompt_embeds=lambda x: x + 0.5),
            without=quiet,
        ),
        row(
            name="guidance cut off",
            kinds=SD3,
            given=cut_off(SD3CFGCutoffCallback),
            images=(0,),  # it keeps one row of the prompts
            without=quiet,
            refuses_steps=IN_STEPS,
        ),
        row(
            name="IP-adapter cut off",
            kinds=KINDS,
            wears=True,
            change=load_ip_adapter,
            given=joined(image_prompt, cut_off(IPAdapterScaleCutoffCallback)),
            bare=with_ip_adapter,
            without=quiet,
            refuses_steps=IN_STEPS,
        ),
    ]


def with_ip_adapter(kind: str) -> Any:
    pipe = make(kind)
    load_ip_adapter(pipe)
    return pipe


def grid_rows() -> list[Row]:
    row = partial(Row, group="noise levels and types")
    sigmas = [1.0, 0.8, 0.5, 0.1]
    return [
        row(name="sigmas=", given=always(sigmas=sigmas), without=always(sigmas=None)),
        row(
            name="dynamic shifting",
            make=partial(make, scheduler={"use_dynamic_shifting": True}),
            bare=partial(make, scheduler={"use_dynamic_shifting": False, "shift": 1.0}),
        ),
        row(
            name="static shift",
            make=partial(make, scheduler={"use_dynamic_shifting": False, "shift": 5.0}),
            bare=partial(make, scheduler={"use_dynamic_shifting": False, "shift": 1.0}),
        ),
        row(
            name="Karras sigmas",
            make=partial(make, scheduler={"use_karras_sigmas": True}),
            bare=make,
        ),
        row(name="bf16", make=partial(make, dtype=torch.bfloat16), bare=make, least=1e-5),
        row(name="fp16", make=partial(make, dtype=torch.float16), bare=make, least=1e-6),
        *(other_scheduler(cls, kinds) for cls, kinds in SCHEDULERS.items()),
    ]


TAKES_NO_SIGMAS = (*SD3, "dev", *FLUX2)  # the other pipelines pass sigmas= of their own
SCHEDULERS: dict[type, tuple[str, ...]] = {  # and whose pipelines can call its set_timesteps
    diffusers.DPMSolverMultistepScheduler: TAKES_NO_SIGMAS,
    diffusers.DPMSolverSinglestepScheduler: TAKES_NO_SIGMAS,
    diffusers.UniPCMultistepScheduler: ALL,
    diffusers.DEISMultistepScheduler: TAKES_NO_SIGMAS,
    diffusers.FlowMatchHeunDiscreteScheduler: SD3,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def other_scheduler(cls: type, kinds: tuple[str, ...]) -> Row:
    options = {} if cls is diffusers.FlowMatchHeunDiscreteScheduler else FLOW
    return Row(
        group="other schedulers",
        name=cls.__name__.removesuffix("Scheduler"),
        kinds=kinds,
        make=partial(make, scheduler_class=cls, scheduler=options),
        bare=make,
        refuses_steps="steps all images alike",
    )


def picture_rows() -> list[Row]:
    out = []
    for strength in (0.3, 0.75, 1.0):
        of = f"strength {strength:g}"
        # At full strength nothing is left of the picture, but of the one outside the mask.
        shows = other_picture if strength < 1 else other_prompt
        out += [
            Row(
                group="image to image",
                name=of,
                kinds=(*KINDS, "qwen"),
                make=IMG2IMG,
                given=partial(with_picture, strength=strength),
                without=shows,
            ),
            Row(
                group="inpainting",
                name=of,
                kinds=(*KINDS, "klein", "qwen"),
                make=INPAINT,
                given=partial(with_mask, strength=strength),
                without=other_mask if strength == 1 else joined(other_picture, other_mask),
            ),
        ]
    guided = {
        "image to image": (IMG2IMG, with_picture),
        "inpainting": (INPAINT, with_mask),
    }
    for group, (pipe, given) in guided.items():
        out.append(
            Row(
                group=group,
                name="with true CFG",
                kinds=FLUX,
                make=pipe,
                given=joined(given, true_cfg),
                without=always(**TRUE_CFG_OFF),
            )
        )
    out.append(
        Row(
            group="image to image",
            name="with perturbed-attention guidance",
            kinds=SD3,
            make=partial(PAG, sd3=diffusers.StableDiffusion3PAGImg2ImgPipeline),
            given=joined(with_picture, always(pag_scale=3.0)),
            bare=IMG2IMG,
            without=always(pag_scale=None),
        )
    )
    return sorted(out, key=lambda row: row.group)


NETS = (*KINDS, "qwen")


def controlnet_rows() -> list[Row]:
    out = []
    for nets, which in ((1, "single"), (2, "Multi")):
        made = partial(CONTROLNET, nets=nets)
        row = partial(Row, group="ControlNet", kinds=NETS, make=made, without=no_control(nets))
        out += [
            row(name=which, given=control(nets)),
            row(name=f"{which}, true CFG", kinds=FLUX, given=control(nets, guided=True)),
            row(
                name=f"{which}, a window of the steps",
                given=control(nets, windowed=True),
                refuses_steps=IN_STEPS,
            ),
            row(
                name=f"{which}, image to image",
                kinds=FLUX,
                make=partial(CONTROLNET_IMG2IMG, nets=nets),
                given=joined(control(nets), with_picture, modes(nets)),
            ),
            row(
                name=f"{which}, inpainting",
                kinds=NETS if nets == 1 else KINDS,
                make=partial(CONTROLNET_INPAINT, nets=nets),
                given=joined(control(nets), control_mask, modes(nets)),
            ),
        ]
    return out


def modes(nets: int) -> Given:
    """The image-to-image pipelines of FLUX run a Multi only where modes are given."""
    return lambda kind, _images: {"control_mode": [0, 0]} if nets > 1 and is_flux(kind) else {}


def flux_rows() -> list[Row]:
    """Pipelines that FLUX alone has. They hand conditions to the transformer beside the noise."""
    row = partial(Row, kinds=FLUX)
    fill = partial(make, flux=diffusers.FluxFillPipeline, **FILL)
    paints = partial(with_mask, strength=1.0)
    kontexts = partial(make, flux=diffusers.FluxKontextPipeline)
    repaint = partial(make, flux=diffusers.FluxKontextInpaintPipeline)
    controlled = joined(lambda kind, images: {"control_image": picture(kind, images, salt=5)})
    return [
        row(
            group="reference images",
            name="Kontext",
            make=kontexts,
            given=kontext,
            without=no_reference,
        ),
        row(
            group="reference images",
            name="Kontext, true CFG",
            make=kontexts,
            given=joined(kontext, true_cfg),
            without=always(**TRUE_CFG_OFF),
        ),
        row(
            group="reference images",
            name="Kontext, inpainting",
            make=repaint,
            given=joined(with_mask, partial(kontext, reference="image_reference")),
            without=always(image_reference=None),
        ),
        row(group="Fill", name="strength 1", make=fill, given=paints, without=other_mask),
        row(group="Fill", name="strength 0.75", make=fill, given=with_mask, without=other_picture),
        row(
            group="Control",
            name="text to image",
            make=partial(make, flux=diffusers.FluxControlPipeline, **CONTROL),
            given=controlled,
            without=other_control,
        ),
        row(
            group="Control",
            name="image to image",
            make=partial(make, flux=diffusers.FluxControlImg2ImgPipeline, **CONTROL),
            given=joined(controlled, with_picture),
            without=other_control,
        ),
        row(
            group="Control",
            name="inpainting",
            make=partial(make, flux=diffusers.FluxControlInpaintPipeline, **CONTROL),
            given=joined(controlled, with_mask),
            without=other_control,
        ),
    ]


def reference_rows() -> list[Row]:
    """Reference images of FLUX.2 and Qwen-Image, the same for all images of the batch."""
    edit = partial(make, qwen=diffusers.QwenImageEditPipeline)
    paints = joined(with_mask, always(image=reference()))
    row = partial(Row, group="reference images", bare=make, without=no_reference)
    return [
        row(name="FLUX.2, one", kinds=FLUX2, given=always(image=reference())),
        row(
            name="FLUX.2, two",
            kinds=FLUX2,
            given=always(image=[reference(), reference(88)]),
            without=always(image=reference()),
        ),
        row(
            name="FLUX.2, inpainting",
            kinds=("klein",),
            make=INPAINT,
            given=joined(with_mask, always(image_reference=reference())),
            bare=INPAINT,
            without=always(image_reference=None),
        ),
        row(name="Qwen-Image Edit", kinds=QWEN, make=edit, given=always(image=reference())),
        row(
            name="Qwen-Image Edit, references at time 0",
            kinds=QWEN,
            make=partial(edit, zero_cond_t=True),
            given=always(image=reference()),
            bare=partial(make, zero_cond_t=True),
        ),
        row(
            name="Qwen-Image Edit Plus, two",
            kinds=QWEN,
            make=partial(make, qwen=diffusers.QwenImageEditPlusPipeline),
            given=always(image=[reference(), reference(88)]),
            images=(0,),  # it takes no more
        ),
        row(
            name="Qwen-Image Edit, inpainting",
            kinds=QWEN,
            make=partial(make, qwen=diffusers.QwenImageEditInpaintPipeline),
            given=paints,
            bare=None,
            without=other_mask,
            splits=False,  # the first image's generator draws for the picture too
        ),
    ]


def no_reference(_kind: str, _images: Images) -> Arguments:
    return {"image": None}


def adapter_rows() -> list[Row]:
    out = [
        Row(
            group="IP-adapter",
            name="an image prompt",
            kinds=KINDS,
            change=load_ip_adapter,
            given=joined(image_prompt, true_cfg),
            bare=make,
            without=no_image_prompt,
        ),
        Row(
            group="IP-adapter",
            name="several image prompts",
            kinds=FLUX,
            change=load_ip_adapter,
            given=joined(partial(image_prompt, several=3), true_cfg),
            bare=with_ip_adapter,
            without=image_prompt,
        ),
        Row(
            group="LoRA",
            name="scaled by the call",
            change=load_lora,
            given=lambda kind, _images: {lora_argument(kind): {"scale": 0.5}},
            bare=with_lora,
            without=lambda kind, _images: {lora_argument(kind): None},
        ),
    ]
    for name, change, ended in (
        ("loaded", load_lora, False),
        ("weighted", weigh_lora, False),
        ("fused", fuse_lora, False),
        ("unloaded", unload_lora, True),
    ):
        for after in (False, True):
            when = "after" if after else "before"
            out.append(
                Row(
                    group="LoRA",
                    name=f"{name} {when} accelerating",
                    change=change,
                    after=after,
                    bare=make,
                    same=ended,
                )
            )
    return out


def lora_argument(kind: str) -> str:
    """What carries the scale of a LoRA."""
    return "attention_kwargs" if kind in MORE else "joint_attention_kwargs"


def with_lora(kind: str) -> Any:
    pipe = make(kind)
    load_lora(pipe)
    return pipe


CAN_FUSE = ("sd3", *FLUX, *FLUX2)  # those of SD3.5 raise in the plain pipeline, Qwen-Image has none


def module_rows() -> list[Row]:
    """What is done to the modules: the result stays, so what counts is that it goes on working."""
    out = []
    for after in (False, True):
        when = "after" if after else "before"
        for group, name, change, used in (
            ("offloading", "model", offload_model, root_calls),
            ("offloading", "sequential", offload_sequentially, root_calls),
            ("offloading", "groups of blocks", offload_blocks, root_calls),
            ("offloading", "groups of leaves", offload_leaves, root_calls),
            ("modules", "compiled block by block", compile_blocks, compiled_calls),
            ("modules", "fused projections", fuse_projections, fused_modules),
        ):
            out.append(
                Row(
                    group=group,
                    name=f"{name}, {when} accelerating",
                    kinds=CAN_FUSE if used is fused_modules else ALL,
                    change=change,
                    after=after,
                    used=used,
                    per_call=used is root_calls,
                )
            )
        out.append(
            Row(
                group="modules",
                name=f"layerwise casting, {when} accelerating",
                change=cast_layerwise,
                after=after,
                least=1e-4,
                bare=make,
            )
        )
    return sorted(out, key=lambda row: row.group, reverse=True)


def refused_rows() -> list[Row]:
    """What cannot be served says so in one line."""
    out = [
        Row(
            group="noise levels and types",
            name="an unknown scheduler",
            make=partial(make, scheduler_class=diffusers.FlowMatchLCMScheduler),
            refused="scheduler must be a FlowMatchEulerDiscreteScheduler or one of",
        ),
        Row(
            group="noise levels and types",
            name="inverted sigmas",
            make=partial(make, scheduler={"invert_sigmas": True}),
            refused="scheduler option invert_sigmas must be off",
        ),
    ]
    out += [
        Row(
            group="reference images",
            name="FLUX.2 Klein's key-value cache of references",
            kinds=("klein",),
            make=partial(make, klein=diffusers.Flux2KleinKVPipeline),
            given=always(image=reference(), guidance_scale=None, negative_prompt_embeds=None),
            refused="kv_cache_mode must be None",
            at_call=True,
        ),
        Row(
            group="text to image",
            name="layered Qwen-Image",
            kinds=QWEN,
            make=partial(make, use_layer3d_rope=True),
            refused="option use_layer3d_rope of the Qwen-Image transformer must be off",
        ),
    ]
    for after in (False, True):
        when = "after" if after else "before"
        out += [
            Row(
                group="modules",
                name=f"the whole transformer compiled, {when} accelerating",
                change=compile_all,
                after=after,
                refused="compiling the whole transformer hides its blocks",
            ),
            Row(
                group="modules",
                name=f"a cache of diffusers enabled, {when} accelerating",
                kinds=(*FLUX, *MORE),
                change=enable_cache,
                after=after,
                refused="the transformer's own cache would skip blocks",
            ),
        ]
    return out


ROWS: tuple[Row, ...] = (
    *text_rows(),
    *callback_rows(),
    *grid_rows(),
    *picture_rows(),
    *controlnet_rows(),
    *flux_rows(),
    *reference_rows(),
    *adapter_rows(),
    *module_rows(),
    *refused_rows(),
)

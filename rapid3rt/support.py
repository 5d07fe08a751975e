# SPDX-License-Identifier: Apache-2.0
"""check: what acceleration can do for a pipeline, in plain words. Looks only; the facts are those `accelerate` goes by.

Contract: tests/matrix/test_check.py.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from rapid3rt import ops
from rapid3rt.adapters import Adapter
from rapid3rt.errors import UnsupportedError
from rapid3rt.pipeline import (
    DEFAULT_SPEED,
    bundled_policy,
    device_of,
    find_adapter,
    find_controlnet,
    model_id,
)
from rapid3rt.policies.base import evaluations_at
from rapid3rt.runtime.twins.base import session_of
from rapid3rt.runtime.twins.scheduler import check_scheduler, steps_per_image
from rapid3rt.runtime.twins.transformer import check_transformer

USUAL_STEPS = 28
WIDTH, INDENT = 100, 13
FEW_STEP_NAMES = ("schnell", "turbo", "lightning", "hyper-", "lcm", "distill")
NEEDED = ("config", "default_sample_size", "vae_scale_factor")  # what every served pipeline has
COUNTED = {  # arguments of a pipeline's call that count its steps, and what they are called
    "skip_guidance_layers": "skip-layer guidance",
    "pag_adaptive_scale": "an adaptive PAG scale",
    "control_guidance_start": "a ControlNet window",
    "callback_on_step_end": "a callback of diffusers' own",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Answer of `check`, printed as a table.

    supported: whether `accelerate` would work. rows: (what, plain sentence), a what may come more than once.
    """

    supported: bool
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join(
            fill(
                text,
                WIDTH,
                initial_indent=f"{name + ':':<{INDENT}}",
                subsequent_indent=" " * INDENT,
            )
            for name, text in self.rows
        )


def check(pipe: Any) -> Check:
    """Say in plain words what acceleration can do for this pipeline, without changing or calling it.

    Parameters
    ----------
    pipe: a diffusers pipeline, plain or accelerated; anything else is said to be not supported.

    Returns
    -------
    Rows: family, scheduler and ControlNet; what each image can do for itself (steps, cache, sparsity) and what falls
    back and why; the expected gain; the memory for each image; which policy and kernels would be used.
    """
    rows: list[tuple[str, str]] = []
    refused = False
    for name, look in (
        ("transformer", _transformer),
        ("controlnet", _controlnet),
        ("scheduler", _scheduler),
    ):
        try:
            text = look(pipe)
        except UnsupportedError as error:
            text, refused = f"not supported: {error}", True
        if text:
            rows.append((name, text))
    if not refused:
        rows += _levels(pipe)
        rows += [("gain", _gain(pipe)), ("memory", _memory(pipe)), ("policy", _policy(pipe))]
        try:
            rows.append(("kernels", _kernels(pipe)))
        except (ValueError, UnsupportedError) as error:  # what the environment asks for is missing
            rows.append(("kernels", f"not supported: {error}"))
            refused = True
    return Check(supported=not refused, rows=tuple(rows))


def _transformer(pipe: Any) -> str:
    adapter = find_adapter(pipe)
    check_transformer(pipe.transformer)
    if lacking := [name for name in NEEDED if not hasattr(pipe, name)]:
        raise UnsupportedError(
            f"pipe must be a diffusers pipeline, got {type(pipe).__name__} without {', '.join(lacking)}"
        )
    state = "" if session_of(pipe.transformer) is None else "; accelerated: rapid3rt.report(pipe)"
    return f"{type(pipe.transformer).__name__} ({adapter.family}), supported{state}"


def _controlnet(pipe: Any) -> str:
    if getattr(pipe, "controlnet", None) is None or (adapter := _adapter(pipe)) is None:
        return ""
    name = type(find_controlnet(pipe, adapter)).__name__
    return f"{name}, runs for the images that compute, at their own noise level"


def _adapter(pipe: Any) -> Adapter | None:
    """None where the transformer is refused, which is said elsewhere."""
    try:
        return find_adapter(pipe)
    except UnsupportedError:
        return None


def _scheduler(pipe: Any) -> str:
    check_scheduler(getattr(pipe, "scheduler", None))
    name = type(pipe.scheduler).__name__
    if steps_per_image(pipe.scheduler):
        return f"{name}, every image may stand at its own noise level"
    return (
        f"{name} steps all images alike; for steps of their own set pipe.scheduler = "
        "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)"
    )


def _levels(pipe: Any) -> list[tuple[str, str]]:
    """The three things that a policy decides, and where one of them falls back."""
    rows = [("steps", text) for text in _steps(pipe)]
    rows.append(("cache", "every image computes or reuses on its own, its guidance branches alike"))
    rows += [("sparsity", text) for text in _sparsity(pipe)]
    return rows


def _steps(pipe: Any) -> list[str]:
    refused = "'steps', 'controller' and schedules are refused, 'dense' and 'threshold' work"
    if not steps_per_image(pipe.scheduler):
        return [f"the scheduler's own: {refused}"]
    texts = ["every image skips noise levels on its own"]
    arguments = inspect.signature(type(pipe).__call__).parameters
    if counted := [text for name, text in COUNTED.items() if name in arguments]:
        texts.append(f"not under what counts steps ({', '.join(counted)}): there {refused}")
    return texts


def _sparsity(pipe: Any) -> list[str]:
    adapter, transformer = find_adapter(pipe), pipe.transformer
    if reason := adapter.dense_only(transformer, {}):
        return [f"levels run dense: {reason}"]
    layers, processors = len(adapter.stock_attention(transformer)), len(transformer.attn_processors)
    texts = [f"levels act on {layers} attention layers, for each image its own"]
    if layers < processors:
        texts.append(
            f"{processors - layers} layers stay dense: another attention processor, or fused projections"
        )
    if hasattr(type(pipe), "do_perturbed_attention_guidance"):
        texts.append("levels run dense while pag_scale is above 0: it brings processors of its own")
    return texts


def _gain(pipe: Any) -> str:
    adapter, transformer = find_adapter(pipe), pipe.transformer
    names = [str(part.config.get("_name_or_path", "")) for part in (pipe, transformer)]
    # The last part alone: folders above it have names for other reasons.
    hinted = any(hint in name.lower().split("/")[-1] for name in names for hint in FEW_STEP_NAMES)
    if hinted or adapter.is_few_step(pipe):
        return "none: this is a few-step or distilled model, whose steps are all needed"
    spent = evaluations_at(USUAL_STEPS, DEFAULT_SPEED)
    return (
        f"about `speed` times in the transformer (speed={DEFAULT_SPEED:g} computes {spent} of {USUAL_STEPS} steps), "
        "nothing in text encoders and VAE; none for few-step or distilled weights, or calls of 4 to 8 steps"
    )


def _memory(pipe: Any) -> str:
    """Residual of every guidance branch, and the embedded latents of the last compute."""
    adapter, transformer = find_adapter(pipe), pipe.transformer
    side = pipe.default_sample_size // adapter.patch(transformer)
    pixels = pipe.default_sample_size * pipe.vae_scale_factor
    width, dtype = transformer.inner_dim, transformer.dtype
    mib = side**2 * width * dtype.itemsize / 2**20
    return (
        f"{mib:.3g} MiB for each image and once more for each of its guidance branches, at {pixels} x {pixels} "
        f"({side**2} tokens of {width} {str(dtype).removeprefix('torch.')}); reference images add theirs"
    )


def _policy(pipe: Any) -> str:
    model = model_id(pipe.transformer)
    folder = bundled_policy(model)
    if folder is not None:
        return f"{folder.parent.name}, bundled for model {model}"
    return (
        f"none bundled for model {model}; run rapid3rt.calibrate(pipe, prompts, out=DIR) once, "
        "or take a rule such as 'steps:12/trim'"
    )


def _kernels(pipe: Any) -> str:
    """What serves attention of this model, in blocks of the usual size."""
    device, model = device_of(pipe), pipe.transformer
    head_dim = model.config.attention_head_dim
    chosen = ops.choose_attention(None, device, model.dtype, head_dim, 128, False)
    return f"{chosen} on {device.type}"

# SPDX-License-Identifier: Apache-2.0
"""What users do wrong in a call or between two: an error that names it, or the plain result; then all is well."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cases import BATCH, TICKS, noise_shape
from makers import (
    ALL,
    FLUX,
    SD3,
    Arguments,
    basic,
    call,
    drawn,
    fuse_lora,
    is_guided,
    load_lora,
    make,
    unload_lora,
)

import rapid3rt

POLICY = "threshold:0.2"
kinds = pytest.mark.parametrize("kind", ALL)


def run(pipe: Any, kind: str, **more: Any) -> torch.Tensor:
    return call(pipe, {**basic(kind, BATCH), **more}, TICKS)


@cache
def fresh(
    kind: str, change: Callable[[Any], None] = lambda _: None, policy: str = POLICY
) -> torch.Tensor:
    """What a pipeline gives that was never used, with the change made before it is accelerated."""
    pipe = make(kind)
    change(pipe)
    return run(rapid3rt.accelerate(pipe, policy), kind)


# Embeddings ----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[tuple[str, ...], Arguments]] = {  # which families, and what is wrong
    "width": (ALL, {"prompt_embeds": drawn(21, BATCH, 9, 33)}),
    "pooled width": (FLUX, {"pooled_prompt_embeds": drawn(21, BATCH, 65)}),
    "pooled rows": (FLUX, {"pooled_prompt_embeds": drawn(21, (0,), 32)}),  # SD3 joins and refuses
}


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case, (kinds, _) in SHAPES.items() for kind in kinds]
)
def test_embeddings_of_a_wrong_shape(case: str, kind: str) -> None:
    given = dict(SHAPES[case][1])
    if "prompt_embeds" in given and is_guided(kind):
        given["negative_prompt_embeds"] = given["prompt_embeds"]
    pipe = rapid3rt.accelerate(make(kind), POLICY)
    match = r"^(encoder_hidden_states|pooled_projections) must have \d rows of width 32|64, got \("
    with pytest.raises(ValueError, match=match):
        run(pipe, kind, **given)
    assert torch.equal(run(pipe, kind), fresh(kind))


def outcome(pipe: Any, arguments: Arguments) -> tuple[torch.Tensor, str]:
    """Latents, or what is said instead."""
    try:
        return pipe(num_inference_steps=TICKS, output_type="latent", **arguments).images, ""
    except RuntimeError as error:
        return torch.empty(0), str(error)


@kinds
def test_a_branch_of_another_dtype_is_what_it_is_in_the_plain_pipeline(kind: str) -> None:
    """Branches that a pipeline joins are promoted; a call of its own in another type is an error of the model's."""
    name = "negative_prompt_embeds" if is_guided(kind) else "prompt_embeds"
    arguments = {**basic(kind, BATCH), "latents": drawn(13, BATCH, *noise_shape(kind))}
    arguments[name] = arguments[name].bfloat16()
    plain, said = outcome(make(kind), arguments)
    pipe = rapid3rt.accelerate(make(kind), "dense")
    ours, error = outcome(pipe, arguments)
    assert error == said
    assert bool(said) == (kind not in (*SD3, "qwen"))  # which casts by its norm of the text
    assert torch.equal(ours, plain)
    assert torch.equal(run(pipe, kind), fresh(kind, policy="dense"))


# Between two calls ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("change", [load_lora, fuse_lora, unload_lora])
@kinds
def test_a_lora_between_two_calls(kind: str, change: Callable[[Any], None]) -> None:
    pipe = rapid3rt.accelerate(make(kind), POLICY)
    before = run(pipe, kind)
    change(pipe)
    after = run(pipe, kind)
    assert torch.equal(after, fresh(kind, change))
    assert torch.equal(after, before) == (change is unload_lora)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["pipeline", "transformer"])
@kinds
def test_another_dtype_between_two_calls(kind: str, part: str) -> None:
    def cast(pipe: Any) -> None:
        (pipe if part == "pipeline" else pipe.transformer).to(torch.bfloat16)

    pipe = rapid3rt.accelerate(make(kind), POLICY)
    run(pipe, kind)
    cast(pipe)
    after = run(pipe, kind)
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, fresh(kind, cast))


@kinds
def test_another_device_between_two_calls(kind: str) -> None:
    """The device that every machine has holds no numbers: whatever is said, no image comes out, nor is one spoilt."""
    pipe = rapid3rt.accelerate(make(kind), POLICY)
    expected = run(pipe, kind)
    modules = list(pipe.transformer.modules())
    kept = [(dict(module._parameters), dict(module._buffers)) for module in modules]
    pipe.transformer.to("meta")
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)meta|device"):
        run(pipe, kind)
    for module, (parameters, buffers) in zip(modules, kept, strict=True):
        module._parameters.update(parameters)
        module._buffers.update(buffers)
    assert torch.equal(run(pipe, kind), expected)


@pytest.mark.cuda
@kinds
def test_to_the_gpu_between_two_calls(kind: str) -> None:
    def move(pipe: Any) -> None:
        pipe.to("cuda")

    pipe = rapid3rt.accelerate(make(kind), POLICY)
    run(pipe, kind)
    move(pipe)
    assert torch.equal(run(pipe, kind), fresh(kind, move))


# Inside a call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
@kinds
def test_a_batch_that_changes_in_a_callback(kind: str, name: str) -> None:
    def callback(_pipe: Any, step: int, _t: Any, kwargs: Arguments) -> Arguments:
        return {name: torch.cat([kwargs[name]] * 2)} if step == 1 else {}

    pipe = rapid3rt.accelerate(make(kind), POLICY)
    more = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [name]}
    with pytest.raises((ValueError, rapid3rt.StateError), match=r"must have \d+ (images|rows)"):
        run(pipe, kind, **more)
    assert torch.equal(run(pipe, kind), fresh(kind))


# Another pipeline ----------------------------------------------------------------------------------------------------


@kinds
def test_a_pipeline_made_of_an_accelerated_one_is_refused(kind: str) -> None:
    pipe = rapid3rt.accelerate(make(kind), POLICY)
    expected = run(pipe, kind)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(rapid3rt.StateError, match=r"before rapid3rt\.accelerate, or after"):
        run(other, kind)
    with pytest.raises(rapid3rt.StateError, match="must not be accelerated already"):
        rapid3rt.accelerate(other, POLICY)
    assert torch.equal(run(pipe, kind), expected)
    rapid3rt.restore(other)
    assert torch.equal(run(other, kind), run(make(kind), kind))
    assert torch.equal(run(pipe, kind), expected)

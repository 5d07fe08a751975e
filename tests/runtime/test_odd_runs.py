# SPDX-License-Identifier: Apache-2.0
"""Runs that few people make: odd grids, policies with buffers of their own, autocast, attention backends, panoramas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3InpaintPipeline
from diffusers.models import attention_dispatch
from test_flux import call_flux, make_flux
from test_layouts import call, make_pipeline

import rapid3rt
from rapid3rt import ops
from rapid3rt.adapters.flux import noise_grid
from rapid3rt.errors import UnsupportedError
from rapid3rt.types import ADAMS_BASHFORTH, ComputeDecision, DenoiseState, Run, StepDecision

STEPS = 4


class Walker:
    """Walks the grid; subclasses do one thing otherwise. Notes what it saw."""

    leaves_grid = False
    name = "walker"

    def __init__(self, levels: tuple[int, ...] = (0, 0)) -> None:
        self.levels = levels
        self.shapes = set[tuple[int, ...]]()

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        self.shapes |= {tuple(state.latents.shape), tuple(state.reference.shape)}
        level = torch.tensor(self.levels[: len(state.nfe)], dtype=torch.int32)
        return ComputeDecision(action=torch.zeros_like(state.nfe), sparsity=level)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        self.shapes.add(tuple(velocity.shape))
        return StepDecision(next_sigma=self.sigmas[state.step.long() + 1])


class OneBuffer(Walker):
    """Fills the same tensor with the order of every tick."""

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.order = torch.zeros(run.images, dtype=torch.int8)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        self.order.fill_(ADAMS_BASHFORTH if state.tick == STEPS - 1 else 1)
        return StepDecision(
            next_sigma=super().decide_step(state, velocity).next_sigma, order=self.order
        )


class Halver(Walker):
    """Says that it stays on the grid, and does not."""

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=state.sigma / 2)


class Elsewhere(Walker):
    """Answers on another device."""

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=super().decide_step(state, velocity).next_sigma.to("meta"))


@pytest.mark.parametrize("sigmas", [[1.0, 0.4, 0.7, 0.2], [0.3, 0.6, 1.0]])
def test_sigmas_that_rise_are_refused_before_any_step(sigmas: list[float]) -> None:
    for pipe, run in ((make_pipeline("sd3", torch.float32), call), (make_flux("dev"), call_flux)):
        rapid3rt.accelerate(pipe, "dense")
        with pytest.raises(UnsupportedError, match="sigmas must never rise, got 0"):
            run(pipe, len(sigmas), sigmas=sigmas)
        run(pipe, 2)


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.0], [1.0, 0.5, 0.5, 0.2]])
def test_equal_sigmas_run_as_in_the_plain_pipeline_and_replay(
    sigmas: list[float], tmp_path: Path
) -> None:
    pipe = make_pipeline("sd3", torch.float32)
    plain = call(pipe, len(sigmas), sigmas=sigmas)
    rapid3rt.accelerate(pipe, "dense")
    assert torch.equal(call(pipe, len(sigmas), sigmas=sigmas), plain)
    rapid3rt.report(pipe).save(tmp_path / "trace.json")
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(call(pipe, len(sigmas), sigmas=sigmas), plain)


def test_the_trace_keeps_what_a_policy_answered_then(tmp_path: Path) -> None:
    pipe = make_pipeline("sd3", torch.float32)
    rapid3rt.accelerate(pipe, OneBuffer())
    first = call(pipe, STEPS)
    report = rapid3rt.report(pipe)
    assert [tick.order for tick in report.trace.images[0]] == [1, 1, 1, ADAMS_BASHFORTH]
    report.save(tmp_path / "trace.json")
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"replay:{tmp_path / 'trace.json'}")
    assert torch.equal(call(pipe, STEPS), first)


def test_a_trace_replays_in_the_attention_mode_that_it_was_made_in(tmp_path: Path) -> None:
    pipe, path = make_pipeline("sd3", torch.float32), tmp_path / "trace.json"
    rapid3rt.accelerate(pipe, Walker(levels=(0, 3)), attention="fast")
    first = call(pipe, STEPS)
    rapid3rt.report(pipe).save(path)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, Walker(levels=(0, 3)))
    assert not torch.equal(call(pipe, STEPS), first)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"replay:{path}")
    with pytest.raises(ValueError, match="attention 'fast' in the trace, 'exact' in the run"):
        call(pipe, STEPS)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, f"replay:{path}", attention="fast")
    assert torch.equal(call(pipe, STEPS), first)


def test_fast_attention_takes_our_kernel_for_an_image_with_any_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    attend = ops.block_sparse_attention

    def counted(q: torch.Tensor, *rest: Any, **options: Any) -> Any:
        rows.append(len(q))
        return attend(q, *rest, **options)

    monkeypatch.setattr(ops, "block_sparse_attention", counted)
    pipe = make_pipeline("sd3", torch.float32)
    plain = call(pipe, STEPS)
    images = {}
    for levels in ((0, 0), (0, 3)):
        rows.clear()
        rapid3rt.accelerate(pipe, Walker(levels=levels), attention="fast")
        images[levels] = call(pipe, STEPS)
        rapid3rt.restore(pipe)
        assert set(rows) == {4}  # both images in both branches
    torch.testing.assert_close(images[0, 0], plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images[0, 0][0], images[0, 3][0], rtol=1e-5, atol=1e-5)


def test_a_policy_that_says_it_stays_on_the_grid_is_held_to_it() -> None:
    pipe = make_pipeline("sd35", torch.float32)
    rapid3rt.accelerate(pipe, Halver())
    window = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}
    with pytest.raises(ValueError, match=r"next_sigma .* the next of the run's own grid"):
        call(pipe, STEPS, **window)
    rapid3rt.restore(pipe)
    rapid3rt.accelerate(pipe, Walker())
    call(pipe, STEPS, **window)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3", True])
def test_a_grid_of_no_number_of_steps_is_refused(steps: Any) -> None:
    pipe, policy = make_pipeline("sd3", torch.float32), Walker()
    policy.grid_steps = steps  # type: ignore[attr-defined]
    rapid3rt.accelerate(pipe, policy)
    with pytest.raises(ValueError, match="grid_steps of policy 'walker' must be an integer of"):
        call(pipe, STEPS)


def test_an_answer_on_another_device_is_named() -> None:
    pipe = make_pipeline("sd3", torch.float32)
    rapid3rt.accelerate(pipe, Elsewhere())
    with pytest.raises(ValueError, match="next_sigma of policy 'walker' must be on cpu"):
        call(pipe, STEPS)


def test_off_the_grid_times_follow_the_schedulers_number_of_training_timesteps() -> None:
    pipe = make_pipeline("sd3", torch.float32, num_train_timesteps=500)
    seen = []
    handle = pipe.transformer.time_text_embed.register_forward_pre_hook(
        lambda _module, arguments: seen.append(float(arguments[0].max()))
    )
    rapid3rt.accelerate(pipe, "steps:3/trim")
    call(pipe, STEPS)
    handle.remove()
    sigmas = [tick.sigma for tick in rapid3rt.report(pipe).trace.images[0]]
    # Once more after the end: the host learns of it from the plan that follows.
    assert seen[:3] == pytest.approx([500 * sigma for sigma in sigmas])


def test_policies_of_an_inpainting_model_see_noise_and_not_its_mask() -> None:
    plain = make_pipeline("sd3", torch.float32, channels=16)
    config = {**plain.transformer.config, "in_channels": 33, "out_channels": 16}
    components = {**plain.components, "transformer": type(plain.transformer).from_config(config)}
    pipe, policy = StableDiffusion3InpaintPipeline(**components), Walker()
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    given = {"image": picture, "mask_image": (picture[:, :1] > 0.5).float(), "strength": 1.0}
    expected = call(pipe, STEPS, **given)
    rapid3rt.accelerate(pipe, policy)
    assert torch.equal(call(pipe, STEPS, **given), expected)
    assert policy.shapes == {(2, 16, 16, 16)}


@pytest.mark.parametrize("layout", ["sd3", "sd35"])
def test_sparse_levels_run_under_autocast(layout: str) -> None:
    pipe = make_pipeline(layout, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = call(pipe, STEPS)
        rapid3rt.accelerate(pipe, Walker(levels=(0, 3)))
        mixed = call(pipe, STEPS)
    assert torch.equal(mixed[0], plain[0])
    assert bool(mixed.isfinite().all())
    assert not torch.equal(mixed[1], plain[1])


def test_a_dense_image_beside_a_sparse_one_stays_on_the_backend_that_its_user_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = make_flux("dev")
    pipe.transformer.set_attention_backend("_native_math")
    make_flux("schnell").transformer.set_attention_backend("native")
    used = set[str]()
    registry = attention_dispatch._AttentionBackendRegistry._backends
    for name, own in list(registry.items()):

        def noted(*args: Any, _own: Any = own, _name: str = name.value, **kwargs: Any) -> Any:
            used.add(_name)
            return _own(*args, **kwargs)

        monkeypatch.setitem(registry, name, noted)
    rapid3rt.accelerate(pipe, Walker(levels=(0, 3)))
    call_flux(pipe, 2)
    assert used == {"_native_math"}


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (2, 521), (64, 64)])
def test_a_panorama_is_a_grid_though_its_positions_fall_together_in_bfloat16(
    shape: tuple[int, int],
) -> None:
    rows, columns = shape
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    flat = ids.flatten(0, 1).bfloat16()
    assert noise_grid(flat) == shape
    reference = flat.clone()
    reference[:, 0] = 1
    assert noise_grid(torch.cat([flat, reference])) == shape
    if rows > 1 and columns > 1:
        with pytest.raises(UnsupportedError, match="img_ids must list the noise tokens first"):
            noise_grid(flat[:-1])
    with pytest.raises(UnsupportedError, match="img_ids must list the noise tokens first"):
        noise_grid(torch.cat([reference, flat]))

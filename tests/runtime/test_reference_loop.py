# SPDX-License-Identifier: Apache-2.0
"""Whatever is decided, the accelerated pipeline gives the latents of the slow loop in `reference_loop.py`.

Every image of a batch plays a script of its own; the loop plays the same scripts one image at a time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from reference_loop import Decision, Image, Script, Walk, denoise
from test_layouts import LAYOUTS, make_pipeline

import rapid3rt
from rapid3rt.types import (
    ADAMS_BASHFORTH,
    COMPUTE,
    EULER,
    REUSE,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)

TICKS = 8
TOLERANCE = 1e-5  # float32 rounding, GEMMs of other shapes included (DESIGN.md, R2)
SQUARE, SMALL, SEAM = (16, 16), (8, 8), (12, 20)  # SEAM: 7.5 blocks of 32 tokens, then text
FAST = 0.5  # mean square of a velocity, splits the images of these tests
Batch = dict[str, torch.Tensor]  # arguments of the pipeline, one row per image


@pytest.fixture(autouse=True)
def _one_thread(_two_threads: None) -> None:
    """Matrices of 64 to 256 rows gain nothing from a second one."""
    torch.set_num_threads(1)


def make(layout: str) -> Any:
    """A pipeline whose attention matters.

    At their initial size the attention layers hardly move the latents: level 2 taken for level 3 would change them by
    less than 1e-2. Doubled, every wrong decision shows, and rounding still grows to 2e-6 at most.
    """
    pipe = make_pipeline(layout, torch.float32)
    with torch.no_grad():
        for name, weight in pipe.transformer.transformer_blocks.named_parameters():
            if ".attn." in name or ".attn2." in name:
                weight.mul_(2)
    return pipe


@cache
def plain_transformer(layout: str) -> Any:
    """The transformer of the loop: same weights, never accelerated."""
    return make(layout).transformer


@cache
def grid() -> tuple[float, ...]:
    """The pipeline's own sigmas, 0 included."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(TICKS)
    return tuple(scheduler.sigmas.tolist())


def make_batch(images: int, size: tuple[int, int]) -> Batch:
    """Noise and embeddings, other ones for each image; negative embeddings too."""
    source = torch.Generator().manual_seed(5)
    shapes = {
        "latents": (images, 4, *size),
        "prompt_embeds": (images, 9, 32),
        "pooled_prompt_embeds": (images, 64),
        "negative_prompt_embeds": (images, 9, 32),
        "negative_pooled_prompt_embeds": (images, 64),
    }
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}


def pick(batch: Batch, *images: int) -> Batch:
    return {name: value[list(images)] for name, value in batch.items()}


# Scripts -------------------------------------------------------------------------------------------------------------


def script(
    sigmas: Sequence[float], actions: str = "", levels: str = "", orders: str = ""
) -> Script:
    """One letter per tick: c(ompute) or r(euse), level, order; what is left out is dense Euler."""
    n = len(sigmas)
    return tuple(
        Decision(next_sigma=s, reuse=a == "r", level=int(level), order=int(order))
        for s, a, level, order in zip(
            sigmas,
            actions.ljust(n, "c"),
            levels.ljust(n, "0"),
            orders.ljust(n, str(EULER)),
            strict=True,
        )
    )


def reuse_on_the_grid() -> tuple[Script, ...]:
    # The last one answers reuse at its first tick, which computes all the same.
    return tuple(
        script(grid()[1:], actions)
        for actions in ("crcrcrcr", "crrcrrrc", "crrrrrrr", "cccccccc", "rrcrrrrr")
    )


def jumps_off_the_grid() -> tuple[Script, ...]:
    return (
        script((0.61, 0.2, 0.0)),
        script((0.0,)),
        script((0.97, grid()[3], 0.6, 0.3, grid()[7], 0.0)),
        script((0.95, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.3)),  # the last tick goes to 0
        script((0.7, 0.9, 0.4, -0.5)),  # never up, never below 0
    )


def second_order() -> tuple[Script, ...]:
    return (
        script((0.9, 0.5, 0.45, 0.1, 0.0), orders="22222"),
        script((0.9, 0.88, 0.6, 0.25, 0.0), orders="11222"),  # a step 14 times the one before it
        script((0.8, 0.6, 0.55, 0.2, 0.0), orders="12121"),
        script(grid()[1:], orders="12222222"),
    )


def second_order_across_reuse() -> tuple[Script, ...]:
    sigmas = (0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.04, 0.0)
    return (
        script(sigmas, "crccrccc", orders="11222222"),
        script(sigmas, "crrccrrc", orders="12222222"),  # reused before there are two computes
        script((*sigmas[:4], 0.0), "ccrrr", orders="12222"),
        script(sigmas, "ccrcrcrc", orders="11212121"),
        script(sigmas, "ccrcrcrc", orders="12121212"),
    )


def levels() -> tuple[Script, ...]:
    sigmas = (0.8, 0.55, 0.3, 0.0)
    mixed = ("0000", "1111", "2222", "3333", "0123", "3210")
    return (
        *(script(sigmas, levels=word) for word in mixed),
        script(sigmas, "crcr", levels="2323"),  # the level of a reused tick is void
        script((0.4, 0.0), levels="03"),
    )


def at_random(seed: int) -> tuple[Script, ...]:
    """Eight scripts of different lengths; the longest do not reach 0 by themselves."""
    draw = random.Random(seed)
    scripts = []
    for length in draw.sample((1, 3, 4, 5, 6, 7, 8, 8), 8):
        sigma, word = 1.0, []
        for tick in range(length):
            # Steps of 20 to 50 % also keep an extrapolation within the limit that is tested on its own below.
            on_grid = [point for point in grid() if 0.5 * sigma <= point <= 0.8 * sigma]
            sigma *= draw.uniform(0.5, 0.8)
            if on_grid and draw.random() < 0.4:
                sigma = draw.choice(on_grid)
            word.append(
                Decision(
                    next_sigma=0.0 if tick == length - 1 and length < TICKS else sigma,
                    reuse=tick > 0 and draw.random() < 0.4,
                    level=draw.choice((0, 0, 1, 2, 3)),
                    order=draw.choice((EULER, ADAMS_BASHFORTH)),
                )
            )
        scripts.append(tuple(word))
    return tuple(scripts)


class Reacting:
    """Decides every image by what it alone shows: drift says whether to compute, velocity how far to step."""

    name = "reacting"

    def begin(self, run: Run) -> None: ...

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        still = state.has_reference & (state.drift < 0.12) & (state.since_compute < 3)
        return ComputeDecision(
            action=torch.where(still, REUSE, COMPUTE).to(torch.int8),
            sparsity=(state.drift * 20).int() % 4,
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        # A choice of two ratios: rounding of the velocity never shows in sigma.
        is_fast = velocity.square().mean((1, 2, 3)) > FAST
        return StepDecision(
            next_sigma=state.sigma * torch.where(is_fast, 0.8, 0.6),
            order=torch.where(is_fast, ADAMS_BASHFORTH, EULER).to(torch.int8),
        )


class Scripted:
    """Every image plays its own script; entries of images that have played theirs are garbage."""

    name = "scripted"

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.scripts = scripts
        self.seen: list[dict[str, torch.Tensor]] = []  # by tick

    def begin(self, run: Run) -> None:
        assert run.sigmas == grid()
        assert (run.images, run.ticks, run.block_size) == (len(self.scripts), TICKS, (32, 32))
        self.seen = []

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        self.seen.append(
            {name: getattr(state, name).clone() for name in ("sigma", "nfe", "has_reference")}
            | {name: getattr(state, name).clone() for name in ("latents", "reference", "drift")}
        )
        action, sparsity = [], []
        for i, word in enumerate(self.scripts):
            playing = state.tick < len(word)
            action.append(
                (REUSE if word[state.tick].reuse else COMPUTE) if playing else (-7, 77, 1, 0)[i % 4]
            )
            sparsity.append(word[state.tick].level if playing else (99, -5, 3, 0)[i % 4])
        return ComputeDecision(
            action=torch.tensor(action, dtype=torch.int8),
            sparsity=torch.tensor(sparsity, dtype=torch.int32),
        )

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        self.seen[-1]["velocity"] = velocity.clone()
        next_sigma, order = [], []
        for i, word in enumerate(self.scripts):
            playing = state.tick < len(word)
            garbage = (math.nan, 3.0, -math.inf, 0.5)[i % 4]
            next_sigma.append(word[state.tick].next_sigma if playing else garbage)
            order.append(word[state.tick].order if playing else (2, 9, -1, 1)[i % 4])
        return StepDecision(
            next_sigma=torch.tensor(next_sigma), order=torch.tensor(order, dtype=torch.int8)
        )


# The two sides -------------------------------------------------------------------------------------------------------


def accelerated(
    layout: str, policy: Any, batch: Batch, guidance: float
) -> tuple[torch.Tensor, rapid3rt.Report]:
    pipe = make(layout)
    rapid3rt.accelerate(pipe, policy)
    height, width = batch["latents"].shape[2:]
    latents: torch.Tensor = pipe(
        height=height,
        width=width,
        num_inference_steps=TICKS,
        guidance_scale=guidance,
        output_type="latent",
        **{name: value.clone() for name, value in batch.items()},
    ).images
    return latents, rapid3rt.report(pipe)


def by_loop(layout: str, scripts: Sequence[Script], batch: Batch, guidance: float) -> list[Walk]:
    walks = []
    for i, word in enumerate(scripts):
        one = pick(batch, i)
        prompts = [(one["prompt_embeds"], one["pooled_prompt_embeds"])]
        if guidance > 1:
            prompts.insert(0, (one["negative_prompt_embeds"], one["negative_pooled_prompt_embeds"]))
        image = Image(latents=one["latents"], prompts=tuple(prompts))
        walks.append(
            denoise(
                plain_transformer(layout),
                image,
                word,
                sigma=grid()[0],
                ticks=TICKS,
                guidance=guidance,
            )
        )
    return walks


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error over largest value."""
    return float((got - want).abs().max() / want.abs().max())


def errors(latents: torch.Tensor, walks: Sequence[Walk]) -> list[float]:
    return [relative_error(latents[i], walk.latents[0]) for i, walk in enumerate(walks)]


def check(
    layout: str, scripts: tuple[Script, ...], size: tuple[int, int], guidance: float
) -> torch.Tensor:
    batch = make_batch(len(scripts), size)
    latents, report = accelerated(layout, Scripted(scripts), batch, guidance)
    walks = by_loop(layout, scripts, batch, guidance)
    found = errors(latents, walks)
    assert max(found) <= TOLERANCE, found
    assert [image.nfe for image in report.images] == [walk.nfe for walk in walks]
    return latents


# Tests ---------------------------------------------------------------------------------------------------------------

layouts = pytest.mark.parametrize("layout", list(LAYOUTS))
guidances = pytest.mark.parametrize("guidance", [1.0, 5.0])


@layouts
@guidances
@pytest.mark.parametrize(
    "scripts", [reuse_on_the_grid, jumps_off_the_grid, second_order, second_order_across_reuse]
)
def test_decisions_give_the_latents_of_the_loop(layout: str, guidance: float, scripts: Any) -> None:
    check(layout, scripts(), SMALL, guidance)


@pytest.mark.slow
@layouts
@guidances
@pytest.mark.parametrize("size", [SQUARE, SEAM])
def test_sparse_levels_beside_dense_give_the_latents_of_the_loop(
    layout: str, guidance: float, size: tuple[int, int]
) -> None:
    latents = check(layout, levels(), size, guidance)
    dense = tuple(tuple(replace(d, level=0) for d in word) for word in levels())
    without = by_loop(layout, dense, make_batch(len(dense), size), guidance)
    moved = errors(latents, without)
    assert moved[0] <= TOLERANCE, moved  # the dense neighbour of sparse images
    assert min(moved[1:]) > 1e-3, moved


@pytest.mark.slow
@layouts
@guidances
@pytest.mark.parametrize("seed", [0, 1])
def test_everything_at_once_gives_the_latents_of_the_loop(
    layout: str, guidance: float, seed: int
) -> None:
    scripts = at_random(seed)
    assert len({len(word) for word in scripts}) == 7
    check(layout, scripts, (SEAM, SQUARE)[seed], guidance)


def test_a_policy_sees_where_the_loop_stands() -> None:
    scripts, batch = at_random(0), make_batch(8, SMALL)
    policy = Scripted(scripts)
    accelerated("sd3", policy, batch, 5.0)
    for i, walk in enumerate(by_loop("sd3", scripts, batch, 5.0)):
        for tick, visit in enumerate(walk.visits):
            seen = {name: value[i] for name, value in policy.seen[tick].items()}
            assert float(seen["sigma"]) == float(visit.sigma)
            assert int(seen["nfe"]) == sum(earlier.computed for earlier in walk.visits[:tick])
            assert bool(seen["has_reference"]) == (tick > 0)
            assert float(seen["drift"]) == pytest.approx(visit.drift, rel=1e-4)
            assert relative_error(seen["latents"], visit.latents[0]) <= TOLERANCE
            assert relative_error(seen["velocity"], visit.velocity[0]) <= 10 * TOLERANCE
            if tick > 0:
                assert relative_error(seen["reference"], visit.reference[0]) <= TOLERANCE


@layouts
@pytest.mark.parametrize("kind", ["scripted", "reacting"])
def test_an_image_depends_on_no_neighbour(layout: str, kind: str) -> None:
    scripts, batch = at_random(1), make_batch(8, SEAM)

    def run(*images: int) -> tuple[torch.Tensor, list[int], tuple[Any, ...]]:
        policy = Reacting() if kind == "reacting" else Scripted([scripts[i] for i in images])
        latents, report = accelerated(layout, policy, pick(batch, *images), 5.0)
        return latents, [image.nfe for image in report.images], report.trace.images

    latents, nfe, traces = run(*range(8))
    assert len(set(traces)) >= 4  # images that all did the same would prove little
    others = (5, 0, 2, 2)
    for images in (*((i,) for i in range(8)), others):
        alone = run(*images)
        for at, i in enumerate(images):
            assert relative_error(alone[0][at], latents[i]) <= TOLERANCE
            assert alone[1][at] == nfe[i]
            assert alone[2][at] == traces[i]


WRONG: dict[str, tuple[int, dict[str, Any]]] = {
    "a reuse that computes": (2, {"reuse": False}),
    "a compute that reuses": (3, {"reuse": True}),
    "another level": (1, {"level": 3}),
    "dense for sparse": (5, {"level": 0}),
    "Euler for the second order": (3, {"order": EULER}),
    "the second order for Euler": (4, {"order": ADAMS_BASHFORTH}),
    "a step too far": (2, {"next_sigma": 0.449}),
}


@cache
def played() -> tuple[tuple[Script, ...], Batch, torch.Tensor]:
    """Three images, the second of which the loop gets told wrongly about."""
    sigmas = (0.8, 0.6, 0.45, 0.3, 0.15, 0.0)
    mixed = script(sigmas, "ccrcrc", levels="020001", orders="121212")
    scripts = (script(sigmas), mixed, script((0.5, 0.0)))
    batch = make_batch(3, SQUARE)
    return scripts, batch, accelerated("sd35", Scripted(scripts), batch, 5.0)[0]


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_loop_that_is_told_one_wrong_decision_disagrees_on_that_image_alone(wrong: str) -> None:
    scripts, batch, latents = played()
    tick, change = WRONG[wrong]
    word = list(scripts[1])
    word[tick] = replace(word[tick], **change)
    assert word[tick] != scripts[1][tick]
    found = errors(latents, by_loop("sd35", (scripts[0], tuple(word), scripts[2]), batch, 5.0))
    assert max(found[0], found[2]) <= TOLERANCE, found
    assert found[1] > 50 * TOLERANCE, found


def test_image_attention_of_dual_layers_counts_the_last_block_too() -> None:
    # 144 tokens: four and a half blocks. Level 1 keeps 3 of 4 beside text, and 4 of 5 where there is no text.
    check("sd35", (script((0.5, 0.0), levels="11"),), (12, 12), 1.0)


def test_a_reused_tick_extrapolates_no_further_than_the_cap() -> None:
    check("sd3", (script((0.9, 0.8, 0.0), "ccr", orders="122"),), SMALL, 1.0)

# SPDX-License-Identifier: Apache-2.0
"""What sparsity and reuse save at the shapes of the real models: ticks of SD3-medium and FLUX-dev geometry.

    python benches/bench_geometry.py [--model sd3-medium flux-dev] [--blocks 3] [--size 1024] [--rounds 5] [--save NAME]

The real width, heads, token counts and text lengths, a few blocks deep, random weights in bfloat16, through the
unmodified diffusers pipeline (SD3 with guidance, so two rows per image). Rounds are interleaved; every figure is the
median over rounds of the median tick. Besides what these few blocks took, a table says what follows for all blocks of
the model: everything outside of the blocks is what a tick in which the image reuses takes, so that much once, and the
rest as often as there are blocks. The estimate is what a planner that measured nothing goes by: FLOPs.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from record import save
from ticks import Script, time_ticks

from rapid3rt.planning.sparsity import DENSITIES

STEPS = 4
FAST = "dense, attention='fast'"
MODELS = {"sd3-medium": 24, "flux-dev": 57}
"""Blocks of the real ones."""


def always(level: int | None) -> Script:
    """Computes densely in the first tick, then does the same for every image: a sparsity level, or None to reuse."""
    return Script(lambda _, tick: 0 if tick == 0 else level)


def make_pipeline(model: str, blocks: int) -> Any:
    """The pipeline without encoders; transformer of the model's shape, `blocks` deep (FLUX: a third of them double)."""
    torch.manual_seed(0)
    if model == "sd3-medium":
        transformer = SD3Transformer2DModel(
            sample_size=128,
            num_layers=blocks,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )
        made: Any = StableDiffusion3Pipeline(
            transformer.to(torch.bfloat16),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            *(None,) * 7,
        )
    else:
        transformer = FluxTransformer2DModel(
            num_layers=-(-blocks // 3),
            num_single_layers=blocks - -(-blocks // 3),
            guidance_embeds=True,
        )
        made = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            *(None,) * 5,
            transformer.to(torch.bfloat16),
        )
    made.set_progress_bar_config(disable=True)
    return made


def conditions(model: str) -> dict[str, torch.Tensor]:
    """Random text of the length and width that the model's encoders give."""
    length, pooled = (333, 2048) if model == "sd3-medium" else (512, 768)
    names = ("", "negative_") if model == "sd3-medium" else ("",)
    made = {}
    for name in names:
        made[f"{name}prompt_embeds"] = torch.randn(1, length, 4096, dtype=torch.bfloat16)
        made[f"{name}pooled_prompt_embeds"] = torch.randn(1, pooled, dtype=torch.bfloat16)
    return made


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a tick under each decision, and ratios to the plain pipeline's tick."""
    pipe, call = make_pipeline(model, options.blocks), dict[str, Any](conditions(model))
    call |= {"height": options.size, "width": options.size, "num_inference_steps": STEPS}

    def tick(policy: Script | None, attention: str = "exact") -> float:
        """The median of the ticks between the first, which has nothing to reuse, and the last."""
        noise = torch.Generator().manual_seed(0)
        arguments = {**call, "guidance_scale": 3.5, "generator": noise}
        return median(time_ticks(pipe, policy, arguments, attention=attention)[:-1])

    levels = range(len(DENSITIES))
    names = ["dense", *(f"level {level}, density {DENSITIES[level]}" for level in levels[1:])]
    policies = dict(zip(names, map(always, levels), strict=True))
    cases: dict[str, tuple[Any, ...]] = {"plain": (None,)}
    cases |= {name: (policy,) for name, policy in policies.items()}
    cases |= {FAST: (always(0), "fast"), "reuse": (always(None),)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, case in cases.items():
            times[name].append(tick(*case))
    ms = {name: median(taken) for name, taken in times.items()}
    run = policies["dense"].run
    assert run is not None
    costs = run.costs
    estimates = {"plain": 1.0, FAST: 1.0, "reuse": costs.reuse}
    estimates |= dict(zip(names, costs.levels, strict=True))
    outside, deep = ms["reuse"], MODELS[model] / options.blocks
    whole = {
        name: outside + deep * (taken - outside) if name != "reuse" else outside
        for name, taken in ms.items()
    }
    return {
        "blocks": options.blocks,
        "size": options.size,
        "ms": ms,
        "spread_ms": {name: [min(taken), max(taken)] for name, taken in times.items()},
        "over_plain": {name: taken / ms["plain"] for name, taken in ms.items()},
        "all_blocks_over_plain": {name: taken / whole["plain"] for name, taken in whole.items()},
        "estimate": estimates,
    }


def show(model: str, result: dict[str, Any]) -> None:
    """The table of one model."""
    print(f"\n{model}, {result['size']} x {result['size']}, {result['blocks']} blocks")
    print(
        f"{'':<24}{'ms':>10}{'rounds':>20}{'to plain':>10}{MODELS[model]:>6} blocks{'estimate':>10}"
    )
    for name, ms in result["ms"].items():
        low, high = result["spread_ms"][name]
        print(
            f"{name:<24}{ms:>10.1f}{f'{low:.1f} to {high:.1f}':>20}{result['over_plain'][name]:>10.3f}"
            f"{result['all_blocks_over_plain'][name]:>13.3f}{result['estimate'][name]:>10.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--size", type=int, default=1024, help="pixels, of a square")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", default=None)
    options = parser.parse_args()
    results = {}
    for model in options.model:
        results[model] = measure(model, options)
        show(model, results[model])
    if options.save:
        print(f"saved to {save(options.save, {'models': results})}")


if __name__ == "__main__":
    main()

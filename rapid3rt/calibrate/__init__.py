# SPDX-License-Identifier: Apache-2.0
"""Fit a pipeline's own sigma grid, steps and allocation from a dozen prompts; measure what every action costs here.

The grid is a family: one monotone warp of u, good for every number of evaluations (METHOD.md, section 6 c). On it every
step of every number of evaluations gets weights of its own (`fitting`). On top of that every image gets its own number,
by the detail it is going to show. Errors are mean squared, of decoded images to the converged solution of the same
noise. No gradient passes through the model. Every measurement goes to a file in the output folder, so an
interrupted call goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rapid3rt.calibrate.allocate import allocate
from rapid3rt.calibrate.arguments import check_call
from rapid3rt.calibrate.fitting import fit
from rapid3rt.calibrate.measure import Bench, error_profile
from rapid3rt.calibrate.search import FEWEST_TICKS, search
from rapid3rt.calibrate.table import before_and_after, format_table, plot
from rapid3rt.errors import check_count
from rapid3rt.pipeline import accelerate, restore
from rapid3rt.policies.folder import PolicyFolder

__all__ = ["calibrate", "format_table"]


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    out: str | Path,
    *,
    num_inference_steps: int = 28,
    seed: int = 0,
    batch_size: int = 8,
    evaluations: int = 40,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PolicyFolder:
    """Search the grid family of this pipeline and measure its actions; write a policy folder.

    Parameters
    ----------
    pipe: a plain (not accelerated) pipeline of a supported family.
    prompts: a dozen or more; each is paired with its own noise, drawn from `seed` and its position. The first 64 decide
        the grid; a few hundred make the mean of the evaluations what `speed` asks for.
    out: folder of the policy; give the same folder again to go on after an interruption.
    num_inference_steps: steps of the pipeline that users will call. evaluations: warps to try.
    call: further arguments of the pipeline's call (guidance_scale, height, ...), the same for every measurement: give
        those that users will call with, since guidance above all decides where the steps belong. With a ControlNet
        also `control_image`, one picture for all prompts: errors and costs then include the net.

    Returns
    -------
    The policy, also saved in `out`: `accelerate(pipe, policy=out, speed=2.5)`.

    Raises
    ------
    ValueError: no prompts, fewer than 8 steps, a ControlNet without its picture, or a folder that holds another
        calibration.
    UnsupportedError, StateError: as `accelerate`.
    """
    if isinstance(prompts, str) or not prompts:
        got = repr(prompts) if isinstance(prompts, str) else "none"
        raise ValueError(f"prompts must be a list of at least one prompt, got {got}")
    for name, value in (("evaluations", evaluations), ("batch_size", batch_size)):
        check_count(name, value)
    if check_count("num_inference_steps", num_inference_steps) < FEWEST_TICKS:
        raise ValueError(
            f"num_inference_steps must be at least {FEWEST_TICKS}, got {num_inference_steps}"
        )
    # A pipeline or call that cannot be served is refused before a folder is made.
    restore(accelerate(pipe, "dense"))
    check_call(pipe, call or {})
    bench = Bench(
        pipe,
        list(prompts),
        Path(out),
        num_inference_steps,
        seed,
        batch_size,
        dict(call or {}),
        progress,
    )
    family = search(bench, evaluations)
    family = replace(family, error_profile=error_profile(bench.walk(family)))
    family = replace(family, fit=fit(bench, family))
    schedule, allocated = allocate(bench, family)
    costs = bench.costs()
    table = before_and_after(bench, schedule, allocated)
    provenance = {
        "prompts": len(prompts),
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "call": {name: value for name, value in (call or {}).items() if _is_plain(value)},
        "torch_threads": torch.get_num_threads(),
        "mean_squared_error": table,
    }
    folder = PolicyFolder(model=bench.model, schedule=schedule, costs=costs, provenance=provenance)
    folder.save(out)
    plot(table, Path(out) / "calibration.png")
    return folder


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))

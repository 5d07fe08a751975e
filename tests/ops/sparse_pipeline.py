# SPDX-License-Identifier: Apache-2.0
"""A bundled tiny pipeline under a policy of sparsity levels, for tests that compare backends."""

from __future__ import annotations

import torch

import rapid3rt
from rapid3rt.types import ComputeDecision, DenoiseState, Run, StepDecision


class Levels:
    """Walks the grid, every image at a sparsity level of its own."""

    leaves_grid = False
    reuses = False
    name = "levels"

    def __init__(self, *levels: int) -> None:
        self.levels = levels

    def begin(self, run: Run) -> None:
        self.sigmas = torch.tensor(run.sigmas, device=run.device)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        level = torch.tensor(self.levels, dtype=torch.int32, device=state.nfe.device)
        return ComputeDecision(action=torch.zeros_like(state.nfe), sparsity=level)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        return StepDecision(next_sigma=self.sigmas[state.step.long() + 1])


def sample(kind: str, attention: str, backend: str, device: str) -> torch.Tensor:
    """Latents of a dense image and a sparse one."""
    pipe = rapid3rt.load_tiny(kind).to(device)
    pipe.set_progress_bar_config(disable=True)
    rapid3rt.accelerate(pipe, Levels(0, 2), attention=attention, backend=backend)
    latents: torch.Tensor = pipe(
        ["a red circle", "a blue triangle and a green square"],
        num_inference_steps=3,
        max_sequence_length=32,
        generator=[torch.Generator().manual_seed(i) for i in range(2)],
        output_type="latent",
    ).images
    return latents

# SPDX-License-Identifier: Apache-2.0
"""The recipes that are known by name, each a function; a variant is another one's with a few fields changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rapid3rt.tiny import GUIDANCE
from rapid3rt.types import EULER
from training.config import Recipe


def tiny_sd3() -> Recipe:
    """Dial recipe on the bundled tiny SD3: allocation and steps on top of the searched family."""
    return Recipe(
        name="tiny-sd3",
        model="tiny-sd3",
        guidance_scale=GUIDANCE,
        max_sequence_length=32,
        head_width=32,
        head_side=16,
    )


def tiny_sd3_allocation() -> Recipe:
    """The allocation alone, fitted to the bank: no rollouts, minutes. The strongest policy measured so far."""
    return replace(tiny_sd3(), name="tiny-sd3-allocation", heads=("allocation",))


def tiny_flux_allocation() -> Recipe:
    """The same on the bundled tiny FLUX."""
    return replace(tiny_flux(), name="tiny-flux-allocation", heads=("allocation",))


def tiny_flux() -> Recipe:
    """Dial recipe on the bundled tiny FLUX."""
    return replace(tiny_sd3(), name="tiny-flux", model="tiny-flux")


def sd3_medium() -> Recipe:
    """Dial recipe on Stable Diffusion 3 medium; give a policy folder of `rapid3rt calibrate` and a file of prompts."""
    return Recipe(
        name="sd3-medium",
        model="stabilityai/stable-diffusion-3-medium-diffusers",
        policy="sd3-medium-calibrated",
        prompts="prompts.txt",
        dtype="bfloat16",
        guidance_scale=7.0,
        resolution=512,
        groups=16,
        iterations=1000,
        inner_epochs=4,
        learning_rate=1e-4,
        rollout_batch=16,
    )


def flux_dev() -> Recipe:
    """Dial recipe on FLUX.1 dev; give a policy folder of `rapid3rt calibrate` and a file of prompts."""
    return replace(
        sd3_medium(),
        name="flux-dev",
        model="black-forest-labs/FLUX.1-dev",
        policy="flux-dev-calibrated",
        guidance_scale=3.5,
        max_sequence_length=512,
        rollout_batch=8,
    )


def as_paper(recipe: Recipe) -> Recipe:
    """The paper's own recipe on the same model: three heads from nothing, its reward, one ratio per trajectory."""
    return replace(
        recipe,
        name=f"{recipe.name}-paper",
        heads=("cache", "sparse", "step"),
        prior=False,
        order=EULER,
        reward="paper",
        quality=(("scene", 1.0),) if recipe.model.startswith("tiny-") else (("imagereward", 1.0),),
        omega=1.0,
        advantage="group",
        ratio="trajectory",
        clip_high=recipe.clip_low,
    )


_DIAL = (tiny_sd3, tiny_flux, sd3_medium, flux_dev)
RECIPES: dict[str, Callable[[], Recipe]] = {
    name: make
    for dial in _DIAL
    for name, make in (
        (dial().name, dial),
        (f"{dial().name}-paper", lambda dial=dial: as_paper(dial())),
    )
} | {make().name: make for make in (tiny_sd3_allocation, tiny_flux_allocation)}
"""Name to recipe."""

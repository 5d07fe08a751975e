# SPDX-License-Identifier: Apache-2.0
"""A small real world that runs offline: captioned scenes, exact scores, tiny but genuine diffusers pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
LATENT_SIZE = 32
GUIDANCE = 3.5
"""Guidance scale that the tiny pipelines are shown and measured at, as the model card of SD3.5 has it. At the
pipeline's default of 7 they score the same and every solver needs about twice the evaluations."""


def load_tiny(model: str = "sd3") -> Any:
    """Load a bundled tiny pipeline of 64 x 64 pixels: a genuine `StableDiffusion3Pipeline` or `FluxPipeline`.

    Raises ValueError for a name that is not bundled.
    """
    names = sorted(p.parent.name for p in ASSETS.glob("*/model_index.json"))
    if model not in names:
        raise ValueError(f"model must be one of {', '.join(names)}, got {model!r}")
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # Loading takes a second: bars and notes about optional parts would only be noise.
    libraries = (diffusers_logging, transformers_logging)
    verbosity = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        pipe = DiffusionPipeline.from_pretrained(ASSETS / model, local_files_only=True)
    finally:
        for library, level in zip(libraries, verbosity, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
    if hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = (
            LATENT_SIZE  # FLUX pipelines assume 128, whatever their VAE was made for
        )
    return pipe


__all__ = ["ASSETS", "GUIDANCE", "load_tiny"]

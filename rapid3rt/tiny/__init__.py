# SPDX-License-Identifier: Apache-2.0
"""A small real world that runs offline: captioned scenes, exact scores, tiny but genuine diffusers pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ASSETS = Path(__file__).parent / "assets"
LATENT_SIZE = 32
GUIDANCE = 3.5
"""Guidance scale that the tiny pipelines are shown and measured at, as the model card of SD3.5 has it. At the
pipeline's default of 7 they score the same and every solver needs about twice the evaluations."""


def bundled_names() -> list[str]:
    """Names of the pipelines that `load_tiny` takes."""
    return sorted(p.parent.name for p in ASSETS.glob("*/model_index.json"))


def load_tiny(model: str = "sd3", dtype: torch.dtype = torch.float32) -> Any:
    """Load a bundled tiny pipeline of 64 x 64 pixels: a genuine `StableDiffusion3Pipeline` or `FluxPipeline`.

    dtype: of all its models, as in `from_pretrained`. Raises ValueError for a name that is not bundled.
    """
    if model not in bundled_names():
        raise ValueError(f"model must be one of {', '.join(bundled_names())}, got {model!r}")
    from diffusers import DiffusionPipeline

    with _silence():
        pipe = DiffusionPipeline.from_pretrained(ASSETS / model, dtype=dtype, local_files_only=True)
    if hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = (
            LATENT_SIZE  # FLUX pipelines assume 128, whatever their VAE was made for
        )
    return pipe


@contextmanager
def _silence() -> Iterator[None]:
    """Loading takes a second: bars and notes about optional parts would only be noise. Afterwards all is as before."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    hub_was_silent = are_progress_bars_disabled()
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, level, bar in before:
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
        # transformers switches the bars of the hub along with its own.
        (disable_progress_bars if hub_was_silent else enable_progress_bars)()


__all__ = ["ASSETS", "GUIDANCE", "bundled_names", "load_tiny"]

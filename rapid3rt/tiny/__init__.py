# SPDX-License-Identifier: Apache-2.0
"""A small real world that runs offline: captioned scenes, exact scores, tiny but genuine diffusers pipelines."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"


def load_tiny(model: str = "sd3") -> Any:
    """Load a bundled tiny pipeline: "sd3", a genuine `StableDiffusion3Pipeline` of 64 x 64 pixels.

    Raises ValueError for a name that is not bundled.
    """
    names = sorted(p.parent.name for p in ASSETS.glob("*/model_index.json"))
    if model not in names:
        raise ValueError(f"model must be one of {', '.join(names)}, got {model!r}")
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    # The pipeline has no T5 on purpose; the loader would say so each time.
    verbosity, bars = (
        diffusers_logging.get_verbosity(),
        os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"),
    )
    level = logging.getLogger("transformers").level
    try:
        diffusers_logging.set_verbosity_error()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        pipe = DiffusionPipeline.from_pretrained(ASSETS / model, local_files_only=True)
    finally:
        diffusers_logging.set_verbosity(verbosity)
        logging.getLogger("transformers").setLevel(level)
        if bars is not None:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = bars
    return pipe


__all__ = ["ASSETS", "load_tiny"]

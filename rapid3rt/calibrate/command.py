# SPDX-License-Identifier: Apache-2.0
"""What command lines share: folders that they write to, files of prompts, pipelines by name, how Ctrl-C ends them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch


def make_folder(out: Path) -> None:
    """Make a folder that can be written to, before any work is done for it. Raises ValueError where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(
            f"--out must be a folder that can be written to, got {str(out)!r}: {error.strerror}"
        ) from None


def stop(message: str) -> NoReturn:
    """What a Ctrl-C becomes: one line, and the exit status that shells know it by."""
    print(message, file=sys.stderr)
    raise SystemExit(130)


def read_prompts(path: Path) -> list[str]:
    """A prompt per line of a text file; empty lines are none. Raises ValueError where there is not one."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8, {error.reason}"
        raise ValueError(
            f"--prompts must be a text file in UTF-8, got {str(path)!r}: {reason}"
        ) from None
    # str.splitlines would also split at separators that belong to a prompt.
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts must hold at least one prompt, got an empty {str(path)!r}")
    return prompts


def load_pipeline(model: str, dtype: torch.dtype | None = None) -> Any:
    """A diffusers pipeline of a folder or hub id. dtype: None for bfloat16 on a GPU, where it then lies, else float32.

    Raises ValueError for what can be neither; OSError where the hub does not have it.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    on_gpu = dtype is None and torch.cuda.is_available()
    default = torch.bfloat16 if on_gpu else torch.float32
    if not Path(model).is_dir():
        try:
            validate_repo_id(model)
        except HFValidationError:
            raise ValueError(
                f"model must be a bundled one, a folder that is there or a hub id, got {model!r}"
            ) from None
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype or default)
    return pipe.to("cuda" if on_gpu else "cpu")

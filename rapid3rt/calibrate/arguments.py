# SPDX-License-Identifier: Apache-2.0
"""What a calibration calls its pipeline with: whether that can work, and what tells it from another one's.

Measurements are kept in a folder and gone on with by another process, so everything they depend on is told by its
content and never by where it lies in memory.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL.Image import Image


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse a call that lacks the pictures of a ControlNet, or has other ones for each prompt.

    Prompts are measured alone, in batches and several times over, so one picture has to do for all of them; a Multi
    takes one for each of its nets.
    """
    if "control_image" not in inspect.signature(type(pipe).__call__).parameters:
        return
    given = call.get("control_image")
    is_multi = hasattr(getattr(pipe, "controlnet", None), "nets")
    for picture in given if is_multi and isinstance(given, list | tuple) else [given]:
        if (num := _num_pictures(picture)) != 1:
            raise ValueError(
                "call['control_image'] must be one picture for all prompts (of a Multi, one for each net), since each "
                f"prompt is measured alone and beside others, got {num or 'none'}"
            )


def _num_pictures(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, list | tuple):
        return sum(map(_num_pictures, value))
    return len(value) if getattr(value, "ndim", 3) == 4 else 1


def told_apart(call: Mapping[str, Any]) -> list[str]:
    """The arguments of a call as text, sorted: tensors, arrays and pictures by a digest of their content."""
    return sorted(str((name, _described(value))) for name, value in call.items())


def _described(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(_described, value))
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, Image):
        return f"{value.mode} {value.size} {_digest(value.tobytes())}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {_digest(value.tobytes())}"
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return f"{value.dtype} {tuple(value.shape)} {_digest(flat.numpy().tobytes())}"
    return value


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fingerprint(model: torch.nn.Module) -> str:
    """Tells the weights of one model from those of another: the first numbers of each tensor and the sum of its bytes.

    Summed where the weights are, in integers: the same on every device, and a moment for the largest model on a GPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().contiguous().flatten()
        total = int(flat.view(torch.uint8).sum(dtype=torch.int64))
        few = flat[:4].double().tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {few} {total}".encode())
    return digest.hexdigest()[:16]

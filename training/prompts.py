# SPDX-License-Identifier: Apache-2.0
"""Text embeddings of the training prompts: encoded once, since text encoders cost more than the heads ever do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_CHUNK = 16
# What a pipeline's `encode_prompt` returns, as arguments of its call; None: not an argument. By transformer class.
_RETURNED = {
    "SD3Transformer2DModel": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "FluxTransformer2DModel": ("prompt_embeds", "pooled_prompt_embeds", None),
}
# Of the call, those that decide how prompts are encoded.
_ENCODING = ("max_sequence_length", "clip_skip", "negative_prompt")


class Prompts:
    """Arguments of a pipeline's call for some of its prompts.

    Families whose encoding is not known here get the strings themselves. call: the further arguments of the call.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        self._prompts = list(prompts)
        self._embeds: dict[str, torch.Tensor] = {}
        names = _RETURNED.get(type(pipe.transformer).__name__)
        if names is None:
            return
        options = {name: call[name] for name in _ENCODING if name in call}
        known = inspect.signature(pipe.encode_prompt).parameters
        if "do_classifier_free_guidance" in known:
            options["do_classifier_free_guidance"] = call.get("guidance_scale", 7.0) > 1
        others = {name: None for name in ("prompt_2", "prompt_3") if name in known}
        chunks: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(self._prompts), _CHUNK):
            with torch.no_grad():
                encoded = pipe.encode_prompt(
                    prompt=self._prompts[start : start + _CHUNK], **others, **options
                )
            pairs = zip(names, encoded, strict=True)
            chunks.append({name: x.cpu() for name, x in pairs if name and x is not None})
        self._embeds = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def arguments(self, indices: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Of the call, for the prompts of these numbers; a prompt may come several times."""
        if not self._embeds:
            return {"prompt": [self._prompts[i] for i in indices]}
        rows = torch.tensor(list(indices))
        return {name: x[rows].to(device) for name, x in self._embeds.items()}

# SPDX-License-Identifier: Apache-2.0
"""Rewards of a CLIP model, through transformers: how well a picture fits its prompt.

Both are the cosine of image and text embedding times a factor. PickScore: the model's own learned scale (Kirstain et
al. 2023, equation 1; arXiv 2305.01569), on weights trained on human choices. CLIPScore: 100, as tables of accelerators
report it; the cut at 0 of the publication (Hessel et al. 2021; arXiv 2104.08718) is left out, which would make bad
pictures equal. Pictures are seen as they would be saved, in 8 bits; the model runs in float32 unless another type is
asked for, the cosine always.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from training.rewards.base import Samples, batches, check_count, pictures, score_members

DTYPES = ("float32", "bfloat16", "float16")
LONG_PROMPTS = ("truncate", "error")
_PUBLISHED = {
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
    "clipscore": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", 100.0),
}
"""Hub ids of model and processor; factor of the cosine, None for the model's own scale."""


class ClipReward:
    """Cosine of a picture and its prompt under a CLIP model, times a factor.

    Parameters
    ----------
    model, processor: a frozen `CLIPModel` and its `CLIPProcessor`. factor: of the cosine.
    batch_size: pictures at a time. long_prompts: what to do where a prompt has more tokens than the text model has
    positions: "truncate" with one warning, or "error". num_truncated: prompts that were cut so far.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        *,
        factor: float,
        batch_size: int = 16,
        long_prompts: str = "truncate",
    ) -> None:
        if long_prompts not in LONG_PROMPTS:
            raise ValueError(
                f"long_prompts must be one of {', '.join(LONG_PROMPTS)}, got {long_prompts!r}"
            )
        self.name, self.factor = name, factor
        self.model, self.processor = model, processor
        self.positions = int(model.config.text_config.max_position_embeddings)
        self.batch_size = check_count("batch_size", batch_size)
        self.long_prompts = long_prompts
        self.num_truncated = 0

    def __call__(self, samples: Samples) -> torch.Tensor:
        """Raises `ValueError` for a long prompt where that is asked for, before anything is scored."""
        self._check_lengths(samples.prompts)

        def score(members: list[int]) -> torch.Tensor:
            parts = batches(members, self.batch_size)
            return torch.cat([self._cosines(samples, part) for part in parts])

        return self.factor * score_members(samples.finite, score)

    def _cosines(self, samples: Samples, members: list[int]) -> torch.Tensor:
        # Text is padded to one length: a prompt's numbers do not depend on its neighbours.
        inputs = self.processor(
            text=[samples.prompts[i] for i in members],
            images=pictures(samples.images[members]),
            padding="max_length",
            truncation=True,
            max_length=self.positions,
            return_tensors="pt",
        ).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = self.model(**inputs)
        embeddings = (outputs.image_embeds.float(), outputs.text_embeds.float())
        return torch.cosine_similarity(*embeddings)

    def _check_lengths(self, prompts: Sequence[str]) -> None:
        if not prompts:
            return
        tokens = self.processor.tokenizer(list(prompts), verbose=False)["input_ids"]
        lengths = [len(ids) for ids in tokens]
        num_long = sum(length > self.positions for length in lengths)
        if num_long and self.long_prompts == "error":
            raise ValueError(
                f"prompts must have at most {self.positions} tokens for the reward '{self.name}', "
                f"got {num_long} longer ones, up to {max(lengths)}"
            )
        if num_long and not self.num_truncated:
            warnings.warn(
                f"{self.name}: {num_long} of {len(prompts)} prompts have more than {self.positions} tokens and are "
                "cut there; further ones are only counted, in num_truncated",
                RuntimeWarning,
                stacklevel=3,
            )
        self.num_truncated += num_long


def _make(
    name: str,
    *,
    model: str | None = None,
    processor: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 16,
    long_prompts: str = "truncate",
) -> ClipReward:
    """Load a reward of this file.

    Parameters
    ----------
    model, processor: hub ids or folders, None for those of the publication; another model brings its own processor.
    dtype: of the model, one of `DTYPES`. batch_size, long_prompts: as `ClipReward` takes them.

    Raises
    ------
    ValueError: an option is wrong, or a model or processor is not there or not whole.
    """
    published, its_processor, factor = _PUBLISHED[name]
    model = model or published
    processor = processor or (its_processor if model == published else model)
    loaded, tools, scale = _load(model, processor, device, dtype)
    return ClipReward(
        name,
        loaded,
        tools,
        factor=factor or scale,
        batch_size=batch_size,
        long_prompts=long_prompts,
    )


def _load(model: str, processor: str, device: str, dtype: str) -> tuple[Any, Any, float]:
    """A frozen model, its processor and its scale; the scale as stored, since bfloat16 would move 100 to 98.9."""
    from transformers import CLIPModel, CLIPProcessor

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    loaded, info = _fetch("model", CLIPModel, model, output_loading_info=True)
    absent = sorted(info["missing_keys"])
    if absent:  # transformers has put random numbers there
        raise ValueError(
            f"model must be a whole CLIP model, got {model!r} without {absent[0]} and {len(absent) - 1} others"
        )
    scale = float(loaded.logit_scale.detach().double().exp())
    loaded = loaded.to(device, getattr(torch, dtype)).eval().requires_grad_(False)
    return loaded, _fetch("processor", CLIPProcessor, processor), scale


def _fetch(name: str, kind: Any, source: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} must be a {kind.__name__} on the hub or in a folder, got {source!r}: {reason}"
        ) from error


make_pickscore = partial(_make, "pickscore")
make_clipscore = partial(_make, "clipscore")

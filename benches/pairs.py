# SPDX-License-Identifier: Apache-2.0
"""Pairs of prompt and noise of the tiny world, the images that each way makes of them, and bootstrap intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rapid3rt
from rapid3rt.tiny.scenes import sample

PLAIN, REFERENCE, BATCH = 28, 80, 16
Way = Callable[[], AbstractContextManager[Any]]


@contextmanager
def accelerated(pipe: Any, policy: Any, **kwargs: Any) -> Iterator[None]:
    """The pipeline under a policy while the context is open."""
    rapid3rt.accelerate(pipe, policy, **kwargs)
    try:
        yield
    finally:
        rapid3rt.restore(pipe)


@contextmanager
def plainly() -> Iterator[None]:
    """The pipeline as it is."""
    yield


def pipe_id(pipe: Any) -> str:
    """What images depend on besides the call: the transformer's weights and the scheduler's shift."""
    digest = hashlib.sha256()
    for name, weight in sorted(pipe.transformer.state_dict().items()):
        digest.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    config = pipe.scheduler.config
    shift = math.exp(config.base_shift) if config.use_dynamic_shifting else config.shift
    return f"{digest.hexdigest()[:10]}-shift{shift:g}"


class Pairs:
    """Pairs of one split, and every way's images for them, from the cache folder where they exist.

    guidance: of the call. tokens: T5 tokens of the call (silent in the tiny world; the pipeline's default is 256).
    """

    def __init__(
        self,
        pipe: Any,
        count: int,
        split: str,
        seed: int,
        guidance: float,
        tokens: int,
        cache: Path | None,
    ) -> None:
        self.pipe, self.seed, self.cache = pipe, seed, cache
        self.call = {"guidance_scale": guidance, "max_sequence_length": tokens}
        self.scenes = sample(count, seed, split)
        self.nfe: dict[str, np.ndarray] = {}
        if cache is not None:
            self.cache = cache / f"{pipe_id(pipe)}-{split}-{seed}-g{guidance:g}-t{tokens}"

    def images(
        self, name: str, steps: int, way: Way = plainly, *, version: str = ""
    ) -> torch.Tensor:
        """What a way makes of all pairs: float32 `[n, 3, 64, 64]` in -1..1.

        name: of the way, and of its cache files, with the version of what it depends on beside its name.
        """
        chunks, nfe = [], []
        stem = "_".join([name.replace("/", "_").replace(" ", "_"), *filter(None, [version])])
        for start in tqdm(range(0, len(self.scenes), BATCH), desc=name, leave=False):
            path = None
            if self.cache is not None:
                path = self.cache / f"{stem}-{start}.safetensors"
            if path is None or not path.exists():
                images, spent = self._make(start, steps, way)
                if path is None:
                    chunks.append(images)
                    nfe.append(spent)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch = path.with_suffix(".tmp")
                save_file({"images": images.contiguous(), "nfe": spent}, scratch)
                scratch.replace(path)
            stored = load_file(path)
            chunks.append(stored["images"])
            nfe.append(stored["nfe"])
        self.nfe[name] = torch.cat(nfe).numpy()
        return torch.cat(chunks)

    def _make(self, start: int, steps: int, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = self.scenes[start : start + BATCH]
        noises = range(start, start + len(scenes))
        with way():
            images = self.pipe(
                [s.caption for s in scenes],
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(self.seed * 100_003 + i) for i in noises],
                output_type="pt",
                **self.call,
            ).images
            try:
                spent = [float(i.nfe) for i in rapid3rt.report(self.pipe).images]
            except rapid3rt.StateError:  # plain
                spent = [float(steps)] * len(scenes)
        return images.float() * 2 - 1, torch.tensor(spent)


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over pairs."""
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)

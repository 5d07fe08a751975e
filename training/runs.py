# SPDX-License-Identifier: Apache-2.0
"""Pairs of caption and noise, and what every way makes of them, stored batch by batch.

A store belongs to one pipeline (weights, scheduler, guidance), split and seed; in it every way has a folder, and every
batch of 16 a file: images, what they cost, scene scores and the trace. So an interrupted evaluation goes on, and
several policies share the runs of their rivals. Prefixes are shared too: a file of more pairs serves fewer.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import rapid3rt
from rapid3rt.runtime.trace import Trace
from rapid3rt.tiny.scenes import sample
from rapid3rt.tiny.score import score
from rapid3rt.types import COMPUTE, ActionCosts
from training.peers import Work
from training.seeds import seed_of
from training.ways import Way

BATCH = 16
_VERSION = 2
"""Of what the files mean: those of another version are made anew. 2: noises of a split's own."""
_STEPS_OF_16_BITS = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a way made of N pairs.

    images: float32 `[N, 3, h, w]` in -1..1, rounded to 16 bits. cost: equivalent steps, nfe: evaluations, score: of the
    scene; float64 `[N]`. dense: bool `[N]`, whether every tick was a dense compute.
    """

    images: torch.Tensor
    cost: torch.Tensor
    nfe: torch.Tensor
    score: torch.Tensor
    dense: torch.Tensor


class Runs:
    """The pairs of one split, and the outcomes of ways on them.

    store: folder of the results. guidance, tokens: guidance scale and `max_sequence_length` of the call.
    """

    def __init__(
        self,
        pipe: Any,
        pairs: int,
        *,
        split: str,
        seed: int,
        guidance: float,
        tokens: int,
        store: Path,
    ) -> None:
        self.pipe, self.split, self.seed = pipe, split, seed
        self.scenes = sample(pairs, seed, split)
        self.call = {"guidance_scale": guidance, "max_sequence_length": tokens}
        self.store = store / f"{_pipe_digest(pipe, self.call)}-{split}-{seed}"

    def batches(self, way: Way, pairs: int) -> Iterator[int]:
        """Make what is missing of a way for the first pairs; yields the size of every batch once it is there.

        Raises `ValueError` for more pairs than there are.
        """
        if not 1 <= pairs <= len(self.scenes):
            raise ValueError(f"pairs must be 1 to {len(self.scenes)}, got {pairs}")
        for start in range(0, pairs, BATCH):
            size = min(BATCH, pairs - start)
            path = self._path(way, start)
            if _size(path) < size:
                self._make(way, start, size, path)
            yield size

    def outcome(
        self, way: Way, pairs: int, tell: Callable[[int], object] = lambda size: None
    ) -> Outcome:
        """Of the first pairs, made where they are missing. tell: hears the size of every batch once it is there."""
        parts = []
        for start, size in zip(range(0, pairs, BATCH), self.batches(way, pairs), strict=True):
            tell(size)
            parts.append(self._read(way, start, size))
        images, cost, nfe, points, dense = (torch.cat(part) for part in zip(*parts, strict=True))
        return Outcome(images=images, cost=cost, nfe=nfe, score=points, dense=dense)

    def traces(self, way: Way, pairs: int) -> list[Trace]:
        """Of the batches of the first pairs. Raises `ValueError` for a way that decides nothing."""
        found = []
        for start, size in zip(range(0, pairs, BATCH), self.batches(way, pairs), strict=True):
            with safe_open(self._path(way, start), "pt") as stored:
                text = stored.metadata()["trace"]
            if not text:
                raise ValueError(f"way must have a trace, got '{way.key}', which decides nothing")
            trace = Trace.from_json(text, str(self._path(way, start)))
            found.append(_first_images(trace, size))
        return found

    def _path(self, way: Way, start: int) -> Path:
        slug = re.sub(r"[^a-zA-Z0-9.=]+", "-", way.key)[:60].strip("-")
        digest = hashlib.sha256(f"{way.key} steps={way.steps}".encode()).hexdigest()[:10]
        return self.store / f"{slug}-{digest}" / f"{start:05d}.safetensors"

    def _make(self, way: Way, start: int, size: int, path: Path) -> None:
        pairs = range(start, start + size)
        calls = [[i] for i in pairs] if way.alone else [pairs]
        made, traces = zip(*(self._call(way, call) for call in calls), strict=True)
        images, counts, cost = (torch.cat(part) for part in zip(*made, strict=True))
        trace = None if way.alone else traces[0]
        tensors = {
            "images": (images * _STEPS_OF_16_BITS).round().sub(32768).to(torch.int16),
            "counts": counts,
            "cost": cost,
            "score": torch.from_numpy(score(images, [self.scenes[i] for i in pairs])).double(),
        }
        _write(tensors, path, {"way": way.key, "trace": trace.to_json() if trace else ""})

    def _call(
        self, way: Way, pairs: Sequence[int]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Trace | None]:
        """Images in 0..1, counts and equivalent steps of one call, and its trace."""
        with way.open(self.pipe, pairs[0]) as work:
            images = self.pipe(
                [self.scenes[i].caption for i in pairs],
                num_inference_steps=way.steps,
                generator=[self.noise(i) for i in pairs],
                output_type="pt",
                **self.call,
            ).images.float()
            trace = _trace(self.pipe)
        spent = work.spent() if isinstance(work, Work) else _spent(trace, len(pairs), way.steps)
        return (images, *spent), trace

    def noise(self, pair: int) -> torch.Generator:
        """What draws a pair's noise: no other split's, nor one that anything was calibrated or trained with."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.split, pair, "noise"))

    def _read(self, way: Way, start: int, size: int) -> tuple[torch.Tensor, ...]:
        with safe_open(self._path(way, start), "pt") as stored:
            images, counts, cost, points = (
                stored.get_tensor(name)[:size] for name in ("images", "counts", "cost", "score")
            )
        if way.costs is not None:
            cost = priced(counts, way.costs)
        images = (images.float() + 32768) / _STEPS_OF_16_BITS * 2 - 1
        dense = counts.sum(1) == counts[:, 1]
        return images, cost, counts[:, 1:].sum(1).double(), points, dense


def priced(counts: torch.Tensor, costs: ActionCosts) -> torch.Tensor:
    """Equivalent steps by a table, float64 `[N]`.

    counts: integers `[N, 1 + levels]`, ticks that reused, then ticks that computed at every sparsity level. Raises
    `ValueError` for a level that was used and the table lacks.
    """
    table = torch.tensor([costs.reuse, *costs.levels], dtype=torch.float64)
    if counts[:, len(table) :].any():
        used = counts.shape[1] - 1
        raise ValueError(f"costs must list {used} sparsity levels, got {len(costs.levels)}")
    table = table[: counts.shape[1]]
    return counts[:, : len(table)].double() @ table


def _trace(pipe: Any) -> Trace | None:
    try:
        return rapid3rt.report(pipe).trace
    except rapid3rt.StateError:  # the plain pipeline, or another scheduler's
        return None


def _spent(trace: Trace | None, size: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts as for `priced`, and equivalent steps as the run itself priced them."""
    if trace is None:
        counts = torch.tensor([[0, steps]], dtype=torch.int32).expand(size, 2).contiguous()
        return counts, torch.full((size,), float(steps), dtype=torch.float64)
    levels = 1 + max(tick.level for ticks in trace.images for tick in ticks)
    counts = torch.zeros(size, 1 + levels, dtype=torch.int32)
    for i, ticks in enumerate(trace.images):
        for tick in ticks:
            counts[i, 1 + tick.level if tick.action == COMPUTE else 0] += 1
    cost = [sum(tick.cost for tick in ticks) for ticks in trace.images]
    return counts, torch.tensor(cost, dtype=torch.float64)


def _first_images(trace: Trace, size: int) -> Trace:
    return trace if len(trace.images) == size else replace(trace, images=trace.images[:size])


def _size(path: Path) -> int:
    """How many images a file holds; 0 where there is none, or none that can be read."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as stored:
            return int(stored.get_slice("images").get_shape()[0])
    except SafetensorError:
        return 0


def _write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Atomically: two evaluations may make the same batch at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}-{secrets.token_hex(4)}")
    try:
        save_file(tensors, scratch, metadata=metadata)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _pipe_digest(pipe: Any, call: dict[str, Any]) -> str:
    """What images depend on besides way, prompts and noises: weights, scheduler, arguments of the call."""
    found = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for name, weight in sorted(module.state_dict().items()):
                raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
                found.update(f"{part}.{name} {tuple(weight.shape)} {weight.dtype}".encode())
                found.update(raw.numpy().tobytes())
    settings = [_VERSION, BATCH, call, dict(pipe.scheduler.config)]
    found.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return found.hexdigest()[:10]

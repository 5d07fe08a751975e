# SPDX-License-Identifier: Apache-2.0
"""The reference bank: pairs of prompt and noise, what they converge to, and what fixed schedules make of them.

Built once, before training, and read by everything that learns (METHOD.md, section 5): rewards compare with the
converged solutions, the allocation head learns from the table of errors m_i(k), advantages subtract the prior's own
reward. Kept in a folder, batch by batch, so a build that is interrupted goes on where it was.

Shape letters: n pairs, K schedules, H and W of decoded images.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rapid3rt
from rapid3rt.policies.schedule import ScheduleFamily, WarpFamily
from training.ranks import Ranks
from training.seeds import seed_of

REFERENCE_STEPS = 80
"""Of the converged solution, at order 2."""
CONVERGED = f"steps:{REFERENCE_STEPS}/trim/auto"


@contextmanager
def accelerated(pipe: Any, policy: Any, **kwargs: Any) -> Iterator[None]:
    """The pipeline under a policy while the context is open."""
    rapid3rt.accelerate(pipe, policy, **kwargs)
    try:
        yield
    finally:
        rapid3rt.restore(pipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one way made of pairs. images: float32 `[n, 3, H, W]` in -1..1. nfe, equivalent_steps: float32 `[n]`."""

    images: torch.Tensor
    nfe: torch.Tensor
    equivalent_steps: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A way's error to the converged solution and its cost, float32 `[n]` each."""

    error: torch.Tensor
    nfe: torch.Tensor
    equivalent_steps: torch.Tensor


@dataclass(slots=True)
class Bank:
    """Pairs of prompt and noise under one pipeline.

    prompts: one for each pair. seed: of the noises. steps: of the pipeline's call. call: its further arguments.
    folder: where runs are kept; another folder for other pairs. ranks: that share the work, batch by batch.
    """

    pipe: Any
    prompts: Sequence[str]
    folder: Path
    seed: int = 0
    steps: int = 28
    call: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    progress: bool = True
    ranks: Ranks | None = None
    _known: dict[str, Outcome] = field(default_factory=dict, repr=False)
    _tables: dict[str, Table] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        self.folder = Path(self.folder)
        if self.ranks is None:
            self._claim()
        else:
            self.ranks.main_first(self._claim)

    @property
    def is_main(self) -> bool:
        """Whether this process makes what one process has to make."""
        return self.ranks is None or self.ranks.is_main

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.ranks is not None:
            self.ranks.wait()

    def _claim(self) -> None:
        """Write what the folder is of, or compare with what it says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        described = {
            "weights": fingerprint(self.pipe.transformer),
            "scheduler": json.loads(json.dumps(dict(self.pipe.scheduler.config), default=str)),
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
            "seed": self.seed,
            "steps": self.steps,
            "call": {name: str(value) for name, value in sorted(self.call.items())},
            "batch_size": self.batch_size,
        }
        path = self.folder / "bank.json"
        if path.exists():
            known = json.loads(path.read_text())
            differing = [name for name in described if known.get(name) != described[name]]
            if differing:
                raise ValueError(
                    f"folder of a bank must be new or of the same pairs, got {str(self.folder)!r}, made with another "
                    f"{', another '.join(differing)}"
                )
            return
        with beside(path) as scratch:
            scratch.write_text(json.dumps(described, indent=1) + "\n")

    def __len__(self) -> int:
        return len(self.prompts)

    def converged(self) -> torch.Tensor:
        """The solutions that errors are of, float32 `[n, 3, H, W]` in -1..1."""
        return self.run(
            CONVERGED, lambda: accelerated(self.pipe, CONVERGED), steps=REFERENCE_STEPS
        ).images

    def full(self) -> torch.Tensor:
        """What the plain pipeline makes in all its steps, as `converged`."""
        return self.run("plain", lambda: accelerated(self.pipe, "dense")).images

    def table(self, name: str, policy: Callable[[], Any], **dial: Any) -> Table:
        """Errors and costs of a policy. name: unique to it. dial: budget or speed."""
        name = name + "".join(f" {key}={value:g}" for key, value in dial.items())
        if name not in self._tables:
            outcome = self.run(name, lambda: accelerated(self.pipe, policy(), **dial))
            self._known.pop(name)  # its images are not asked for again
            error = (outcome.images - self.converged()).square().mean((1, 2, 3))
            self._tables[name] = Table(
                error=error, nfe=outcome.nfe, equivalent_steps=outcome.equivalent_steps
            )
        return self._tables[name]

    def searched(self, family: WarpFamily, evaluations: int) -> Table:
        """Of a searched family, so many evaluations for every image. Another family has another table."""
        what: tuple[object, ...] = (family.family, family.num_ticks, family.shift, family.order)
        what += (family.knots,) if family.fit is None else (family.knots, family.fit)
        name = f"family {hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"
        return self.table(name, lambda: ScheduleFamily(family), budget=evaluations)

    def run(self, name: str, way: Callable[[], Any], *, steps: int | None = None) -> Outcome:
        """What a way makes of all pairs, from the folder where it was run before."""
        if name in self._known:
            return self._known[name]
        starts = range(0, len(self.prompts), self.batch_size)
        paths = [self.folder / f"{_plain_name(name)}-{start}.safetensors" for start in starts]
        # Dealt before anybody looks: another run may be filling this folder too.
        batches = list(zip(starts, paths, strict=True))
        dealt = batches if self.ranks is None else self.ranks.share(batches)
        own = [(start, path) for start, path in dealt if not path.exists()]
        for start, path in tqdm(own, desc=name, disable=not self.progress or not own, leave=False):
            with beside(path) as scratch:
                save_file(self._make(start, steps or self.steps, way), scratch)
        self.wait()
        parts = [load_file(path) for path in paths]
        joined = {key: torch.cat([part[key] for part in parts]).float() for key in parts[0]}
        self._known[name] = Outcome(**joined)
        return self._known[name]

    def _make(self, start: int, steps: int, way: Callable[[], Any]) -> dict[str, torch.Tensor]:
        pairs = range(start, min(start + self.batch_size, len(self.prompts)))
        with way():
            images = self.images(pairs, steps)
            report = rapid3rt.report(self.pipe).images
        return {
            "images": images.contiguous(),
            "nfe": torch.tensor([float(image.nfe) for image in report]),
            "equivalent_steps": torch.tensor([image.equivalent_steps for image in report]),
        }

    def images(
        self,
        pairs: Sequence[int],
        steps: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Call the pipeline as it stands for some pairs: float32 `[len(pairs), 3, H, W]` in -1..1.

        arguments: their prompts, where they are encoded already.
        """
        given = arguments or {"prompt": [self.prompts[i] for i in pairs]}
        images: torch.Tensor = self.pipe(
            **given,
            num_inference_steps=steps or self.steps,
            generator=[self.noise(i) for i in pairs],
            output_type="pt",
            **self.call,
        ).images
        return images.float().cpu() * 2 - 1

    def noise(self, pair: int) -> torch.Generator:
        """The generator of a pair's initial noise."""
        return torch.Generator().manual_seed(seed_of(self.seed, pair, "noise"))


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` in one go, or not at all; another process that writes the same has its own."""
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def fingerprint(model: torch.nn.Module) -> str:
    """Tells the weights of one model from those of another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        few = tensor.detach().flatten()[:4].double().tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {few}".encode())
    return digest.hexdigest()[:16]


def _plain_name(name: str) -> str:
    """A file name that says what it is of, and differs where the names differ."""
    readable = "".join(c if c.isalnum() or c in "=.-" else "_" for c in name)
    return f"{readable[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

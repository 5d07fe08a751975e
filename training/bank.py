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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rapid3rt
from rapid3rt.calibrate.arguments import fingerprint
from rapid3rt.policies.schedule import ScheduleFamily, WarpFamily
from training.checkpoint import differences
from training.ranks import Ranks
from training.seeds import seed_of

REFERENCE_STEPS = 80
"""Of the converged solution, even ones of the highest order that is stable."""
CONVERGED = f"steps:{REFERENCE_STEPS}/trim/auto"
_NOTE = "bank.json"


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
    folder: where runs are kept; another folder for other pairs. batch_size: pairs of one call, and of one file of a
    folder that is new. ranks: that share the work, file by file.

    Raises `ValueError` where the folder holds runs of other pairs, naming what differs.
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
    _described: dict[str, Any] = field(default_factory=dict, repr=False)
    _known: dict[str, Outcome] = field(default_factory=dict, repr=False)
    _tables: dict[str, Table] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        self.folder = Path(self.folder)
        self._described = {
            "weights": fingerprint(self.pipe.transformer),
            "scheduler": json.loads(json.dumps(dict(self.pipe.scheduler.config), default=str)),
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
            "seed": self.seed,
            "steps": self.steps,
            "call": {name: str(value) for name, value in sorted(self.call.items())},
            "batch_size": self.batch_size,
            "other_weights": {
                name: fingerprint(module)
                for name, module in sorted(self.pipe.components.items())
                if isinstance(module, torch.nn.Module) and name != "transformer"
            },
        }
        if self.ranks is None:
            self._join()
        else:
            self.ranks.main_first(self._join)

    @property
    def is_main(self) -> bool:
        """Whether this process makes what one process has to make."""
        return self.ranks is None or self.ranks.is_main

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.ranks is not None:
            self.ranks.wait()

    def _join(self) -> None:
        """Compare with what the folder is of, and go on in its files of so many pairs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self._check_claim()
        if known is None:
            return
        self._described["batch_size"] = known["batch_size"]
        if self.is_main and "other_weights" not in known:
            with suppress(OSError):  # a folder that can only be read stays as it is
                self._claim()

    def _check_claim(self) -> dict[str, Any] | None:
        """What the folder is of, None where it holds no runs. Raises `ValueError` where those are of other pairs."""
        path = self.folder / _NOTE
        if not path.exists() or not any(self.folder.glob("*.safetensors")):
            return None
        again = f"give another --banks, or delete '{self.folder}'"
        try:
            known = json.loads(path.read_text())
            size = known["batch_size"]
        except (ValueError, TypeError, KeyError):
            size = None
        if type(size) is not int or size < 1:
            raise ValueError(f"'{path}' must say what the bank is of, got other content; {again}")
        # Older versions noted no other weights; files of another size serve as well.
        there = {"other_weights": self._described["other_weights"], **known}
        differing = list(differences({**there, "batch_size": self._file_size}, self._described))
        if differing:
            raise ValueError(
                f"folder of a bank must be new or of the same pairs, got {str(self.folder)!r}, made with another "
                f"{'; another '.join(differing)}; {again}"
            )
        return dict(known)

    def _claim(self) -> None:
        """Write what the folder is of."""
        with beside(self.folder / _NOTE) as scratch:
            scratch.write_text(json.dumps(self._described, indent=1) + "\n")

    def save(self, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write a file of the folder. The first one claims it: a call that fails at once claims nothing.

        Raises `ValueError` where another process has meanwhile filled it with other pairs, `OSError` on a full disk.
        """
        known = self._check_claim()
        if known is None:
            self._claim()
        elif known["batch_size"] != self._file_size:
            raise ValueError(
                f"'{self.folder}' must be of {self._file_size} pairs a file, got {known['batch_size']} of another "
                "process; give the same command again"
            )
        try:
            with beside(path) as scratch:
                save_file(dict(tensors), scratch)
        except (
            SafetensorError
        ) as error:  # the library hides the system's error, such as a full disk
            raise OSError(f"'{path}' could not be written ({error})") from None

    @property
    def _file_size(self) -> int:
        """Pairs of one file."""
        return int(self._described["batch_size"])

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

    def allocated(self, family: WarpFamily, mean: float) -> Table:
        """Of a searched family with its own allocation, so many evaluations in the mean."""
        name = f"allocated {hashlib.sha256(repr(family).encode()).hexdigest()[:8]}"
        return self.table(name, lambda: ScheduleFamily(family), speed=self.steps / mean)

    def run(self, name: str, way: Callable[[], Any], *, steps: int | None = None) -> Outcome:
        """What a way makes of all pairs, from the folder where it was run before."""
        if name in self._known:
            return self._known[name]
        starts = range(0, len(self.prompts), self._file_size)
        paths = [self.folder / f"{_plain_name(name)}-{start}.safetensors" for start in starts]
        # Dealt before anybody looks: another run may be filling this folder too.
        batches = list(zip(starts, paths, strict=True))
        dealt = batches if self.ranks is None else self.ranks.share(batches)
        own = [(start, path) for start, path in dealt if not path.exists()]
        for start, path in tqdm(own, desc=name, disable=not self.progress or not own, leave=False):
            made = self._make(start, steps or self.steps, way)
            self._check_finite(name, start, made["images"], "use another --dtype")
            self.save(made, path)
        self.wait()
        parts = [read_file(path) for path in paths]
        for start, path, part in zip(starts, paths, parts, strict=True):
            again = f"use another --dtype, or delete '{path}' to make them again"
            self._check_finite(name, start, part["images"], again)
        joined = {key: torch.cat([part[key] for part in parts]).float() for key in parts[0]}
        self._known[name] = Outcome(**joined)
        return self._known[name]

    def _check_finite(self, name: str, start: int, images: torch.Tensor, then: str) -> None:
        """A pixel that is no number would make every mean, and all that is learned from it, none."""
        broken = (~images.isfinite().flatten(1).all(1)).nonzero().flatten() + start
        if len(broken):
            raise ValueError(
                f"images of {name!r} must be finite, got NaN or infinity in pairs {broken.tolist()} of "
                f"'{self.folder}'; {then}"
            )

    def _make(self, start: int, steps: int, way: Callable[[], Any]) -> dict[str, torch.Tensor]:
        """What goes into one file."""
        end = min(start + self._file_size, len(self.prompts))
        images: list[torch.Tensor] = []
        report: list[Any] = []
        for first in range(start, end, self.batch_size):
            with way():
                images.append(self.images(range(first, min(first + self.batch_size, end)), steps))
                report += rapid3rt.report(self.pipe).images
        return {
            "images": torch.cat(images).contiguous(),
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


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file of a bank. Raises `ValueError` for one that is damaged."""
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"'{path}' must be as it was written, got: {error}; delete it to make it again"
        ) from None


def _plain_name(name: str) -> str:
    """A file name that says what it is of, and differs where the names differ."""
    readable = "".join(c if c.isalnum() or c in "=.-" else "_" for c in name)
    return f"{readable[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

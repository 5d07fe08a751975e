# SPDX-License-Identifier: Apache-2.0
"""What a run shows: a line of metrics per iteration, a tracker, a screen now and then, a bar, sheets of pictures.

`metrics.jsonl` is the record; everything else can be made from it again. A run that goes on from a checkpoint first
calls `rewind`, so that no iteration stands there twice. A checkpoint carries the number of its last row.
Only the main rank writes: on the others every method does nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from rapid3rt.errors import StateError
from training.console import screen
from training.metrics import DIFFICULTY, METRICS, JsonLines, checked, finite_or_none
from training.pictures import Row, write_sheet

_BAR = ("reward/total", "cost/E", "cost/nfe")


class Tracker(Protocol):
    """Where numbers and pictures go besides the files."""

    def begin(self, iteration: int) -> None:
        """Called once, before anything is written: what is there of this and later iterations is void."""

    def numbers(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one iteration."""

    def picture(self, iteration: int, picture: Image.Image) -> None:
        """A sheet of samples."""

    def close(self) -> None:
        """Hand over what is left."""


class Logs:
    """The log of one run.

    Parameters
    ----------
    folder: made if it is not there. tracker: `tensorboard` writes to `tensorboard/` in the folder; `wandb` goes on with
    the folder's run, through accelerate, whose state a run of several ranks has made before. is_main: whether this rank
    writes. total: iterations of the whole run, for bar and title. every: iterations between two screens, 0 for none.
    project: for wandb. The bar shows `reward/total`, `cost/E` and `cost/nfe` where rows have them.

    Raises `ValueError` for an unknown tracker, `ImportError` in one line for one that is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard",
        is_main: bool = True,
        total: int | None = None,
        every: int = 10,
        project: str = "rapid3rt",
    ) -> None:
        self.folder, self.is_main, self.total, self.every = Path(folder), is_main, total, every
        if tracker not in ("tensorboard", "wandb", "none"):
            raise ValueError(f"tracker must be tensorboard, wandb or none, got {tracker!r}")
        if not is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = JsonLines(self.folder / METRICS)
        self._difficulty = JsonLines(self.folder / DIFFICULTY)
        self._tracker = _open_tracker(tracker, self.folder, project)
        self._begun = False
        self._bar: tqdm[Any] | None = None

    def rewind(self, iteration: int) -> None:
        """Drop what was written about later iterations: called with the checkpoint's number, before the first row.

        Raises `StateError` after it: trackers go back only when they are opened.
        """
        if self.is_main:
            if self._begun:
                raise StateError("rewind must be called before the first row, got a call after it")
            self._rows.rewind(iteration)
            self._difficulty.rewind(iteration)

    def row(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of an iteration, and show them.

        Raises `ValueError` for a bad name or value, and for an iteration that has a row already.
        """
        if not self.is_main:
            return
        if type(iteration) is not int or iteration < self._next:
            raise ValueError(
                f"iteration must be a number from {self._next} on, got {iteration!r}; call rewind first to go back"
            )
        numbers = checked(metrics)
        self._begin()
        stored = {name: finite_or_none(value) for name, value in numbers.items()}
        self._rows.append([{"iteration": iteration, **stored}])
        self._tracker.numbers(iteration, numbers)
        self._show(iteration, numbers)

    def difficulty(self, iteration: int, rows: Iterable[tuple[float, float, float]]) -> None:
        """Write (difficulty, nfe, dial) of images, for the picture of who gets how much."""
        if self.is_main:
            self._difficulty.append(
                {
                    "iteration": iteration,
                    "difficulty": finite_or_none(float(difficulty)),
                    "nfe": finite_or_none(float(nfe)),
                    "dial": float(dial),
                }
                for difficulty, nfe, dial in rows
            )

    def pictures(self, iteration: int, rows: Sequence[Row]) -> None:
        """Write a sheet of plain and accelerated pictures to `samples/00000012.png` and the tracker."""
        if self.is_main:
            self._begin()
            sheet = write_sheet(rows, self.folder / "samples" / f"{iteration:08d}.png")
            self._tracker.picture(iteration, sheet)

    def say(self, text: str) -> None:
        """Print lines without tearing the bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        """Finish bar and tracker."""
        if self.is_main:
            self._tracker.close()
            if self._bar is not None:
                self._bar.close()

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _next(self) -> int:
        return 0 if self._rows.last is None else self._rows.last + 1

    def _begin(self) -> None:
        if not self._begun:
            self._tracker.begin(self._next)
            self._begun = True

    def _show(self, iteration: int, metrics: Mapping[str, float]) -> None:
        if self._bar is None:
            # Where the run goes on, not where it began: else the time to come would be too short.
            start = iteration - 1 if iteration else 0
            self._bar = tqdm(total=self.total, initial=start, desc="train", disable=None)
        self._bar.set_postfix_str(
            "  ".join(f"{name} {metrics[name]:.3g}" for name in _BAR if name in metrics),
            refresh=False,
        )
        self._bar.update(iteration - self._bar.n)
        if self.every and iteration % self.every == 0:
            of = "" if self.total is None else f" of {self.total}"
            colour = sys.stdout.isatty()
            width = min(shutil.get_terminal_size((100, 24)).columns, 140)
            self.say(screen(f"iteration {iteration}{of}", metrics, width=width, colour=colour))


class _Nowhere:
    def begin(self, iteration: int) -> None:
        pass

    def numbers(self, iteration: int, metrics: Mapping[str, float]) -> None:
        pass

    def picture(self, iteration: int, picture: Image.Image) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    """Events that a rewound run wrote are hidden: each sitting tells the reader to purge from its first step on."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "tracker='tensorboard' needs tensorboard: pip install 'rapid3rt[train]'"
            ) from None
        self._make, self._folder = SummaryWriter, str(folder)
        self._writer: Any = None

    def begin(self, iteration: int) -> None:
        self._writer = self._make(self._folder, purge_step=iteration)

    def numbers(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, iteration)

    def picture(self, iteration: int, picture: Image.Image) -> None:
        pixels = np.asarray(picture)
        self._writer.add_image("samples", pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB:
    """Through accelerate's tracker. The folder keeps the run's id, so that a run that goes on stays one run."""

    def __init__(self, folder: Path, project: str) -> None:
        if find_spec("wandb") is None:
            raise ImportError("tracker='wandb' needs wandb: pip install wandb")
        try:
            from accelerate import PartialState
            from accelerate.tracking import WandBTracker
        except ImportError:
            raise ImportError(
                "tracker='wandb' needs accelerate: pip install 'rapid3rt[train]'"
            ) from None
        note = folder / "wandb-run"
        run = note.read_text() if note.exists() else ""
        if not run:
            run = secrets.token_hex(8)
            note.write_text(run)
        PartialState()  # the tracker's own messages ask which rank this is
        self._tracker = WandBTracker(project, id=run, resume="allow", dir=str(folder))
        self._tracker.start()

    def begin(self, iteration: int) -> None:
        """wandb takes no step twice: of a run that went back it keeps the rows that it has, equal but for seconds."""

    def numbers(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._tracker.log(dict(metrics), step=iteration)

    def picture(self, iteration: int, picture: Image.Image) -> None:
        self._tracker.log_images({"samples": [picture]}, step=iteration)

    def close(self) -> None:
        self._tracker.finish()


def _open_tracker(name: str, folder: Path, project: str) -> Tracker:
    if name == "tensorboard":
        return _TensorBoard(folder / "tensorboard")
    return _WandB(folder, project) if name == "wandb" else _Nowhere()

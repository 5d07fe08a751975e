# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a run goes on from with the same bits, whatever stopped it.

A checkpoint is a folder `iteration-00000012` with `tensors.safetensors` and `state.json`. It is written beside, synced
to the disk and renamed, and it is taken away by renaming first, so whoever looks sees whole ones only. Checksums tell
damage from content. One process writes; others may read what it keeps.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypedDict

import safetensors.torch
import torch

from rapid3rt.planning.jsonfile import Fields
from rapid3rt.planning.trace import package_version
from training.state import (
    State,
    flatten,
    load_optimiser_state,
    optimiser_state,
    random_state,
    set_random_state,
    unflatten,
)

__all__ = [
    "Checkpoints",
    "Loaded",
    "State",
    "alone",
    "differences",
    "flatten",
    "load_optimiser_state",
    "optimiser_state",
    "random_state",
    "set_random_state",
    "unflatten",
]

FORMAT, VERSION = "rapid3rt.checkpoint", 1
_STATE, _TENSORS = "state.json", "tensors.safetensors"
_INCOMPLETE = ".incomplete-"
_NAME = re.compile(r"iteration-(\d+)(?:-(\d+))?")
_MISSING = object()
_log = logging.getLogger(__name__)


class Loaded(TypedDict):
    """What `load` returns. warnings: lines for the user, such as that another torch wrote it."""

    iteration: int
    score: float | None
    state: dict[str, Any]
    warnings: list[str]


class Checkpoints:
    """The checkpoints of one run.

    folder: made at the first save. fingerprint: the resolved recipe, as JSON, without what may change between two
    sittings of a run. keep_last: how many of the newest stay; the one with the highest score stays besides.

    Raises `ValueError` if the folder already holds a checkpoint of another recipe, naming the fields that differ.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, fingerprint: Mapping[str, Any], keep_last: int = 3
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self.folder, self.keep_last = Path(folder), keep_last
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder must be a folder, got the file '{self.folder}'")
        self._recipe = _normal(fingerprint)
        newest = self.latest()
        if newest is not None:
            self._check_recipe(self._folders()[newest])

    def save(self, iteration: int, state: State, *, score: float | None = None) -> Path:
        """Write a checkpoint and take away those that need not stay. Returns its folder.

        iteration: of the last row of the log; not before the newest checkpoint's, which is replaced if it is the same.
        score: higher is better, of equal ones the earlier; None, NaN and infinity never count as best.

        Raises `ValueError` for a state that cannot be kept exactly. Raises `OSError` if it could not be written, as on
        a full disk; the checkpoints that were there are then as they were.
        """
        newest = self.latest()
        if type(iteration) is not int or iteration < (newest or 0):
            raise ValueError(
                f"iteration must be a number from {newest or 0} on, got {iteration!r}; call rewind first to go back"
            )
        tensors, tree = flatten(state)
        scratch = self.folder / f"{_INCOMPLETE}{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            final = self._unused(iteration)
            scratch.mkdir()
            self._write(scratch, iteration, score, tensors, tree)
            scratch.rename(final)
            _sync(self.folder)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
            rest = "no earlier one is there" if newest is None else f"that of {newest} is intact"
            raise OSError(
                error.errno,
                f"checkpoint of iteration {iteration} ({size:.1f} MB) could not be written to "
                f"'{self.folder}' ({error.strerror}); {rest}",
            ) from error
        self._prune()
        return final

    def load(self, iteration: int | None = None) -> Loaded:
        """Read a checkpoint, the newest by default. Tensors are on the CPU.

        Raises `ValueError` if there is none, if it is of another recipe or format, or if it is damaged; the last says
        what to delete to go on from the one before.
        """
        folders = self._folders()
        if not folders:
            raise ValueError(f"folder must hold a checkpoint, got none in '{self.folder}'")
        wanted = max(folders) if iteration is None else iteration
        if wanted not in folders:
            there = ", ".join(map(str, folders))
            raise ValueError(f"iteration must be one of {there}, got {wanted}")
        folder = folders[wanted]
        fields = self._check_recipe(folder)
        try:
            tensors = safetensors.torch.load(
                _whole(folder / _TENSORS, fields.text("tensors_sha256"))
            )
        except _DamageError as error:
            raise self._damage(folder, error) from None
        state = unflatten(tensors, fields.get("state"))
        score = fields.get("score")
        return Loaded(iteration=wanted, score=score, state=state, warnings=_warnings(fields))

    def latest(self) -> int | None:
        """Iteration of the newest checkpoint, None where there is none."""
        return max(self._folders(), default=None)

    def best(self) -> int | None:
        """Iteration of the checkpoint with the highest score, None where none has a score."""
        scores = [(self._score(folder), -i) for i, folder in self._folders().items()]
        known = [(score, i) for score, i in scores if score is not None]
        return -max(known)[1] if known else None

    def rewind(self, iteration: int) -> None:
        """Take away all checkpoints of later iterations, newest first, so that a run can go on from this one."""
        for later, _, folder in reversed(self._all()):
            if later > iteration:
                _remove(folder)

    def _all(self) -> list[tuple[int, int, Path]]:
        """Iteration, revision and folder of every checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        names = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(m[1]), int(m[2] or 1), path) for m, path in names if m)

    def _folders(self) -> dict[int, Path]:
        """The last revision of every iteration."""
        return {iteration: path for iteration, _, path in self._all()}

    def _unused(self, iteration: int) -> Path:
        """No folder can be swapped for another in one go, so one that replaces another gets a number of its own."""
        name = f"iteration-{iteration:08d}"
        last = max((revision for i, revision, _ in self._all() if i == iteration), default=0)
        return self.folder / (name if last == 0 else f"{name}-{last + 1}")

    def _sweep(self) -> None:
        """Take away what a killed process left half written, or half deleted."""
        for path in self.folder.glob(f"{_INCOMPLETE}*"):
            shutil.rmtree(path)

    def _prune(self) -> None:
        folders = self._folders()
        keep = {*sorted(folders)[-self.keep_last :], self.best()}
        for iteration, _, folder in self._all():
            if iteration not in keep or folder != folders[iteration]:
                _remove(folder)

    def _write(
        self,
        folder: Path,
        iteration: int,
        score: float | None,
        tensors: dict[str, torch.Tensor],
        tree: dict[str, Any],
    ) -> None:
        # In memory first: the library's own writer hides the system's error and leaves a file only its owner may read.
        payload = safetensors.torch.save(tensors)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "rapid3rt": package_version(),
            "torch": torch.__version__,
            "iteration": iteration,
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "recipe": self._recipe,
            "tensors_sha256": hashlib.sha256(payload).hexdigest(),
            "state": tree,
        }
        document["sha256"] = _digest(document)
        _write_synced(folder / _TENSORS, payload)
        _write_synced(folder / _STATE, json.dumps(document, indent=1, allow_nan=False).encode())
        _sync(folder)

    def _check_recipe(self, folder: Path) -> Fields:
        """The document of a checkpoint, which is whole and of this run's recipe."""
        try:
            fields = _document(folder / _STATE)
        except _DamageError as error:
            raise self._damage(folder, error) from None
        differing = list(differences(fields.get("recipe"), self._recipe))
        if differing:
            raise ValueError(
                f"recipe must be that of '{folder}', got other values: {'; '.join(differing)}"
            )
        return fields

    def _damage(self, folder: Path, error: Exception) -> ValueError:
        paths = [path for _, _, path in self._all()]
        before = paths[: paths.index(folder)]
        then = f"go on from {before[-1].name}" if before else "begin anew: none is before it"
        return ValueError(f"{error}; delete '{folder}' to {then}")

    def _score(self, folder: Path) -> float | None:
        """A damaged checkpoint has none: it is for `load` to complain, not for a run that saves the next one."""
        try:
            score: float | None = _document(folder / _STATE).get("score")
        except ValueError:
            return None
        return score


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder while the context is open: two runs in one would take away each other's checkpoints.

    The system lets go of it when the process ends, however it ends. Raises `ValueError` where another process has it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"out must be of one run at a time, got '{folder}', in which process {file.read() or 'another'} is "
                "training; wait for it, end it, or give another --out"
            ) from None
        except OSError as error:
            _log.warning("'%s' is not guarded against a second run (%s)", folder, error.strerror)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(file: IO[str]) -> None:
    """Raises `BlockingIOError` where another process has locked it, another `OSError` where it cannot be locked."""
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOTSUP, "no flock on this system") from None
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _DamageError(ValueError):
    """A file is not as it was written."""


def _normal(recipe: Mapping[str, Any]) -> Any:
    """As it looks after a trip through JSON: lists for tuples, names for NaN and infinity."""
    try:
        return json.loads(json.dumps(recipe), parse_constant=str)
    except (TypeError, ValueError) as error:
        raise ValueError(f"fingerprint must be JSON, got: {error}") from None


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, such as `rate (1 there, 2 here)`; keys of objects in objects by dots."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            pair = there.get(key, _MISSING), here.get(key, _MISSING)
            yield from differences(*pair, f"{path}.{key}" if path else key)
    elif there != here:
        before, now = ("nothing" if x is _MISSING else json.dumps(x) for x in (there, here))
        yield f"{path} ({before} there, {now} here)"


def _document(path: Path) -> Fields:
    """Raises `_DamageError`, and `ValueError` for another format."""
    content = _read(path)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _DamageError(
            f"{path}: content must be one complete JSON document, got: {error}"
        ) from None
    fields = Fields(data, str(path))
    if fields.text("format") != FORMAT:
        fields.fail("format", f"be '{FORMAT}'", data["format"])
    if fields.integer("version", 1) != VERSION:
        maker = data.get("rapid3rt")
        raise ValueError(
            f"{path}: version must be {VERSION}, got {data['version']}, written by rapid3rt {maker}"
        )
    rest = {key: value for key, value in data.items() if key != "sha256"}
    if _digest(rest) != data.get("sha256"):
        raise _DamageError(f"{path}: content must be as it was written, got other content")
    return fields


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _DamageError(f"{path}: file must be there, got none") from None


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _whole(path: Path, sha256: str) -> bytes:
    payload = _read(path)
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise _DamageError(
            f"{path}: content must be as it was written, got {len(payload)} bytes of other content"
        )
    return payload


def _warnings(fields: Fields) -> list[str]:
    here = {"torch": torch.__version__, "rapid3rt": package_version()}
    return [
        f"written by {name} {fields.text(name)}, read by {name} {version}: the run may differ in its last bits"
        for name, version in here.items()
        if fields.text(name) != version
    ]


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """A rename or a new file lasts through a power cut once its folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Rename, then delete: a process that is killed meanwhile leaves no half checkpoint."""
    scratch = folder.with_name(f"{_INCOMPLETE}{secrets.token_hex(8)}")
    folder.rename(scratch)
    shutil.rmtree(scratch)

# SPDX-License-Identifier: Apache-2.0
"""Versioned JSON files that say what is wrong with them: the way of every trace and schedule.

Every error is one `ValueError` that begins with the file and, where a field is at fault, names it
(`trace.json: images[2][5].sigma must be a number, got 'x'`). Numbers are written with `repr`, so a
float32 value held as a Python float comes back exactly; NaN and infinity are refused in both
directions.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_MISSING = object()


class Fields:
    """One JSON object that knows where it came from. Accessors check and raise `ValueError`."""

    def __init__(self, data: object, file: str, where: str = "") -> None:
        self.file, self.where = file, where
        if not isinstance(data, dict):
            self.fail("", "be an object", data)
        self.data: Mapping[str, Any] = data

    def fail(self, name: str, requirement: str, got: object) -> NoReturn:
        """Raise the one kind of error this file has."""
        field = ".".join(part for part in (self.where, name) if part) or "content"
        shown = "nothing" if got is _MISSING else repr(got)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        msg = f"{self.file}: {field} must {requirement}, got {shown}"
        raise ValueError(msg)

    def check_names(self, known: Sequence[str]) -> None:
        """An error for a field that nothing reads: a name is mistyped, or the file is of a newer version."""
        for name in self.data:
            if name not in known:
                self.fail(name, f"be one of {', '.join(known)}", self.data[name])

    def get(self, name: str) -> Any:
        """The raw value of a field; an error where it is missing."""
        if name not in self.data:
            self.fail(name, "be present", _MISSING)
        return self.data[name]

    def text(self, name: str, choices: tuple[str, ...] = ()) -> str:
        """A string, one of `choices` where they are given."""
        value = self.get(name)
        if not isinstance(value, str) or (choices and value not in choices):
            self.fail(name, f"be one of {', '.join(choices)}" if choices else "be a string", value)
        return value

    def flag(self, name: str) -> bool:
        """A boolean."""
        value = self.get(name)
        if not isinstance(value, bool):
            self.fail(name, "be true or false", value)
        return value

    def integer(self, name: str, low: int, high: int | None = None) -> int:
        """An integer in a range."""
        value = self.get(name)
        if type(value) is not int or value < low or (high is not None and value > high):
            span = f"in {low}..{high}" if high is not None else f"of at least {low}"
            self.fail(name, f"be an integer {span}", value)
        return int(value)

    def optional_integer(self, name: str, low: int) -> int | None:
        """An integer or null."""
        return None if self.get(name) is None else self.integer(name, low)

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number in a range."""
        return self._number(name, self.get(name), low, high)

    def numbers(
        self,
        name: str,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        length: int | None = None,
    ) -> tuple[float, ...]:
        """A list of finite numbers, of any length or of one."""
        if length is not None and len(self.array(name)) != length:
            self.fail(name, f"be {length} numbers", self.array(name))
        return tuple(
            self._number(f"{name}[{i}]", x, low, high) for i, x in enumerate(self.array(name))
        )

    def pairs(self, name: str) -> tuple[tuple[float, float], ...]:
        """A list of `[x, y]`."""
        return tuple((x, y) for x, y in self.rows(name, 2))

    def rows(self, name: str, width: int) -> tuple[tuple[float, ...], ...]:
        """A list of lists of `width` finite numbers."""
        for i, row in enumerate(self.array(name)):
            if not isinstance(row, list) or len(row) != width:
                what = "a pair of numbers" if width == 2 else f"{width} numbers"
                self.fail(f"{name}[{i}]", f"be {what}", row)
            for j, value in enumerate(row):
                self._number(f"{name}[{i}][{j}]", value, -math.inf, math.inf)
        return tuple(tuple(float(value) for value in row) for row in self.array(name))

    def array(self, name: str) -> list[Any]:
        """A list."""
        value = self.get(name)
        if not isinstance(value, list):
            self.fail(name, "be a list", value)
        return value

    def child(self, name: str) -> Fields:
        """A nested value as `Fields` of its own."""
        return Fields(self.get(name), self.file, ".".join(p for p in (self.where, name) if p))

    def children(self, name: str) -> Iterator[Fields]:
        """A list of objects."""
        for i, item in enumerate(self.array(name)):
            yield Fields(item, self.file, ".".join(p for p in (self.where, f"{name}[{i}]") if p))

    def _number(self, name: str, value: object, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(name, "be a number", value)
        if not low <= value <= high:
            self.fail(name, f"be in {low:g}..{high:g}", value)
        # "1e999" is valid JSON for infinity, and an integer may be too long for a float.
        if abs(value) > sys.float_info.max:
            self.fail(name, "be finite", value)
        return float(value)


def _refuse_constant(text: str) -> NoReturn:
    msg = f"{text} is not a number that can be stored"
    raise ValueError(msg)


def parse_fields(text: str, file: str, *, kind: str, version: int) -> Fields:
    """Parse one versioned document.

    Raises `ValueError` naming `file` if it is corrupt, foreign or of another version.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        msg = f"{file}: content must be one complete JSON document ({kind}), got: {error}"
        raise ValueError(msg) from None
    fields = Fields(data, file)
    if fields.text("format") != kind:
        fields.fail("format", f"be '{kind}'", data["format"])
    if fields.integer("version", 1) != version:
        fields.fail("version", f"be {version}", data["version"])
    return fields


def read_fields(path: str | os.PathLike[str], *, kind: str, version: int) -> Fields:
    """Read one versioned file; see `parse_fields`. A missing file stays a `FileNotFoundError`."""
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        msg = f"{path}: content must be UTF-8 text ({kind}), got bytes that are not"
        raise ValueError(msg) from None
    return parse_fields(text, str(path), kind=kind, version=version)


def check_document(document: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what `write_document` could not write."""
    json.dumps(document, allow_nan=False)


def write_document(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one, even in a crash.

    A link stays and its target is written, a file keeps its mode. A pipe or device is written straight, since nothing
    may take its place. Raises `ValueError` for a folder.
    """
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    there = Path(path).stat() if Path(path).exists() else None
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise ValueError(f"path must be a file, got the folder '{path}'")
    if there is not None and not stat.S_ISREG(there.st_mode):
        Path(path).write_text(text, encoding="utf-8")
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not made of the target's name, which may be as long as a name can be.
    temporary = target.with_name(f".rapid3rt-{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            if there is not None:
                temporary.chmod(stat.S_IMODE(there.st_mode))
            file.write(text)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

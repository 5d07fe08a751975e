# SPDX-License-Identifier: Apache-2.0
"""Names of metrics, and files of one JSON object per line that survive kills and going back.

A metric is `group/name` or `group/name@number`, the number a dial, a sigma or an NFE:

    reward/TERM  rollout/m  cost/E@DIAL  cost/nfe@DIAL  cost/price@DIAL      of the sampled images of this iteration
    rollout/margin   in log error, over the searched schedule at the same cost
    quality/m@DIAL  quality/m_prior@DIAL  quality/E@DIAL  quality/nfe@DIAL   of validation, served as users are
    entropy/HEAD  entropy/HEAD_floor  entropy/HEAD_prior  entropy_coefficient/HEAD
    policy/dead_groups  policy/missing_members  policy/clip_fraction  policy/kl  policy/kl_HEAD
    policy/gradient_norm  policy/epochs  policy/first_ratio_error
    discriminator/accuracy  discriminator/auc@NFE  heads/HEAD_shift@SIGMA  time/PHASE

A name without `@DIAL` is of all dials together, or of heads that have none.
JSON has no NaN and no infinity: both are written as null, and read back as NaN.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

METRICS, DIFFICULTY = "metrics.jsonl", "difficulty.jsonl"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_NAME = re.compile(rf"([\w.-]+)/([\w.-]+)(?:@({_NUMBER}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """The parts of a metric's name. at: the number behind `@`, None without one."""

    group: str
    name: str
    at: float | None

    @classmethod
    def parse(cls, text: str) -> Name:
        """Raises `ValueError` for what is no `group/name` and no `group/name@number`."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise ValueError(f"metric must be named group/name or group/name@number, got {text!r}")
        return cls(group=match[1], name=match[2], at=float(match[3]) if match[3] else None)


def checked(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics as plain floats. Raises `ValueError` for a bad name, or a value that is no number."""
    for name, value in metrics.items():
        Name.parse(name)
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    return {name: float(value) for name, value in metrics.items()}


def finite_or_none(value: float) -> float | None:
    """The rule for JSON: NaN and infinity are null."""
    return value if math.isfinite(value) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a file. A last line that a kill cut off is left out.

    Raises `ValueError` naming the line that is no object with a whole number `iteration`.
    """
    return [_parse(line, path, i) for i, line in enumerate(_whole_lines(path), 1)]


class JsonLines:
    """A file that grows by whole lines, each with an `iteration`. last: the highest, None where there is no line.

    Opening it cuts off a last line that a kill left unfinished. Raises `ValueError` for a file of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: int | None = None
        self.rewind(None)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows and hand them to the system, so that a kill of this process loses none."""
        rows = list(rows)
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.last = max([row["iteration"] for row in rows], default=self.last)

    def rewind(self, iteration: int | None) -> None:
        """Drop the lines of later iterations, none for None. Atomic: a reader sees the old lines or the new."""
        if not self.path.exists():
            return
        lines = _whole_lines(self.path)
        numbers = [_parse(line, self.path, i)["iteration"] for i, line in enumerate(lines, 1)]
        kept = [i for i, n in enumerate(numbers) if iteration is None or n <= iteration]
        content = b"".join(lines[i] + b"\n" for i in kept)
        self.last = max((numbers[i] for i in kept), default=None)
        if content != self.path.read_bytes():
            _replace(self.path, content)


def _whole_lines(path: Path) -> list[bytes]:
    """An object ends with its brace: a last line without a line end is whole only if it is JSON."""
    *lines, tail = path.read_bytes().split(b"\n")
    try:
        json.loads(tail)
    except ValueError:
        return lines
    return [*lines, tail]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{path}: line {number} must be JSON, got: {error}; delete the line"
        ) from None
    if not isinstance(row, dict) or type(row.get("iteration")) is not int:
        shown = line[:40].decode(errors="replace")
        raise ValueError(
            f"{path}: line {number} must be an object with a whole number 'iteration', got {shown}; delete the line"
        )
    return row


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise

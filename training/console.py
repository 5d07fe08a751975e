# SPDX-License-Identifier: Apache-2.0
"""One screen about one iteration: rich draws it on a terminal, plain text says the same elsewhere.

Numbers at dials stand in columns under each other, floors behind what they hold up, `!` marks what is below its floor
or no number.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from training.metrics import Name

ORDER = ("reward", "cost", "quality", "entropy", "policy", "discriminator", "time")
"""Groups in their order; others follow as they come."""
_COLUMN = 8
_FLOOR = "_floor"


def screen(
    title: str, metrics: Mapping[str, float], *, width: int = 100, colour: bool = False
) -> str:
    """About twenty lines of text for a full row of metrics. colour: for a terminal, where rich is."""
    lines = list(_lines(metrics))
    if colour and find_spec("rich"):
        return _rich(title, lines, width)
    return _plain(title, lines, width)


def _lines(metrics: Mapping[str, float]) -> Iterator[tuple[str, list[str]]]:
    """Heading and cells of every line: one line for a group, one more for each of its metrics at dials."""
    names = {text: name for text in metrics if not _is_hidden(name := Name.parse(text))}
    groups = [*ORDER, *(name.group for name in names.values())]
    for group in dict.fromkeys(groups):
        inside = {text: name for text, name in names.items() if name.group == group}
        alone = [
            _cell(text, name, metrics)
            for text, name in inside.items()
            if _is_alone(text, name, metrics)
        ]
        if alone:
            yield group, alone
        for label in dict.fromkeys(name.name for name in inside.values() if name.at is not None):
            at = [
                (n.at, metrics[text])
                for text, n in inside.items()
                if n.name == label and n.at is not None
            ]
            yield f"{group} {label}", [f"@{x:<4g}{_number(value):>8}" for x, value in sorted(at)]


def _is_hidden(name: Name) -> bool:
    """Where heads act over sigma is for pictures: it would fill the screen."""
    return name.group == "heads" and name.at is not None


def _is_alone(text: str, name: Name, metrics: Mapping[str, float]) -> bool:
    return name.at is None and not (text.endswith(_FLOOR) and text.removesuffix(_FLOOR) in metrics)


def _cell(text: str, name: Name, metrics: Mapping[str, float]) -> str:
    value, floor = metrics[text], metrics.get(f"{text}{_FLOOR}")
    cell = f"{name.name} {_number(value)}"
    if floor is None:
        return cell
    return f"{cell} (floor {_number(floor)}){' !' if value < floor else ''}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return f"{value} !"
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def _packed(cells: list[str], width: int) -> list[str]:
    """Whole cells side by side, on as many lines as they need."""
    lines = [""]
    for cell in cells:
        if lines[-1] and len(lines[-1]) + len(cell) > width:
            lines.append("")
        # Cells fill whole columns, so that those of one width stand under each other.
        lines[-1] += cell.ljust(-(-(len(cell) + 2) // _COLUMN) * _COLUMN)
    return [line.rstrip() for line in lines]


def _plain(title: str, lines: list[tuple[str, list[str]]], width: int) -> str:
    margin = max((len(heading) for heading, _ in lines), default=0) + 2
    text = [title]
    for heading, cells in lines:
        for i, line in enumerate(_packed(cells, width - margin)):
            text.append((heading if i == 0 else "").ljust(margin) + line)
    return "\n".join(text)


def _rich(title: str, lines: list[tuple[str, list[str]]], width: int) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    margin = max((len(heading) for heading, _ in lines), default=0) + 2
    for heading, cells in lines:
        text = Text("\n".join(_packed(cells, width - margin)), no_wrap=True)
        text.highlight_regex(r"\S+( \(floor \S+\))? !", "bold red")
        table.add_row(Text(heading, style="cyan", no_wrap=True), text)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, highlight=False)
    console.print(Text(title, style="bold"))
    console.print(table)
    return out.getvalue().rstrip("\n")

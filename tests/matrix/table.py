# SPDX-License-Identifier: Apache-2.0
"""Write `docs/matrix.md` and the support table of the README from a real run of every cell: `make matrix`.

Nothing is written unless every cell came out as its row says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import diffusers
import torch
from cases import COLUMNS, ROWS, Row
from check import dense_is_plain, is_refused, unlike_images_do_not_meet
from probes import PROBES, Probe

ROOT = Path(__file__).parents[2]
DOCUMENT, README = ROOT / "docs" / "matrix.md", ROOT / "README.md"
BEGIN, END = "<!-- support: made by `make matrix` -->", "<!-- end of support -->"

EXACT, ON_GRID, HOLDS, REFUSED, NOWHERE = "exact", "exact*", "holds", "refused", "-"
INTRODUCTION = """\
# What works, bit for bit

Made by `make matrix` from `tests/matrix/cases.py` and a run of every cell on tiny pipelines with random weights
(diffusers {diffusers}, CPU); do not edit it. The same cells are tests, so a cell that is not so fails.

- **exact**: told to compute everything (`dense`), the accelerated pipeline gives the bits of the plain one, and so it
  does after `restore`. The feature of the row changes the result, or (offloading, compilation) is seen at work. And
  where one image of a batch computes while the other reuses, each on noise levels of its own, and one ends early, both
  end at noise level 0 and equal themselves alone to rounding.
- **exact\\***: the same, but the call counts something in steps, or the scheduler steps all images alike, so a policy
  that leaves the pipeline's own grid (`steps`, `controller`, a schedule) is refused in one line; `dense` and
  `threshold` work.
- **-**: diffusers has no such pipeline, argument or callback.

The FLUX.1 and FLUX.2 dev columns have the guidance embedding, FLUX.2 Klein and SD3 classifier-free guidance, Qwen-Image
true CFG, in every row that does not say otherwise. Prompts are strings in the rows that say so, else embeddings.
"""
REFUSALS = """\
One line that says what to do, before anything is computed or changed; the pipeline works on as before.
"""
PROBED = """\
Found with diffusers 0.42.1 and cache-dit 1.5.3 on tiny pipelines like these; here under policies that reuse.
"""


def declared(row: Row | Probe, kind: str) -> str:
    """What a cell should be."""
    if kind not in row.kinds:
        return NOWHERE
    if isinstance(row, Probe):
        return HOLDS
    if row.refused:
        return REFUSED
    return ON_GRID if row.refuses_steps else EXACT


def measured(row: Row | Probe, kind: str) -> str:
    """What a cell is. Raises AssertionError where it is not what its row says."""
    if kind not in row.kinds:
        return NOWHERE
    if isinstance(row, Probe):
        row.ask(kind)
    elif row.refused:
        is_refused(row, kind)
    else:
        dense_is_plain(row, kind)
        unlike_images_do_not_meet(row, kind)
    return declared(row, kind)


Cell = Callable[[Row | Probe, str], str]
Cells = dict[str, list[str]]  # by row or probe
ROW_OF = {row.key: row for row in ROWS}
PROBE_OF = {probe.name: probe for probe in PROBES}
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS if not row.refused))


def run(cell: Cell) -> Cells:
    """All cells of all rows; the columns are those of `COLUMNS`."""
    return {
        name: [cell(row, kind) for kind in COLUMNS] for name, row in {**ROW_OF, **PROBE_OF}.items()
    }


def _table(head: list[str], lines: Iterable[list[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(row).replace("exact*", "exact\\*") + " |" for row in rows]


def _rows_of(group: str) -> list[Row]:
    return [row for row in ROWS if row.group == group and not row.refused]


def document(cells: Cells) -> str:
    """The text of `docs/matrix.md`."""
    names = list(COLUMNS.values())
    out = [INTRODUCTION.format(diffusers=diffusers.__version__)]
    for group in GROUPS:
        lines = [[row.name, *cells[row.key]] for row in _rows_of(group)]
        out += [f"## {group[0].upper()}{group[1:]}", "", *_table(["", *names], lines), ""]
    lines = [[name, probe.failed or NOWHERE, *cells[name]] for name, probe in PROBE_OF.items()]
    out += ["## What caches get wrong", "", PROBED]
    out += [*_table(["", "got wrong by", *names], lines), ""]
    lines = [[row.name, _where(cells[row.key]), row.refused] for row in ROWS if row.refused]
    out += ["## Refused", "", REFUSALS, *_table(["", "where", "the line begins"], lines), ""]
    return "\n".join(out)


def _where(cells: list[str]) -> str:
    """Columns in which something is not absent."""
    there = [name for name, cell in zip(COLUMNS.values(), cells, strict=True) if cell != NOWHERE]
    return "everywhere" if len(there) == len(COLUMNS) else ", ".join(there)


def _summary(cells: list[str]) -> str:
    """One column of a group in a word."""
    there = {cell for cell in cells if cell != NOWHERE}
    if not there:
        return NOWHERE
    return "exact*" if ON_GRID in there else "exact"


def support(cells: Cells) -> str:
    """The table of the README: one line per group."""
    lines = []
    for group in GROUPS:
        rows = _rows_of(group)
        columns = zip(*(cells[row.key] for row in rows), strict=True)
        lines.append([group, str(len(rows)), *(_summary(list(column)) for column in columns)])
    total = sum(cell != NOWHERE for row in ROWS for cell in cells[row.key])
    refused = dict.fromkeys(row.name.split(",")[0] for row in ROWS if row.refused)
    return "\n".join(
        [
            BEGIN,
            "",
            *_table(["", "cases", *COLUMNS.values()], lines),
            "",
            fill(
                f"{total} cells in all. Refused in one line that says what to do: {', '.join(refused)}.",
                120,
            ),
            "",
            END,
        ]
    )


def with_support(readme: str, cells: Cells) -> str:
    """The README with its table made anew."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return head + support(cells) + tail


def main() -> int:
    """Run every cell; write the documents if all came out as they should."""
    torch.set_num_threads(1)
    wrong = []

    def cell(row: Row | Probe, kind: str) -> str:
        try:
            return measured(row, kind)
        except Exception as error:
            wrong.append(f"{row.name} [{kind}]: {type(error).__name__} {str(error)[:200]}")
            return "failed"

    found = run(cell)
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(found))
    README.write_text(with_support(README.read_text(), found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

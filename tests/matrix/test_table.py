# SPDX-License-Identifier: Apache-2.0
"""The printed matrix is that of the cases; whether a cell is what it says is for the other tests here."""

from __future__ import annotations

from cases import COLUMNS, ROWS
from makers import ALL
from table import BEGIN, DOCUMENT, END, README, declared, document, run, support, with_support


def test_the_document_is_what_the_cases_say() -> None:
    written = DOCUMENT.read_text()
    assert written == document(run(declared)), "docs/matrix.md is stale: make matrix"


def test_the_support_table_of_the_readme_is_cut_from_it() -> None:
    readme = README.read_text()
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert readme == with_support(readme, run(declared)), "README.md is stale: make matrix"
    assert support(run(declared)) in readme


def test_every_row_has_a_name_of_its_own_and_a_cell_in_every_column() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert tuple(COLUMNS) == ALL
    for name, cells in run(declared).items():
        assert len(cells) == len(COLUMNS)
        assert set(cells) != {"-"}, name

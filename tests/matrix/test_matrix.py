# SPDX-License-Identifier: Apache-2.0
"""Every row of `cases.py` on every layout: dense equals plain, unlike images of a batch do not meet, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
from cases import ROWS, Row
from check import dense_is_plain, is_refused, unlike_images_do_not_meet


def cells(refused: bool) -> list[Any]:
    """All rows on all layouts that diffusers has them for; in the quick loop each row on one, by turns.

    Compiling takes seconds: never in the quick loop.
    """
    return [
        pytest.param(
            row,
            kind,
            id=f"{row.key} [{kind}]".replace(" ", "_"),
            marks=[] if quick == kind and "compiled" not in row.key else [pytest.mark.slow],
        )
        for i, row in enumerate(ROWS)
        for quick in [row.kinds[i % len(row.kinds)]]
        for kind in row.kinds
        if bool(row.refused) == refused
    ]


@pytest.mark.parametrize(("row", "kind"), cells(refused=False))
def test_dense_is_plain(row: Row, kind: str) -> None:
    dense_is_plain(row, kind)


@pytest.mark.parametrize(("row", "kind"), cells(refused=False))
def test_unlike_images_end_as_they_do_alone(row: Row, kind: str) -> None:
    unlike_images_do_not_meet(row, kind)


@pytest.mark.parametrize(("row", "kind"), cells(refused=True))
def test_what_cannot_be_served_is_refused_in_one_line(row: Row, kind: str) -> None:
    is_refused(row, kind)

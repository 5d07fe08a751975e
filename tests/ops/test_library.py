# SPDX-License-Identifier: Apache-2.0
"""Registration: opcheck over the cases, and one graph without a break for every op and backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rapid3rt import ops
from rapid3rt.ops import library
from rapid3rt.testing.cases import CASES, Case, cases_of, clone_arguments, result_tensors
from rapid3rt.testing.numerics import assert_same_bits

SMALL = [case for case in CASES if not case.bench]
# One per op, neither the first (a bench) nor an empty one.
FIRST = [
    next(c for c in cases_of(op) if not c.bench and c.flops + c.values) for op in library.SCHEMAS
]


@pytest.fixture(autouse=True)
def _no_gradient_and_fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield


def test_every_schema_has_small_cases() -> None:
    assert {case.op for case in FIRST} == set(library.SCHEMAS)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fakes_and_schemas_tell_the_truth(case: Case) -> None:
    op = getattr(library, case.op)
    torch.library.opcheck(
        op, case.arguments(torch.float32), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_opcheck_passes_in_full(case: Case) -> None:
    torch.library.opcheck(getattr(library, case.op), case.arguments(torch.float32))


def run(case: Case, arguments: tuple[Any, ...], backend: str) -> tuple[torch.Tensor, ...]:
    result = getattr(ops, case.op)(*arguments, backend=backend)
    return (*result_tensors(result), *(arguments[i] for i in case.writes))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_op_compiles_into_one_graph(case: Case, backend: str, dynamic: bool | None) -> None:
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    got = compiled(case, clone_arguments(case.arguments(torch.float32)), backend)
    want = run(case, clone_arguments(case.arguments(torch.float32)), backend)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(str(case), a, b)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_default_device_does_not_matter(case: Case, backend: str) -> None:
    want = run(case, case.arguments(torch.float32), backend)
    arguments = case.arguments(torch.float32)
    with torch.device("meta"):
        got = run(case, arguments, backend)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(str(case), a, b)


@pytest.mark.slow
def test_the_reuse_path_compiles_with_inductor() -> None:
    def path(x: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        gathered = ops.gather_rows(x, rows)
        coef = torch.ones(len(rows), 1)
        looked_up = ops.cache_lookup(gathered, slots, rows, coef)
        out = torch.zeros_like(x)
        ops.scatter_rows(out, looked_up * 2, rows)
        return out

    x, slots = torch.randn(5, 7, 16), torch.randn(5, 1, 7, 16)
    rows = torch.tensor([4, 1], dtype=torch.int32)
    got = torch.compile(path, fullgraph=True)(x, slots, rows)
    torch.testing.assert_close(got, path(x, slots, rows))

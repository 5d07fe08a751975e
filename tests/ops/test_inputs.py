# SPDX-License-Identifier: Apache-2.0
"""Wrong inputs: one clear ValueError that names the argument, the requirement and the value, from both backends."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from rapid3rt import ops
from rapid3rt.errors import UnsupportedError

BACKENDS = ["native", "reference"]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cache(**changed: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "embedded": torch.zeros(2, 4, 8),
        "slots": torch.zeros(3, 1, 4, 8),
        "slot": ints(0, 2),
        "coef": torch.ones(2, 1),
    }
    return arguments | changed


def store(**changed: Any) -> dict[str, Any]:
    arguments = cache(out=torch.zeros(2, 4, 8), gap=torch.zeros(2))
    del arguments["coef"]
    return arguments | changed


def attention(**changed: Any) -> dict[str, Any]:
    q = torch.zeros(1, 2, 64, 16)
    arguments: dict[str, Any] = {
        "q": q,
        "k": q,
        "v": q,
        "mode": torch.ones(1, 2, dtype=torch.uint8),
    }
    arguments |= {"count": torch.ones(1, 2, 2, dtype=torch.int32)}
    arguments |= {
        "index": torch.zeros(1, 2, 2, 2, dtype=torch.int32),
        "order": None,
        "kv_len": None,
    }
    return arguments | {"block_q": 32, "block_kv": 32, "scale": 1.0} | changed


def lists(**changed: Any) -> dict[str, Any]:
    q = torch.zeros(1, 2, 64, 16)
    arguments: dict[str, Any] = {"q": q, "k": q, "keep": ints(1), "text_start": 32, "text_len": 32}
    return arguments | {"block_q": 32, "block_kv": 32, "scale": 1.0} | changed


def unaligned(*shape: int) -> torch.Tensor:
    return torch.zeros(torch.Size(shape).numel() + 1)[1:].view(shape)


WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (
        ops.gather_rows,
        {"x": torch.zeros(3, 2), "rows": ints(0, 3)},
        r"rows must be in \[0, 3\), got 3",
    ),
    (
        ops.gather_rows,
        {"x": torch.zeros(3, 2), "rows": ints(-1)},
        r"rows must be in \[0, 3\), got -1",
    ),
    (
        ops.gather_rows,
        {"x": torch.zeros(3, 2), "rows": torch.tensor([0])},
        "rows must be torch.int32",
    ),
    (
        ops.gather_rows,
        {"x": torch.zeros(3, 2), "rows": ints(0)[None]},
        "rows must have 1 dimension",
    ),
    (ops.gather_rows, {"x": torch.zeros(()), "rows": ints(0)}, "x must have at least 1 dimension"),
    (
        ops.scatter_rows,
        {"out": torch.zeros(3, 2), "x": torch.zeros(2, 2), "rows": ints(1, 1)},
        "rows must be unique, got 1 twice",
    ),
    (
        ops.scatter_rows,
        {"out": torch.zeros(3, 2), "x": torch.zeros(1, 3), "rows": ints(1)},
        r"x must have shape \(1, 2\), got \(1, 3\)",
    ),
    (
        ops.scatter_rows,
        {"out": torch.zeros(2, 3).T, "x": torch.zeros(1, 2), "rows": ints(1)},
        r"out must be contiguous, got strides \(1, 3\)",
    ),
    (ops.cache_lookup, cache(slot=ints(0, 3)), r"slot must be in \[0, 3\), got 3"),
    (
        ops.cache_lookup,
        cache(coef=torch.ones(2, 2)),
        r"coef must have shape \(2, 1\), got \(2, 2\)",
    ),
    (ops.cache_lookup, cache(coef=torch.ones(2, 1).half()), "coef must be torch.float32"),
    (ops.cache_lookup, cache(slots=torch.zeros(3, 1, 4, 8).half()), "slots must be torch.float32"),
    (ops.cache_lookup, cache(slots=torch.zeros(3, 4, 8)), "slots must have 4 dimensions"),
    (ops.cache_lookup, cache(slots=torch.zeros(3, 0, 4, 8)), "slots must hold at least one order"),
    (
        ops.cache_lookup,
        cache(embedded=torch.zeros(2, 4, 8).double()),
        "embedded must be float32, bf",
    ),
    (
        ops.cache_lookup_norm,
        cache(scale=torch.zeros(2, 7), shift=torch.zeros(2, 8), eps=1e-6),
        r"scale must have shape \(2, 8\), got \(2, 7\)",
    ),
    (
        ops.gather_rows,
        {"x": torch.zeros(3, 0), "rows": ints(0, 9)},
        r"rows must be in \[0, 3\), got 9",
    ),
    (
        ops.scatter_rows,
        {"out": torch.zeros(3, 0), "x": torch.zeros(2, 0), "rows": ints(4, 1)},
        r"rows must be in \[0, 3\), got 4",
    ),
    (
        ops.cache_lookup,
        cache(embedded=torch.zeros(2, 0, 8), slots=torch.zeros(3, 1, 0, 8), slot=ints(0, 5)),
        r"slot must be in \[0, 3\), got 5",
    ),
    (
        ops.cache_store,
        store(
            embedded=torch.zeros(2, 4, 0),
            out=torch.zeros(2, 4, 0),
            slots=torch.zeros(3, 1, 4, 0),
            slot=ints(2, 2),
        ),
        "slot must be unique, got 2 twice",
    ),
    (
        ops.block_sparse_attention,
        attention(q=torch.zeros(1, 2, 0, 16), mode=ints(0, 3)[None].byte(), count=None, index=None),
        "mode must be 0, 1 or 2, got 3",
    ),
    (ops.cache_store, store(slot=ints(1, 1)), "slot must be unique, got 1 twice"),
    (ops.cache_store, store(gap=torch.zeros(3)), r"gap must have shape \(2,\), got \(3,\)"),
    (ops.cache_store, store(slots=torch.zeros(3, 1, 8, 4).mT), "slots must be contiguous"),
    (
        ops.gate_residual,
        {"residual": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 3), "y": torch.zeros(2, 3, 4)},
        r"gate must have shape \(2, 4\), got \(2, 3\)",
    ),
    (
        ops.build_block_lists,
        lists(block_q=48),
        "block_q and block_kv must both be 32, 64 or 128, got 48",
    ),
    (
        ops.build_block_lists,
        lists(text_len=33),
        "text_start and text_len must lie within 64 tokens",
    ),
    (ops.build_block_lists, lists(keep=ints(1, 2)), r"keep must have shape \(1,\), got \(2,\)"),
    (ops.block_sparse_attention, attention(block_kv=64), "block_q and block_kv must both be"),
    (ops.block_sparse_attention, attention(v=torch.zeros(1, 2, 64, 8)), r"v must have shape"),
    (ops.block_sparse_attention, attention(k=torch.zeros(2, 64, 16)), "k must have 4 dimensions"),
    (
        ops.block_sparse_attention,
        attention(q=torch.zeros(1, 2, 16, 64).mT),
        "q must have last stride 1, got strides",
    ),
    (
        ops.block_sparse_attention,
        attention(q=torch.zeros(1, 2, 64, 17)[..., :16]),
        "q must have strides that are multiples of 16 bytes",
    ),
    (
        ops.block_sparse_attention,
        attention(index=None),
        "count and index must be given together, got count",
    ),
    (
        ops.block_sparse_attention,
        attention(count=None, index=None),
        "count and index must be given where",
    ),
    (
        ops.block_sparse_attention,
        attention(mode=ints(1, 2)[None].byte()),
        "mode must be 0 or 1 in the",
    ),
    (
        ops.block_sparse_attention,
        attention(mode=ints(1, 3)[None].byte()),
        "mode must be 0, 1 or 2, got 3",
    ),
    (ops.block_sparse_attention, attention(kv_len=ints(65)), r"kv_len must be in \[0, 64\], got"),
    (
        ops.block_sparse_attention,
        attention(count=torch.full((1, 2, 2), 3, dtype=torch.int32)),
        r"count must be in \[0, 2\], got 3",
    ),
    (
        ops.block_sparse_attention,
        attention(index=torch.full((1, 2, 2, 2), 2, dtype=torch.int32)),
        r"index must be ascending in \[0, 2\), got 2",
    ),
    (
        ops.block_sparse_attention,
        attention(count=torch.full((1, 2, 2), 2, dtype=torch.int32)),
        r"index must be ascending in \[0, 2\), got 0",
    ),
    (
        ops.block_sparse_attention,
        attention(index=torch.zeros(1, 2, 2, 3, dtype=torch.int32)),
        "index must list at most 2 key blocks, got 3",
    ),
    (ops.block_sparse_attention, attention(order=ints(0, 1)), r"order must have shape \(4,\)"),
    (
        ops.block_sparse_attention,
        attention(order=ints(0, 1, 2, 2)),
        "order must be unique, got 2 twice",
    ),
    (
        ops.block_sparse_attention_,
        attention(out=torch.zeros(1, 2, 64, 16), lse=torch.zeros(1, 2, 64).double()),
        "lse must be torch.float32",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "arguments", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_wrong_input_is_named(
    op: Callable[..., Any], arguments: dict[str, Any], message: str, backend: str
) -> None:
    with pytest.raises(ValueError, match=message):
        op(**arguments, backend=backend)


def test_misaligned_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="k must start at a multiple of 16 bytes"):
        ops.block_sparse_attention(**attention(k=unaligned(1, 2, 64, 16)), backend="native")


def overlapping() -> list[tuple[Callable[..., Any], dict[str, Any], str]]:
    """Calls whose written tensor shares memory, and which names the message holds."""
    rows, ids, slots = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(3, 2, 4, 8)
    packed = torch.zeros(1, 64, 4, 2, 16)
    q, k, v, out = (t.transpose(1, 2) for t in packed.unbind(2))
    heads = {"q": q, "k": k, "v": v}
    lse = torch.zeros(1, 2, 64)
    keys = lse.view(-1)[:16].expand(1, 2, 64, 16)
    free = torch.zeros(1, 2, 64, 16)
    within = free.view(-1)[:128].view(1, 2, 64)
    twice = torch.zeros(1, 1, 64, 16).expand(1, 2, 64, 16)
    shifted = torch.zeros(2048).as_strided((1, 2, 64, 16), (2048, 16, 16, 1))
    return [
        (ops.scatter_rows, {"out": rows, "x": rows[:2], "rows": ints(1, 2)}, "out .* x"),
        (
            ops.scatter_rows,
            {"out": rows, "x": rows.view(2, 4)[:, 1:3], "rows": ints(1, 2)},
            "out .* x",
        ),
        (ops.scatter_rows, {"out": ids, "x": ints(1, 2), "rows": ids[:2]}, "out .* rows"),
        (ops.cache_store, store(slots=slots, out=slots[:2, 0]), "slots .* out"),
        (ops.cache_store, store(slots=slots, embedded=slots[1:, 1]), "slots .* embedded"),
        (ops.cache_store, store(slots=slots, gap=slots[0, 0, 0, :2]), "slots .* gap"),
        (ops.block_sparse_attention_, attention(out=q, lse=None, q=q), "out .* q"),
        (ops.block_sparse_attention_, attention(out=free, lse=None, v=free), "out .* v"),
        (ops.block_sparse_attention_, attention(out=out, lse=None, **heads), "out .* q"),
        (ops.block_sparse_attention_, attention(out=free, lse=within), "out .* lse"),
        (ops.block_sparse_attention_, attention(out=free, lse=lse, k=keys), "lse .* k"),
        (
            ops.block_sparse_attention_,
            attention(out=twice, lse=None),
            "out must not overlap itself",
        ),
        (
            ops.block_sparse_attention_,
            attention(out=shifted, lse=None),
            "out must not overlap itself",
        ),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(len(overlapping())))
def test_what_is_written_shares_no_memory(number: int, backend: str) -> None:
    op, arguments, message = overlapping()[number]
    with pytest.raises(ValueError, match=message):
        op(**arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_parts_of_one_storage_may_be_written(backend: str) -> None:
    rows = torch.arange(10.0).view(5, 2)
    ops.scatter_rows(rows[:3], rows[3:], ints(2, 0), backend=backend)
    assert rows[:3].tolist() == [[8, 9], [2, 3], [6, 7]]
    heads = torch.randn(4, 1, 64, 2, 16, generator=torch.Generator().manual_seed(0))
    q, k, v, out = heads.transpose(2, 3)
    call = attention(q=q, k=k, v=v)
    ops.block_sparse_attention_(out, None, **call, backend=backend)
    assert torch.equal(out, ops.block_sparse_attention(**call, backend=backend)[0])


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_overlap_is_found_in_compiled_graphs(compiler: str) -> None:
    def shift(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ops.scatter_rows(x, x[:2], rows, backend="native")
        return x + 0

    torch.compiler.reset()
    compiled = torch.compile(shift, backend=compiler, fullgraph=True)
    with torch.no_grad(), pytest.raises(ValueError, match="out must share no memory with x"):
        compiled(torch.zeros(3, 2), ints(1, 2))


def test_a_wrong_call_writes_nothing() -> None:
    out = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=re.escape("rows must be in [0, 3), got 7")):
        ops.scatter_rows(out, torch.ones(2, 2), ints(0, 7), backend="native")
    assert not out.any()


def test_gradients_are_refused_but_not_under_no_grad() -> None:
    x = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(UnsupportedError, match="gather_rows has no gradient"):
        ops.gather_rows(x, ints(0))
    with torch.no_grad():
        assert ops.gather_rows(x, ints(0)).shape == (1, 2)
    assert ops.gather_rows(x.detach(), ints(2)).shape == (1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_are_refused_also_under_no_grad(backend: str) -> None:
    x = torch.ones(3, 2)

    def gather(x: torch.Tensor) -> torch.Tensor:
        return ops.gather_rows(x, ints(0), backend=backend)

    with pytest.raises(UnsupportedError, match="gather_rows has no forward-mode gradient"):
        torch.func.jvp(gather, (x,), (x,))
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(UnsupportedError, match="gather_rows has no forward-mode gradient"):
            gather(dual)
        with pytest.raises(UnsupportedError, match="gather_rows has no forward-mode gradient"):
            torch.compile(gather, backend="eager")(dual)
        assert gather(forward_ad.unpack_dual(dual).primal).shape == (1, 2)
    assert gather(x).shape == (1, 2)

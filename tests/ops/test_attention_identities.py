# SPDX-License-Identifier: Apache-2.0
"""What attention must keep bit for bit on every instruction set, and numbers at the edge of their range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_calls import ISAS, check_attention, forced, widen

from rapid3rt import ops
from rapid3rt.ops import reference
from rapid3rt.testing.attention import Heads, packed_heads, random_lists
from rapid3rt.testing.cases import DTYPES
from rapid3rt.testing.numerics import assert_same_bits, poison_

Results = tuple[torch.Tensor, torch.Tensor]

# head dim, block
SHAPES = [(64, 32), (64, 64), (128, 128), (40, 64)]

pytestmark = [
    pytest.mark.parametrize("isa", ISAS),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
]


@pytest.fixture(autouse=True)
def _forced(isa: str) -> Any:
    with forced(isa):
        yield


def geometry_of(head_dim: int, block: int) -> Heads:
    return Heads(rows=4, heads=2, image=260, text=41, head_dim=head_dim, block=block)


def make_heads(geometry: Heads, dtype: torch.dtype) -> list[torch.Tensor]:
    return list(packed_heads(torch.Generator().manual_seed(1), dtype, geometry))


def attend(heads: Any, mode: torch.Tensor, lists: Any, block: int, kv_len: Any = None) -> Results:
    scale = heads[0].shape[-1] ** -0.5
    arguments = (*heads, mode, *lists, kv_len, block, block, scale, True)
    return ops.block_sparse_attention(*arguments, backend="native")


def assert_same(what: str, got: Results, want: Results) -> None:
    for a, b in zip(got, want, strict=True):
        assert_same_bits(what, a, b)


@pytest.mark.parametrize(("head_dim", "block"), SHAPES)
def test_a_full_list_is_dense_attention(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    blocks = -(-geometry.tokens // block)
    shape = (geometry.rows, geometry.heads, blocks)
    index = torch.arange(blocks, dtype=torch.int32).expand(*shape, blocks)
    count = torch.full(shape, blocks, dtype=torch.int32)
    kv_len = torch.tensor([301, 300, 65, 0], dtype=torch.int32)
    mode = torch.zeros(shape[:2], dtype=torch.uint8)
    for lengths in (None, kv_len):
        dense = attend(heads, mode, (None, None, None), block, lengths)
        assert_same("list", attend(heads, mode + 1, (count, index, None), block, lengths), dense)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "block"), SHAPES)
def test_a_row_depends_on_itself_alone(head_dim: int, block: int, dtype: torch.dtype) -> None:
    """Neither its neighbours nor their modes, lists and lengths, nor the order of work, nor the threads."""
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    g = torch.Generator().manual_seed(2)
    count, index, order = random_lists(g, geometry, 0.5)
    mode = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1]], dtype=torch.uint8)
    kv_len = torch.tensor([301, 130, 301, 77], dtype=torch.int32)
    want = attend(heads, mode, (count, index, None), block, kv_len)
    assert_same("order", attend(heads, mode, (count, index, order), block, kv_len), want)
    torch.set_num_threads(1)
    assert_same("one thread", attend(heads, mode, (count, index, order), block, kv_len), want)
    torch.set_num_threads(3)  # eight heads do not divide: tiles are shared
    assert_same("three", attend(heads, mode, (count, index, order), block, kv_len), want)
    torch.set_num_threads(2)
    for row in range(geometry.rows):
        part = slice(row, row + 1)
        lists = (count[part], index[part], None)
        alone = attend([t[part] for t in heads], mode[part], lists, block, kv_len[part])
        assert_same(f"row {row} alone", alone, (want[0][part], want[1][part]))
    other = mode.clone()
    other[1:] = 1 - other[1:]
    for t in heads:
        poison_(t[1:])
    changed = attend(heads, other, (count, index, None), block, kv_len)
    assert_same("neighbours", (changed[0][:1], changed[1][:1]), (want[0][:1], want[1][:1]))


@pytest.mark.parametrize(("head_dim", "block"), SHAPES)
def test_a_query_depends_on_itself_alone(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    q, k, v = make_heads(geometry, dtype)
    mode = torch.zeros(geometry.rows, geometry.heads, dtype=torch.uint8)
    want = attend((q, k, v), mode, (None, None, None), block)
    q = q.clone()
    poison_(q[:, :, 1::2])
    got = attend((q, k, v), mode, (None, None, None), block)
    assert_same(
        "query", (got[0][:, :, ::2], got[1][:, :, ::2]), (want[0][:, :, ::2], want[1][:, :, ::2])
    )
    # Fewer queries fill other groups of vectors.
    for num_q in (1, 33, 100):
        part = attend((q[:, :, :num_q], k, v), mode, (None, None, None), block)
        assert_same("fewer", (part[0][:, :, ::2], part[1][:, :, ::2]),
                    (want[0][:, :, :num_q:2], want[1][:, :, :num_q:2]))  # fmt: skip


@pytest.mark.parametrize(("head_dim", "block"), SHAPES)
def test_unread_memory_may_hold_anything(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    shape = (geometry.rows, geometry.tokens, 3, geometry.heads, head_dim + 16)
    packed = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    clean = [t[..., :head_dim].permute(0, 2, 1, 3) for t in packed.unbind(2)]
    kv_len = torch.tensor([130, 301, 64, 1], dtype=torch.int32)
    blocks = -(-geometry.tokens // block)
    index = 2 * torch.arange(blocks, dtype=torch.int32).repeat(
        geometry.rows, geometry.heads, blocks, 1
    )
    count = torch.full(index.shape[:3], (blocks + 1) // 2, dtype=torch.int32)
    poison_(index[..., (blocks + 1) // 2 :])
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8)
    want = attend([t.clone() for t in clean], mode, (count, index, None), block, kv_len)
    poisoned = packed.clone()
    poisoned[..., head_dim:] = torch.nan  # padding between heads
    for block_id in range(1, blocks, 2):
        poisoned[:, block_id * block : (block_id + 1) * block, 1:] = torch.nan
    for row, limit in enumerate(kv_len.tolist()):
        poisoned[row, limit:, 1:] = torch.nan
    heads = [t[..., :head_dim].permute(0, 2, 1, 3) for t in poisoned.unbind(2)]
    out = poison_(torch.empty_like(packed))
    lse = poison_(torch.empty(geometry.rows, geometry.heads, geometry.tokens))
    view = out.unbind(2)[0][..., :head_dim].permute(0, 2, 1, 3)
    arguments = (mode, count, index, None, kv_len, block, block, head_dim**-0.5)
    ops.block_sparse_attention_(view, lse, *heads, *arguments, backend="native")
    assert_same("poison", (view, lse), want)
    assert out[..., head_dim:].isnan().all()  # nothing beside the output is written
    assert out[:, :, 1:].isnan().all()


@pytest.mark.parametrize(("head_dim", "block"), SHAPES)
def test_skipped_heads_keep_their_bytes(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    lists = random_lists(torch.Generator().manual_seed(4), geometry, 0.5)
    mode = torch.tensor([[2, 0], [1, 2], [2, 2], [0, 1]], dtype=torch.uint8)
    skipped = mode == 2
    out = torch.randn(heads[0].shape).to(dtype)
    lse = torch.randn(heads[0].shape[:3])
    out_before, lse_before = out.clone(), lse.clone()
    arguments = (mode, *lists, None, block, block, head_dim**-0.5)
    ops.block_sparse_attention_(out, lse, *heads, *arguments, backend="native")
    assert_same("skipped", (out[skipped], lse[skipped]), (out_before[skipped], lse_before[skipped]))
    full = attend(heads, torch.where(skipped, 0, mode).byte(), lists, block)
    assert_same("others", (out[~skipped], lse[~skipped]), (full[0][~skipped], full[1][~skipped]))


@pytest.mark.parametrize(("head_dim", "block"), SHAPES)
def test_no_keys_give_zero_and_minus_infinity(
    head_dim: int, block: int, dtype: torch.dtype
) -> None:
    geometry = geometry_of(head_dim, block)
    heads = [poison_(t) for t in make_heads(geometry, dtype)]
    count, index, _ = random_lists(torch.Generator().manual_seed(4), geometry, 0.5)
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8)
    nothing = torch.zeros(geometry.rows, dtype=torch.int32)
    for lists, kv_len in (
        ((count * 0, poison_(index.clone()), None), None),
        ((count, index, None), nothing),
    ):
        out, lse = attend(heads, mode, lists, block, kv_len)
        assert not out.any()
        assert (lse == -torch.inf).all()


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[Any, ...]:
    mode = torch.zeros(q.shape[:2], dtype=torch.uint8)
    return (q, k, v, mode, None, None, None, None, 64, 64, scale, True)


def test_large_logits_are_exact(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, 2, 200, 64, generator=g).to(dtype) for _ in range(3))
    for gain in (30.0, 300.0):  # rows become one-hot
        check_attention(f"gain {gain}", dense(q, k, v, gain * 0.125))


def test_equal_logits_give_the_mean(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(9)
    q, k = torch.ones(1, 2, 150, 64).to(dtype), torch.full((1, 2, 203, 64), 0.5).to(dtype)
    v = torch.randn(1, 2, 203, 64, generator=g).to(dtype)
    arguments = dense(q, k, v, 0.125)
    check_attention("equal", arguments)
    out, lse = ops.block_sparse_attention(*arguments, backend="native")
    assert_same_bits("all queries alike", out, out[:, :, :1].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 4.0 + 5.31320597904), rtol=1e-6, atol=0)


def test_sums_of_values_may_pass_the_range_of_float16(dtype: torch.dtype) -> None:
    """A mean of values near the limit is finite, though their sum is not."""
    q, k = torch.zeros(1, 1, 64, 64).to(dtype), torch.zeros(1, 1, 200, 64).to(dtype)
    v = torch.full((1, 1, 200, 64), 60000.0).to(dtype)
    out, _ = ops.block_sparse_attention(*dense(q, k, v, 1.0), backend="native")
    torch.testing.assert_close(
        out, v[:, :, :64], rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=0
    )


def test_products_beyond_the_range_of_float16_are_exact(dtype: torch.dtype) -> None:
    """Logits of 300 x 300 x 64 overflow float16: they must never be rounded to it."""
    g = torch.Generator().manual_seed(10)
    q, k, v = (torch.randn(1, 1, 100, 64, generator=g) for _ in range(3))
    q, k, v = (300 * q).to(dtype), (300 * k).to(dtype), v.to(dtype)
    check_attention("large", dense(q, k, v, 1e-5))


def test_tiny_values_do_not_become_wrong(dtype: torch.dtype) -> None:
    """Values below the normal range may flush to zero, but no further."""
    g = torch.Generator().manual_seed(11)
    tiny = {torch.float32: 1e-39, torch.bfloat16: 1e-39, torch.float16: 1e-6}[dtype]
    q, k, v = (torch.randn(1, 1, 70, 64, generator=g) for _ in range(3))
    q, k, v = q.to(dtype), k.to(dtype), (v * tiny).to(dtype)
    out, _ = ops.block_sparse_attention(*dense(q, k, v, 0.125), backend="native")
    truth, _ = reference.block_sparse_attention(*widen(dense(q, k, v, 0.125)))
    assert (out.double() - truth).abs().max() < 4 * tiny
    q = (q * tiny).to(dtype)
    check_attention("tiny logits", dense(q, k, torch.randn_like(v), 0.125))


def test_nan_stays_in_its_row_and_head(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(12)
    q, k, v = (torch.randn(2, 2, 100, 64, generator=g).to(dtype) for _ in range(3))
    v[1, 0, 50] = torch.nan
    q[0, 1, 7] = torch.nan
    out, lse = ops.block_sparse_attention(*dense(q, k, v, 0.125), backend="native")
    expected = torch.zeros(2, 2, 100, dtype=torch.bool)
    expected[1, 0], expected[0, 1, 7] = True, True
    assert torch.equal(out.isnan().any(-1), expected)
    assert lse[0, 1, 7].isnan()
    assert lse.isnan().sum() == 1

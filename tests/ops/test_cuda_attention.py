# SPDX-License-Identifier: Apache-2.0
"""The CUDA attention kernels on a GPU: right as the CPU's must be, and bit for bit where nothing may matter.

Streams, devices, graphs and refusals are in test_cuda.py; the same kernels without a GPU in test_cuda_gates.py.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_calls import check_attention

from rapid3rt import ops
from rapid3rt.ops import reference
from rapid3rt.testing.attention import Heads, packed_heads, random_lists, text_lists
from rapid3rt.testing.cases import REAL_CASES, Case, cases_of
from rapid3rt.testing.numerics import assert_same_bits, poison_

Results = tuple[torch.Tensor, torch.Tensor]

DTYPES = (torch.bfloat16, torch.float16)
# head dim, block
SHAPES = [(64, 64), (64, 128), (128, 64), (128, 128)]
LENGTHS = (1, 3, 63, 64, 65, 113, 127, 128, 129, 203, 239, 799, 1023)
CASES = cases_of("block_sparse_attention")

pytestmark = [pytest.mark.cuda, pytest.mark.parametrize("dtype", DTYPES, ids=str)]
shapes = pytest.mark.parametrize(("head_dim", "block"), SHAPES)


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def schedule(name: str) -> Iterator[None]:
    """How CTAs take work within the block."""
    module: Any = importlib.import_module("rapid3rt._cuda")
    module.force_schedule(name)
    try:
        yield
    finally:
        module.force_schedule("queue")


def to_gpu(arguments: Any) -> tuple[Any, ...]:
    return tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)


def is_served(case: Case) -> bool:
    """By its name: to make the arguments of a real size takes seconds."""
    geometry = re.search(r"K(\d+) block (\d+)", case.name)
    assert geometry is not None
    return (int(geometry[1]), int(geometry[2])) in SHAPES


def geometry_of(head_dim: int, block: int) -> Heads:
    return Heads(rows=4, heads=2, image=460, text=41, head_dim=head_dim, block=block)


def make_heads(geometry: Heads, dtype: torch.dtype) -> tuple[Any, ...]:
    return to_gpu(packed_heads(torch.Generator().manual_seed(1), dtype, geometry))


def make_lists(seed: int, geometry: Heads, density: float) -> tuple[Any, ...]:
    return to_gpu(random_lists(torch.Generator().manual_seed(seed), geometry, density))


def lengths(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def modes(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8, device="cuda")


def attend(heads: Any, mode: torch.Tensor, lists: Any, block: int, kv_len: Any = None) -> Results:
    scale = heads[0].shape[-1] ** -0.5
    arguments = (*heads, mode, *lists, kv_len, block, block, scale, True)
    return ops.block_sparse_attention(*arguments, backend="native")


def assert_same(what: str, got: Results, want: Results) -> None:
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        assert_same_bits(f"{what}: {name}", a, b)


@pytest.mark.parametrize("case", [case for case in CASES if is_served(case)], ids=str)
def test_cases_are_right(case: Case, dtype: torch.dtype) -> None:
    check_attention(str(case), to_gpu(case.arguments(dtype)))


@shapes
@pytest.mark.parametrize("tokens", LENGTHS)
def test_any_length_is_right(tokens: int, head_dim: int, block: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(tokens)
    text = tokens // 5
    geometry = Heads(
        rows=2, heads=3, image=tokens - text, text=text, head_dim=head_dim, block=block
    )
    mode = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.uint8)
    for kv_len in (None, torch.randint(0, tokens + 1, (2,), generator=g).to(torch.int32)):
        heads = packed_heads(g, dtype, geometry)
        lists = random_lists(g, geometry, 0.4)
        rest = (kv_len, block, block, head_dim**-0.5, True)
        check_attention(f"{geometry}", to_gpu((*heads, mode, *lists, *rest)))


@shapes
@pytest.mark.parametrize(("num_q", "num_kv"), [(1, 300), (300, 1), (129, 64), (64, 129), (77, 515)])
def test_queries_and_keys_may_differ_in_number(
    num_q: int, num_kv: int, head_dim: int, block: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(num_q)
    q, k, v = (
        torch.randn(2, 2, n, head_dim, generator=g).to(dtype) for n in (num_q, num_kv, num_kv)
    )
    blocks_q, blocks_kv = -(-num_q // block), -(-num_kv // block)
    listed = torch.rand(2, 2, blocks_q, blocks_kv, generator=g) < 0.6
    count = listed.sum(-1, dtype=torch.int32)
    index = torch.argsort((~listed).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    mode = torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8)
    rest = (None, None, block, block, head_dim**-0.5, True)
    check_attention("lengths", to_gpu((q, k, v, mode, count, index, *rest)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in REAL_CASES if c.op == "block_sparse_attention" and is_served(c)], ids=str
)
def test_real_sizes_are_right(case: Case, dtype: torch.dtype) -> None:
    *arguments, _ = case.arguments(dtype)
    check_attention(str(case), to_gpu((*arguments, True)))


@shapes
def test_a_hundred_repeats_are_one(head_dim: int, block: int, dtype: torch.dtype) -> None:
    """With more tiles than CTAs fit, so that their order differs from run to run."""
    geometry = Heads(rows=4, heads=24, image=1500, text=77, head_dim=head_dim, block=block)
    heads = make_heads(geometry, dtype)
    lists = to_gpu(text_lists(torch.Generator().manual_seed(3), geometry, 0.4))
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8, device="cuda")
    kv_len = lengths(1577, 1000, 64, 1)
    want = attend(heads, mode, lists, block, kv_len)
    for i in range(100):
        assert_same(f"repeat {i}", attend(heads, mode, lists, block, kv_len), want)


@shapes
def test_order_and_schedule_never_change_a_result(
    head_dim: int, block: int, dtype: torch.dtype
) -> None:
    geometry = Heads(rows=4, heads=16, image=900, text=77, head_dim=head_dim, block=block)
    heads = make_heads(geometry, dtype)
    count, index, order = make_lists(2, geometry, 0.5)
    mode = torch.arange(64, device="cuda").remainder(3).ne(0).to(torch.uint8).view(4, 16)
    want = attend(heads, mode, (count, index, None), block)
    longest = torch.argsort(-count.flatten(), stable=True).to(torch.int32)
    for name in ("queue", "static"):
        with schedule(name):
            for places in (None, order, longest):
                got = attend(heads, mode, (count, index, places), block)
                assert_same(f"{name}, {'natural' if places is None else 'other'} order", got, want)


@shapes
def test_a_full_list_is_dense_attention(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    blocks = geometry.blocks
    shape = (geometry.rows, geometry.heads, blocks)
    index = torch.arange(blocks, dtype=torch.int32, device="cuda").expand(*shape, blocks)
    count = torch.full(shape, blocks, dtype=torch.int32, device="cuda")
    mode = torch.zeros(shape[:2], dtype=torch.uint8, device="cuda")
    for kv_len in (None, lengths(501, 500, 65, 0)):
        dense = attend(heads, mode, (None, None, None), block, kv_len)
        assert_same("list", attend(heads, mode + 1, (count, index, None), block, kv_len), dense)


@shapes
def test_a_row_depends_on_itself_alone(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    count, index, order = make_lists(2, geometry, 0.5)
    mode = modes([[1, 0], [0, 0], [1, 1], [0, 1]])
    kv_len = lengths(501, 130, 501, 77)
    want = attend(heads, mode, (count, index, order), block, kv_len)
    for row in range(geometry.rows):
        part = slice(row, row + 1)
        lists = (count[part], index[part], None)
        alone = attend([t[part] for t in heads], mode[part], lists, block, kv_len[part])
        assert_same(f"row {row} alone", alone, (want[0][part], want[1][part]))
    turned = [t.flip(0) for t in (*heads, mode, count, index, kv_len)]
    got = attend(turned[:3], turned[3], (turned[4], turned[5], None), block, turned[6])
    assert_same("rows turned", (got[0].flip(0), got[1].flip(0)), want)
    other = mode.clone()
    other[1:] = 1 - other[1:]
    for t in heads:
        poison_(t[1:])
    changed = attend(heads, other, (count, index, order), block, kv_len)
    assert_same("neighbours", (changed[0][:1], changed[1][:1]), (want[0][:1], want[1][:1]))


@shapes
def test_a_query_depends_on_itself_alone(head_dim: int, block: int, dtype: torch.dtype) -> None:
    q, k, v = make_heads(geometry_of(head_dim, block), dtype)
    mode = torch.zeros(q.shape[:2], dtype=torch.uint8, device="cuda")
    want = attend((q, k, v), mode, (None, None, None), block)
    q = q.clone()
    poison_(q[:, :, 1::2])
    for num_q in (q.shape[2], 1, 33, 100):
        out, lse = attend((q[:, :, :num_q], k, v), mode, (None, None, None), block)
        clean = (want[0][:, :, :num_q:2], want[1][:, :, :num_q:2])
        assert_same(f"{num_q} queries", (out[:, :, ::2], lse[:, :, ::2]), clean)


@shapes
def test_lists_may_be_shared_by_rows_and_heads(
    head_dim: int, block: int, dtype: torch.dtype
) -> None:
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    count, index, _ = make_lists(6, geometry, 0.5)
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8, device="cuda")
    shared = [t[:1, :1].expand(geometry.rows, geometry.heads, *t.shape[2:]) for t in (count, index)]
    want = attend(heads, mode, ([t.contiguous() for t in shared] + [None]), block)
    assert_same("shared", attend(heads, mode, (*shared, None), block), want)


@shapes
def test_unread_memory_may_hold_anything(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    shape = (geometry.rows, geometry.tokens, 3, geometry.heads, head_dim + 16)
    packed = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype).cuda()
    clean = [t[..., :head_dim].permute(0, 2, 1, 3) for t in packed.unbind(2)]
    limits = (130, 501, 64, 1)
    blocks = geometry.blocks
    index = 2 * torch.arange(blocks, dtype=torch.int32).repeat(
        geometry.rows, geometry.heads, blocks, 1
    )
    count = torch.full(index.shape[:3], (blocks + 1) // 2, dtype=torch.int32, device="cuda")
    index = poison_(index.transpose(0, 3), slice((blocks + 1) // 2, None)).transpose(0, 3)
    index = index.contiguous().cuda()
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8, device="cuda")
    want = attend([t.clone() for t in clean], mode, (count, index, None), block, lengths(*limits))
    poisoned = packed.clone()
    poisoned[..., head_dim:] = torch.nan  # padding between heads
    for block_id in range(1, blocks, 2):
        poisoned[:, block_id * block : (block_id + 1) * block, 1:] = torch.nan
    for row, limit in enumerate(limits):
        poisoned[row, limit:, 1:] = torch.nan
    heads = [t[..., :head_dim].permute(0, 2, 1, 3) for t in poisoned.unbind(2)]
    out = poison_(torch.empty_like(packed))
    lse = poison_(torch.empty(geometry.rows, geometry.heads, geometry.tokens, device="cuda"))
    view = out.unbind(2)[0][..., :head_dim].permute(0, 2, 1, 3)
    arguments = (mode, count, index, None, lengths(*limits), block, block, head_dim**-0.5)
    ops.block_sparse_attention_(view, lse, *heads, *arguments, backend="native")
    assert_same("poison", (view, lse), want)
    assert out[..., head_dim:].isnan().all()  # nothing beside the output is written
    assert out[:, :, 1:].isnan().all()


@shapes
def test_skipped_heads_keep_their_bytes(head_dim: int, block: int, dtype: torch.dtype) -> None:
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    lists = make_lists(4, geometry, 0.5)
    mode = modes([[2, 0], [1, 2], [2, 2], [0, 1]])
    skipped = mode == 2
    out = poison_(torch.empty_like(heads[0]))
    lse = poison_(torch.empty(heads[0].shape[:3], device="cuda"))
    arguments = (mode, *lists, None, block, block, head_dim**-0.5)
    ops.block_sparse_attention_(out, lse, *heads, *arguments, backend="native")
    assert out[skipped].isnan().all()
    assert lse[skipped].isnan().all()
    full = attend(heads, torch.where(skipped, 0, mode).byte(), lists, block)
    assert_same("others", (out[~skipped], lse[~skipped]), (full[0][~skipped], full[1][~skipped]))


@shapes
def test_no_keys_give_zero_and_minus_infinity(
    head_dim: int, block: int, dtype: torch.dtype
) -> None:
    geometry = geometry_of(head_dim, block)
    heads = [poison_(t) for t in make_heads(geometry, dtype)]
    count, index, _ = make_lists(4, geometry, 0.5)
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8, device="cuda")
    for lists, kv_len in (
        ((count * 0, poison_(index.clone()), None), None),
        ((count, index, None), lengths(0, 0, 0, 0)),
        ((count * 0, index[..., :0], None), None),
    ):
        out, lse = attend(heads, mode, lists, block, kv_len)
        assert not out.any()
        assert (lse == -torch.inf).all()


@shapes
def test_wrong_lists_read_nothing_else(head_dim: int, block: int, dtype: torch.dtype) -> None:
    """Ids that no block has count as blocks without keys; the host cannot look."""
    geometry = geometry_of(head_dim, block)
    heads = make_heads(geometry, dtype)
    count, index, _ = make_lists(4, geometry, 0.5)  # beyond count, the largest integer
    mode = torch.ones(geometry.rows, geometry.heads, dtype=torch.uint8, device="cuda")
    want = attend(heads, mode, (count, index, None), block)
    every = torch.full_like(count, geometry.blocks)
    assert_same("largest", attend(heads, mode, (every, index, None), block), want)
    index = torch.where(index == 2**31 - 1, -1, index)
    assert_same("negative", attend(heads, mode, (every, index, None), block), want)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[Any, ...]:
    mode = torch.zeros(q.shape[:2], dtype=torch.uint8)
    return to_gpu((q, k, v, mode, None, None, None, None, 64, 64, scale, True))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("gain", [-1.0, 0.0, 30.0, 300.0])
def test_any_scale_is_right(gain: float, head_dim: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, 2, 200, head_dim, generator=g).to(dtype) for _ in range(3))
    check_attention(f"gain {gain}", dense(q, k, v, gain * head_dim**-0.5))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("gain", [1e7, 1e9, 1e10, 1e20, 1e34])
def test_huge_logits_choose_the_largest(gain: float, head_dim: int, dtype: torch.dtype) -> None:
    """From 1e9 on a float is more than an exponent away from the next: weights are 0 or 1, never infinite."""
    g = torch.Generator().manual_seed(20)
    q, k, v = (torch.randn(1, 2, n, head_dim, generator=g).to(dtype) for n in (150, 600, 600))
    k *= torch.linspace(0.5, 2, 600, dtype=dtype)[:, None]  # maxima rise over steps
    logits = q.double() @ k.double().mT
    top = logits.topk(2)
    sure = top.values[..., 0] - top.values[..., 1] > 1e-4 * top.values[..., 0].abs()
    assert sure.float().mean() > 0.95
    want = v.gather(2, top.indices[..., :1].expand(-1, -1, -1, head_dim))
    out, lse = ops.block_sparse_attention(*dense(q, k, v, gain), backend="native")
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu()[sure], want[sure], rtol=tolerance, atol=0)
    expected = logits.max(3).values * gain
    torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_that_rise_over_steps_are_exact(head_dim: int, dtype: torch.dtype) -> None:
    """What was summed decays whenever a later step raises the base."""
    g = torch.Generator().manual_seed(21)
    q, k, v = (torch.randn(1, 2, n, head_dim, generator=g) for n in (70, 1000, 1000))
    k = k * torch.linspace(1, 30, 1000)[:, None]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    check_attention("rising", dense(q, k, v, 0.125))


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
    q, k = torch.zeros(1, 1, 64, 64).to(dtype), torch.zeros(1, 1, 200, 64).to(dtype)
    v = torch.full((1, 1, 200, 64), 60000.0).to(dtype)
    out, _ = ops.block_sparse_attention(*dense(q, k, v, 1.0), backend="native")
    torch.testing.assert_close(out, v[:, :, :64].cuda(), rtol=1e-3, atol=0)


def test_products_beyond_the_range_of_float16_are_exact(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(10)
    q, k, v = (torch.randn(1, 1, 100, 64, generator=g) for _ in range(3))
    q, k, v = (300 * q).to(dtype), (300 * k).to(dtype), v.to(dtype)
    arguments = dense(q, k, v, 1e-5)
    out, lse = ops.block_sparse_attention(*arguments, backend="native")
    wide = [a.double() if i < 3 else a for i, a in enumerate(arguments)]
    truth, truth_lse = reference.block_sparse_attention(*wide)
    assert out.isfinite().all()
    # A rival that rounds logits to float16 overflows here: the dtype's own rounding is the measure.
    step = torch.finfo(dtype).eps
    assert (out.double() - truth).abs().max() <= step * v.abs().max()
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_row_and_head(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(12)
    q, k, v = (torch.randn(2, 2, 100, 64, generator=g).to(dtype) for _ in range(3))
    v[1, 0, 50] = torch.nan
    q[0, 1, 7] = torch.nan
    out, lse = ops.block_sparse_attention(*dense(q, k, v, 0.125), backend="native")
    expected = torch.zeros(2, 2, 100, dtype=torch.bool, device="cuda")
    expected[1, 0], expected[0, 1, 7] = True, True
    assert torch.equal(out.isnan().any(-1), expected)
    assert lse[0, 1, 7].isnan()
    assert lse.isnan().sum() == 1

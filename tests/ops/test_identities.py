# SPDX-License-Identifier: Apache-2.0
"""What must hold bit for bit, whatever the numbers: threads, neighbours, order of work, poison in unread memory."""

from __future__ import annotations

import pytest
import torch

from rapid3rt import ops
from rapid3rt.testing.attention import Heads, packed_heads, random_lists
from rapid3rt.testing.cases import CASES, TINY, Case, clone_arguments, result_tensors
from rapid3rt.testing.numerics import assert_same_bits, poison_

BLOCK, SCALE = 32, 0.125
BACKENDS = ["native", "reference"]
GEOMETRY = Heads(rows=4, heads=2, image=160, text=41, head_dim=64, block=BLOCK)


@pytest.fixture
def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return packed_heads(torch.Generator().manual_seed(1), torch.float32, GEOMETRY)


@pytest.fixture
def lists() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return random_lists(torch.Generator().manual_seed(2), GEOMETRY, 0.5)


def modes(value: int) -> torch.Tensor:
    return torch.full((GEOMETRY.rows, GEOMETRY.heads), value, dtype=torch.uint8)


def attend(q, k, v, mode, count=None, index=None, order=None, kv_len=None, backend="native"):
    arguments = (q, k, v, mode, count, index, order, kv_len, BLOCK, BLOCK, SCALE, True)
    return ops.block_sparse_attention(*arguments, backend=backend)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_thread_and_two_give_the_same_bits(case: Case) -> None:
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        arguments = clone_arguments(case.arguments(torch.float32))
        result = getattr(ops, case.op)(*arguments, backend="native")
        results.append((*result_tensors(result), *(arguments[i] for i in case.writes)))
    for one, two in zip(*results, strict=True):
        assert_same_bits(str(case), one, two)


def test_a_full_list_is_dense_attention(heads) -> None:
    blocks = -(-GEOMETRY.tokens // BLOCK)
    index = torch.arange(blocks, dtype=torch.int32).expand(
        GEOMETRY.rows, GEOMETRY.heads, blocks, blocks
    )
    count = torch.full((GEOMETRY.rows, GEOMETRY.heads, blocks), blocks, dtype=torch.int32)
    for a, b in zip(attend(*heads, modes(0)), attend(*heads, modes(1), count, index), strict=True):
        assert_same_bits("full list", a, b)


def test_keeping_every_block_is_dense(heads) -> None:
    q, k, _ = heads
    keep = torch.full((GEOMETRY.rows,), 5, dtype=torch.int32)
    mode, count, index, order = ops.build_block_lists(q, k, keep, 160, 41, BLOCK, BLOCK, SCALE)
    assert (mode == 0).all()
    for a, b in zip(
        attend(*heads, mode), attend(*heads, modes(1), count, index, order), strict=True
    ):
        assert_same_bits("keep all", a, b)


def test_the_order_of_work_changes_nothing(heads, lists) -> None:
    count, index, _ = lists
    want = attend(*heads, modes(1), count, index)
    for seed in range(3):
        order = torch.randperm(count.numel(), generator=torch.Generator().manual_seed(seed)).int()
        for a, b in zip(attend(*heads, modes(1), count, index, order), want, strict=True):
            assert_same_bits("order", a, b)


def test_a_row_depends_on_itself_alone(heads, lists) -> None:
    count, index, _ = lists
    mode = modes(1)
    mode[1], mode[2, 1] = 0, 0
    want, _ = attend(*heads, mode, count, index)
    shuffled = torch.tensor([2, 0, 3, 1])
    got, _ = attend(*(t[shuffled] for t in (*heads, mode, count, index)))
    assert_same_bits("permuted rows", got, want[shuffled])
    for row in range(GEOMETRY.rows):
        alone, _ = attend(*(t[row : row + 1] for t in (*heads, mode, count, index)))
        assert_same_bits(f"row {row} alone", alone[0], want[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_lists_give_zero_and_minus_infinity(heads, lists, backend: str) -> None:
    count, index, _ = lists
    out, lse = attend(*heads, modes(1), torch.zeros_like(count), poison_(index), backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_no_list_names_are_never_read(heads, lists, backend: str) -> None:
    count, index, order = lists
    q, k, v = (t.clone() for t in heads)
    # Lists of the even blocks only; the odd ones hold poison, as do keys beyond kv_len.
    kv_len = torch.tensor([130, 201, 64, 1], dtype=torch.int32)
    index[:] = 2 * torch.arange(index.shape[-1])
    count[:] = 4
    poison_(index[..., 4:])
    want = attend(q, k, v, modes(1), count, index, order, kv_len, backend=backend)
    for t in (k, v):
        for block in range(1, index.shape[-1], 2):
            t[:, :, block * BLOCK : (block + 1) * BLOCK] = torch.nan
        for row, limit in enumerate(kv_len.tolist()):
            t[row, :, limit:] = torch.nan
    got = attend(q, k, v, modes(1), count, index, order, kv_len, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert a.isnan().sum() == 0
        assert_same_bits("poison", a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slot_without_history_is_never_read(backend: str) -> None:
    slots = poison_(torch.empty(3, 3, 5, 8))
    out, embedded = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    slot = torch.tensor([2, 0], dtype=torch.int32)
    stats = ops.cache_store(slots, out, embedded, slot, torch.zeros(2), backend=backend)
    assert stats.isfinite().all()
    assert_same_bits("order 0", slots[slot.long(), 0], out - embedded)
    assert not slots[slot.long(), 1:].any()
    assert slots[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lookup_reads_only_its_slot_and_orders(backend: str) -> None:
    slots = poison_(torch.empty(3, 2, 5, 8))
    slots[1, 0] = torch.randn(5, 8)
    embedded, slot = torch.randn(1, 5, 8), torch.tensor([1], dtype=torch.int32)
    got = ops.cache_lookup(embedded, slots, slot, torch.tensor([[1.0, 0.0]]), backend=backend)
    assert_same_bits("lookup", got, embedded + slots[1, 0])


def test_store_then_lookup_gives_the_output_back() -> None:
    """In float32 a residual of magnitudes alike is exact here: multiples of 1/64 below 16."""
    out, embedded = (torch.randint(-512, 512, (4, 9, 16)) / 64 for _ in range(2))
    slots, slot = torch.empty(4, 1, 9, 16), torch.arange(4, dtype=torch.int32)
    ops.cache_store(slots, out, embedded, slot, torch.zeros(4))
    assert_same_bits("round trip", ops.cache_lookup(embedded, slots, slot, torch.ones(4, 1)), out)


def test_lookup_norm_is_lookup_then_modulate() -> None:
    embedded, slots = torch.randn(3, 7, 24), torch.randn(3, 2, 7, 24)
    slot, coef = torch.arange(3, dtype=torch.int32), torch.randn(3, 2)
    scale, shift = torch.randn(3, 24), torch.randn(3, 24)
    fused = ops.cache_lookup_norm(embedded, slots, slot, coef, scale, shift, 1e-6)
    x = ops.cache_lookup(embedded, slots, slot, coef)
    assert_same_bits("fused", fused, ops.norm_modulate(x, scale, shift, None, None, 1e-6, False))


def test_scatter_undoes_gather() -> None:
    x = torch.randn(6, 5, 3)
    rows = torch.randperm(6).int()
    out = poison_(torch.empty(6, 5, 3))
    ops.scatter_rows(out, ops.gather_rows(x, rows), rows)
    assert_same_bits("round trip", out, x)


def test_inputs_of_any_layout_are_read_right() -> None:
    x = torch.randn(4, 6, 5).transpose(1, 2)
    rows = torch.tensor([3, 9, 1, 9], dtype=torch.int32)[::2]
    assert_same_bits("gather", ops.gather_rows(x, rows), x[[3, 1]].contiguous())
    gate = torch.randn(6, 4).T
    want = ops.gate_residual(x.contiguous(), gate.contiguous(), x.contiguous())
    assert_same_bits("gate", ops.gate_residual(x, gate, x), want)


def test_native_and_reference_choose_the_same_blocks_of_real_values() -> None:
    q, k, _ = packed_heads(torch.Generator().manual_seed(3), torch.float32, TINY)
    keep = torch.arange(TINY.rows, dtype=torch.int32) % 9
    arguments = (q, k, keep, TINY.image, TINY.text, BLOCK, BLOCK, SCALE)
    native = ops.build_block_lists(*arguments, backend="native")
    reference = ops.build_block_lists(*arguments, backend="reference")
    for a, b in zip(native, reference, strict=True):
        assert torch.equal(a, b)

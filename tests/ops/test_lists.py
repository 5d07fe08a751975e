# SPDX-License-Identifier: Apache-2.0
"""Which blocks are chosen, beyond the cases: ties, values that are no numbers, text anywhere, every instruction set."""

from __future__ import annotations

import pytest
import torch
from attention_calls import ISAS, forced
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt import ops
from rapid3rt.testing.attention import Heads, packed_heads
from rapid3rt.testing.cases import DTYPES
from rapid3rt.testing.numerics import assert_same_bits

BLOCK = 32
Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def build(
    q: torch.Tensor,
    k: torch.Tensor,
    keep: int,
    text: tuple[int, int] = (0, 0),
    scale: float = 1.0,
    backend: str = "native",
) -> Lists:
    kept = torch.full((q.shape[0],), keep, dtype=torch.int32)
    return ops.build_block_lists(q, k, kept, *text, BLOCK, BLOCK, scale, backend=backend)


def assert_same_lists(got: Lists, want: Lists) -> None:
    for name, a, b in zip(("mode", "count", "index", "order"), got, want, strict=True):
        assert_same_bits(name, a, b)


def listed(lists: Lists, query_block: int) -> list[int]:
    _, count, index, _ = lists
    return index[0, 0, query_block, : int(count[0, 0, query_block])].tolist()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_ties_take_the_lower_block(backend: str, value: float) -> None:
    q = torch.full((1, 1, 8 * BLOCK, 16), value)
    q[:, :, ::64] *= -1.0  # zeros of both signs among the summands
    lists = build(q, torch.ones_like(q), 3, (7 * BLOCK, BLOCK), backend=backend)
    assert all(listed(lists, m) == [0, 1, 2, 7] for m in range(7))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_zeros_of_both_signs_tie(backend: str) -> None:
    q, k = torch.ones(1, 1, 4 * BLOCK, 16), torch.zeros(1, 1, 4 * BLOCK, 16)
    k[:, :, :BLOCK] = -0.0
    assert listed(build(q, k, 1, backend=backend), 0) == [0]
    assert listed(build(-q, k, 2, backend=backend), 3) == [0, 1]


@pytest.mark.parametrize("isa", ISAS)
def test_nan_ranks_lowest_and_infinity_highest(isa: str) -> None:
    q = torch.ones(1, 1, 6 * BLOCK, 16)
    k = torch.zeros_like(q)
    k[:, :, 0] = torch.nan
    k[:, :, 3 * BLOCK] = torch.inf
    k[:, :, 4 * BLOCK] = -torch.inf
    with forced(isa):
        assert listed(build(q, k, 1), 0) == [3]
        assert listed(build(q, k, 4), 0) == [1, 2, 3, 5]
        assert listed(build(q, k, 5), 0) == [0, 1, 2, 3, 5]  # NaN and -inf tie
        assert_same_lists(build(q, k, 3), build(q, k, 3, backend="reference"))
        # A scale of 0 makes infinity no number.
        assert_same_lists(build(q, k, 3, scale=0.0), build(q, k, 3, scale=0.0, backend="reference"))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_the_scale_counts_with_its_sign(scale: float) -> None:
    q, k, _ = packed_heads(
        torch.Generator().manual_seed(5),
        torch.float32,
        Heads(rows=2, heads=2, image=256, text=0, head_dim=64, block=BLOCK),
    )
    assert_same_lists(build(q, k, 3, scale=scale), build(q, k, 3, scale=scale, backend="reference"))


@pytest.mark.parametrize("keep", [-(2**31), -1, 0])
def test_keeping_nothing_leaves_text(keep: int) -> None:
    q = torch.randn(1, 1, 4 * BLOCK, 16)
    lists = build(q, q, keep, (3 * BLOCK, BLOCK))
    assert [listed(lists, m) for m in range(4)] == [[3], [3], [3], [0, 1, 2, 3]]


@pytest.mark.parametrize("keep", [3, 4, 2**31 - 1])
def test_keeping_all_image_blocks_is_dense(keep: int) -> None:
    q = torch.randn(1, 2, 4 * BLOCK, 16)
    mode, count, index, order = build(q, q, keep, (3 * BLOCK, BLOCK))
    assert not mode.any()
    assert (count == 4).all()
    assert torch.equal(index, torch.arange(4, dtype=torch.int32).expand(1, 2, 4, 4))
    assert order.tolist() == list(range(8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 96, 128, 136])
def test_every_isa_and_thread_count_chooses_alike(head_dim: int, dtype: torch.dtype) -> None:
    geometry = Heads(rows=3, heads=2, image=1500, text=77, head_dim=head_dim, block=BLOCK)
    q, k, _ = packed_heads(torch.Generator().manual_seed(head_dim), dtype, geometry)
    want = build(q, k, 11, (1500, 77), 0.1)
    before = torch.get_num_threads()
    for isa in ISAS:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            with forced(isa):
                assert_same_lists(build(q, k, 11, (1500, 77), 0.1), want)
    torch.set_num_threads(before)


def test_strides_change_nothing() -> None:
    geometry = Heads(rows=2, heads=3, image=300, text=20, head_dim=64, block=BLOCK)
    q, k, _ = packed_heads(torch.Generator().manual_seed(0), torch.bfloat16, geometry)
    want = build(q.contiguous(), k.contiguous(), 4, (300, 20))
    assert_same_lists(build(q, k, 4, (300, 20)), want)


def test_order_is_longest_first_then_by_id() -> None:
    q = torch.randn(5, 3, 9 * BLOCK, 16)
    keep = torch.tensor([3, 0, 99, 1, 3], dtype=torch.int32)
    _, count, _, order = ops.build_block_lists(q, q, keep, 256, 32, BLOCK, BLOCK, 1.0)
    cost = count.flatten().tolist()
    assert order.tolist() == sorted(range(len(cost)), key=lambda i: (-cost[i], i))


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), isa=st.sampled_from(ISAS), dtype=st.sampled_from(DTYPES))
def test_random_geometries_choose_as_the_reference(
    data: st.DataObject, isa: str, dtype: torch.dtype
) -> None:
    tokens = data.draw(st.integers(1, 400))
    start = data.draw(st.integers(0, tokens))
    length = data.draw(st.integers(0, tokens - start))
    block = data.draw(st.sampled_from((32, 64, 128)))
    head_dim = data.draw(st.sampled_from((8, 24, 64, 72)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    # Small integers: sums are exact in any order. Few of them: many ties.
    q, k = (torch.randint(-2, 3, (2, 2, tokens, head_dim), generator=g).to(dtype) for _ in range(2))
    # A shorter last block has an exact mean too where its tokens are alike.
    tail = tokens // block * block
    q[:, :, tail:], k[:, :, tail:] = q[:, :, tail : tail + 1], k[:, :, tail : tail + 1]
    keep = torch.randint(-1, 8, (2,), generator=g).to(torch.int32)
    arguments = (q, k, keep, start, length, block, block, 0.25)
    with forced(isa):
        got = ops.build_block_lists(*arguments, backend="native")
    assert_same_lists(got, ops.build_block_lists(*arguments, backend="reference"))

# SPDX-License-Identifier: Apache-2.0
"""build_block_lists on a GPU: the choice of the CPU kernels bit for bit, of real values and of ties, in graphs too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt import ops
from rapid3rt.testing.attention import Heads, packed_heads
from rapid3rt.testing.cases import DTYPES, FLUX, SD3, Case, cases_of
from rapid3rt.testing.numerics import assert_same_bits

pytestmark = pytest.mark.cuda

BLOCK = 64
NAMES = ("mode", "count", "index", "order")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Lists and workspace hold their largest value before they are written."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.no_grad():
        yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def build(arguments: tuple[Any, ...], device: str = "cuda", backend: str = "native") -> Any:
    moved = (a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
    return ops.build_block_lists(*moved, backend=backend)


def assert_same_lists(what: str, got: Any, want: Any) -> None:
    for name, a, b in zip(NAMES[: len(want)], got, want, strict=True):
        assert_same_bits(f"{what}: {name}", a.cpu(), b.cpu())


def of_heads(
    seed: int, geometry: Heads, keep: tuple[int, ...], dtype: torch.dtype
) -> tuple[Any, ...]:
    """A call on random values in the layout of diffusers."""
    q, k, _ = packed_heads(torch.Generator().manual_seed(seed), dtype, geometry)
    rows = torch.tensor([keep[i % len(keep)] for i in range(geometry.rows)], dtype=torch.int32)
    text = (geometry.image, geometry.text)
    return q, k, rows, *text, geometry.block, geometry.block, geometry.head_dim**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("build_block_lists"), ids=str)
def test_lists_are_those_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    assert_same_lists(str(case), build(arguments), build(arguments, "cpu", "reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 136])
def test_real_values_choose_as_on_the_cpu(head_dim: int, dtype: torch.dtype) -> None:
    geometry = Heads(rows=3, heads=5, image=1500, text=77, head_dim=head_dim, block=32)
    arguments = of_heads(head_dim, geometry, (11, 0, 99), dtype)
    assert_same_lists(str(geometry), build(arguments), build(arguments, "cpu"))


@pytest.mark.parametrize("geometry", [FLUX, SD3], ids=str)
def test_real_sizes_choose_as_on_the_cpu(geometry: Heads) -> None:
    arguments = of_heads(0, geometry, (9,), torch.bfloat16)
    assert_same_lists(str(geometry), build(arguments), build(arguments, "cpu"))


@pytest.mark.parametrize(("image", "block"), [(70 * 32, 32), (300 * 32 + 5, 32), (600 * 32, 32)])
def test_long_sequences_choose_as_on_the_cpu(image: int, block: int) -> None:
    """More key blocks than two a lane, than registers, than shared bins hold."""
    geometry = Heads(rows=1, heads=2, image=image, text=40, head_dim=16, block=block)
    arguments = of_heads(image, geometry, (37,), torch.bfloat16)
    assert_same_lists(str(geometry), build(arguments), build(arguments, "cpu"))


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_ties_take_the_lower_block(value: float) -> None:
    q = torch.full((1, 1, 40 * BLOCK, 16), value)
    q[:, :, ::64] *= -1.0
    arguments = (q, torch.ones_like(q), torch.tensor([35], dtype=torch.int32), 39 * BLOCK, BLOCK)
    _, count, index, _ = build((*arguments, BLOCK, BLOCK, 1.0))
    assert (count[..., :39] == 36).all()
    assert (index[0, 0, :39, :36].cpu() == torch.tensor([*range(35), 39])).all()


def test_values_that_are_no_numbers_have_a_place() -> None:
    q = torch.ones(1, 1, 6 * BLOCK, 16)
    k = torch.zeros_like(q)
    k[:, :, 0], k[:, :, 3 * BLOCK], k[:, :, 4 * BLOCK] = torch.nan, torch.inf, -torch.inf
    for keep in range(7):
        for scale in (1.0, -1.0, 0.0):
            kept = torch.tensor([keep], dtype=torch.int32)
            arguments = (q, k, kept, 0, 0, BLOCK, BLOCK, scale)
            want = build(arguments, "cpu", "reference")
            assert_same_lists(f"keep {keep} scale {scale}", build(arguments), want)


def test_what_needs_no_score_is_not_read() -> None:
    """Text as key and query, and rows that keep everything."""
    geometry = Heads(rows=2, heads=2, image=500, text=77, head_dim=64, block=BLOCK)
    arguments = of_heads(0, geometry, (99, 2), torch.bfloat16)
    want = build(arguments)
    q, k, *rest = arguments
    for x in (q, k):
        x[0], x[1, :, 7 * BLOCK :] = torch.nan, torch.nan
    assert_same_lists("poison", build((q, k, *rest)), want)


def test_strides_change_nothing() -> None:
    geometry = Heads(rows=2, heads=3, image=300, text=20, head_dim=64, block=BLOCK)
    q, k, *rest = of_heads(0, geometry, (2,), torch.bfloat16)
    want = build((q, k, *rest), "cpu")
    q, k = q.cuda(), k.cuda()
    assert not q.is_contiguous()
    assert_same_lists("packed", build((q, k, *rest)), want)
    assert_same_lists("contiguous", build((q.contiguous(), k.contiguous(), *rest)), want)
    assert_same_lists("mixed", build((q, k.contiguous(), *rest)), want)


def test_an_address_changes_nothing() -> None:
    geometry = Heads(rows=2, heads=3, image=300, text=20, head_dim=64, block=BLOCK)
    q, k, *rest = of_heads(0, geometry, (2,), torch.bfloat16)
    want = build((q, k, *rest), "cpu")
    room = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape)
    assert_same_lists("odd address", build((room.copy_(q), k, *rest)), want)


def test_a_row_depends_on_itself_alone() -> None:
    geometry = Heads(rows=4, heads=3, image=500, text=77, head_dim=64, block=BLOCK)
    q, k, keep, *rest = of_heads(0, geometry, (3, 0, 99, 5), torch.bfloat16)
    mode, count, index, _ = build((q, k, keep, *rest))
    shuffled = torch.tensor([2, 0, 3, 1])
    got = build((q[shuffled], k[shuffled], keep[shuffled], *rest))
    assert_same_lists("permuted", got[:3], [t.cpu()[shuffled] for t in (mode, count, index)])
    for row in range(4):
        at = slice(row, row + 1)
        alone = build((q[at], k[at], keep[at], *rest))
        assert_same_lists(f"row {row}", alone[:3], [t[at] for t in (mode, count, index)])


def test_a_hundred_repeats_choose_alike() -> None:
    geometry = Heads(rows=3, heads=8, image=2000, text=154, head_dim=64, block=BLOCK)
    arguments = of_heads(0, geometry, (5, 99, 0), torch.bfloat16)
    arguments = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)
    want = build(arguments)
    for _ in range(100):
        for a, b in zip(build(arguments), want, strict=True):
            assert torch.equal(a, b)


def test_order_is_longest_first_then_by_id() -> None:
    q = torch.randn(5, 30, 9 * BLOCK, 16, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([3, 0, 99, 1, 3], dtype=torch.int32)
    _, count, _, order = build((q, q, keep, 8 * BLOCK, BLOCK, BLOCK, BLOCK, 1.0))
    cost = count.flatten().tolist()
    assert order.tolist() == sorted(range(len(cost)), key=lambda i: (-cost[i], i))


def test_a_graph_follows_new_heads_and_new_keep() -> None:
    geometry = Heads(rows=3, heads=4, image=1000, text=77, head_dim=64, block=BLOCK)
    first = of_heads(0, geometry, (3, 99, 0), torch.bfloat16)
    static = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        build(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        lists = build(static)
    for seed, keep in ((1, (1, 4, 99)), (2, (99, 99, 99)), (3, (2, 0, 7))):
        changed = of_heads(seed, geometry, keep, torch.bfloat16)
        for target, source in zip(static[:3], changed[:3], strict=True):
            target.copy_(source)
        for _ in range(2):  # the count of finished CTAs starts anew
            graph.replay()
            assert_same_lists(f"seed {seed}", lists, build(changed, "cpu"))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="one GPU"
)
def test_a_call_runs_where_its_tensors_are() -> None:
    (case, *_) = cases_of("build_block_lists")
    arguments = case.arguments(torch.bfloat16)
    with torch.cuda.device(0):
        lists = build(arguments, "cuda:1")
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in lists)
    assert_same_lists("second GPU", lists, build(arguments, "cpu"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_random_geometries_choose_as_on_the_cpu(data: st.DataObject, dtype: torch.dtype) -> None:
    tokens = data.draw(st.integers(1, 900))
    start = data.draw(st.integers(0, tokens))
    length = data.draw(st.integers(0, tokens - start))
    block = data.draw(st.sampled_from((32, 64, 128)))
    head_dim = data.draw(st.sampled_from((8, 24, 64, 72)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    q, k = (torch.randn(2, 2, tokens, head_dim, generator=g).to(dtype) for _ in range(2))
    if data.draw(st.booleans()):  # few values: ties
        q, k = q.round().clamp(-1, 1), k.round().clamp(-1, 1)
    keep = torch.randint(-1, 12, (2,), generator=g).to(torch.int32)
    arguments = (
        q,
        k,
        keep,
        start,
        length,
        block,
        block,
        data.draw(st.sampled_from((0.3, -1.0, 0.0))),
    )
    assert_same_lists("random", build(arguments), build(arguments, "cpu"))

# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels against the reference, over all cases and dtypes: odd lengths, ragged keys, empty lists."""

from __future__ import annotations

import pytest
import torch
from attention_calls import check_attention, widen
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt import ops
from rapid3rt.ops import reference
from rapid3rt.testing.attention import Heads, packed_heads, random_lists
from rapid3rt.testing.cases import CASES, DTYPES, Case, cases_of, clone_arguments, result_tensors
from rapid3rt.testing.eager import eager
from rapid3rt.testing.numerics import assert_close, assert_same_bits

BITWISE = (
    "gather_rows",
    "scatter_rows",
    "cache_lookup",
    "cache_store",
    "gate_residual",
    "build_block_lists",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of(*BITWISE), ids=str)
def test_native_has_the_bits_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    native, expected = (
        clone_arguments(case.arguments(dtype)),
        clone_arguments(case.arguments(dtype)),
    )
    got = result_tensors(getattr(ops, case.op)(*native, backend="native"))
    want = result_tensors(getattr(ops, case.op)(*expected, backend="reference"))
    for position in case.writes:
        assert_same_bits(f"{case!s} argument {position}", native[position], expected[position])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if case.op == "cache_store":  # means are summed in another order
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
        else:
            assert_same_bits(f"{case!s} result {i}", a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("norm_modulate", "cache_lookup_norm"), ids=str)
def test_native_norms_are_as_exact_as_pytorch(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    got = getattr(ops, case.op)(*arguments, backend="native")
    truth = getattr(reference, case.op)(*widen(arguments))
    assert_close(str(case), got, eager(case, arguments)(), truth)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("block_sparse_attention"), ids=str)
def test_native_attention_is_as_exact_as_sdpa(case: Case, dtype: torch.dtype) -> None:
    check_attention(str(case), case.arguments(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("block_sparse_attention_"), ids=str)
def test_in_place_attention_leaves_skipped_heads_alone(case: Case, dtype: torch.dtype) -> None:
    for backend in ("native", "reference"):
        out, lse, *rest = clone_arguments(case.arguments(dtype))
        q, k, v, mode, *lists = rest
        ops.block_sparse_attention_(out, lse, *rest, backend=backend)
        skipped = mode == 2
        assert skipped.any()
        assert (out[skipped] == 7).all()
        assert (lse[skipped] == 7).all()
        full = mode.clone()
        full[skipped] = 0
        want, want_lse = ops.block_sparse_attention(q, k, v, full, *lists, True, backend=backend)
        assert_same_bits(f"{backend} out", out[~skipped], want[~skipped])
        assert_same_bits(f"{backend} lse", lse[~skipped], want_lse[~skipped])


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    image=st.integers(1, 150),
    text=st.integers(0, 40),
    density=st.sampled_from((0.0, 0.02, 0.3, 0.7, 1.0)),
    dtype=st.sampled_from(DTYPES),
)
def test_native_attention_on_random_lists(
    seed: int, image: int, text: int, density: float, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    geometry = Heads(rows=2, heads=2, image=image, text=text, head_dim=16, block=32)
    q, k, v = packed_heads(g, dtype, geometry)
    mode = torch.randint(0, 2, (2, 2), generator=g).to(torch.uint8)
    lists = random_lists(g, geometry, density)
    check_attention(f"seed {seed}", (q, k, v, mode, *lists, None, 32, 32, 0.25, True))


def test_queries_and_keys_may_differ_in_number() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 64, generator=g) for n in (70, 130, 130))
    mode = torch.ones(2, 2, dtype=torch.uint8)
    index = torch.tensor([[0, 4], [1, 3], [2, 0]], dtype=torch.int32).expand(2, 2, 3, 2)
    count = torch.tensor([2, 2, 1], dtype=torch.int32).expand(2, 2, 3)
    arguments = (q, k, v, mode, count, index, None, None, 32, 32, 0.125)
    assert count.stride()[:2] == (0, 0)  # lists shared by all heads need no copy
    check_attention("Nq != Nk", (*arguments, True))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_rows_give_empty_results(backend: str) -> None:
    q = torch.empty(0, 2, 64, 64)
    keep = torch.empty(0, dtype=torch.int32)
    lists = ops.build_block_lists(q, q, keep, 32, 32, 32, 32, 1.0, backend=backend)
    out, lse = ops.block_sparse_attention(q, q, q, *lists, None, 32, 32, 1.0, True, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == (0, 2, 64)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_tokens_give_lists_of_dense_heads(backend: str) -> None:
    q, keep = torch.empty(2, 3, 0, 64), torch.ones(2, dtype=torch.int32)
    junk = [torch.full((2, 3), 77, dtype=torch.uint8) for _ in range(50)]
    del junk  # what new memory may hold
    lists = ops.build_block_lists(q, q, keep, 0, 0, 64, 64, 1.0, backend=backend)
    assert not lists[0].any()
    out, _ = ops.block_sparse_attention(q, q, q, *lists, None, 64, 64, 1.0, backend=backend)
    assert out.shape == q.shape


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_lists_without_room_give_zero_and_minus_infinity(backend: str) -> None:
    q = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(0))
    mode, count = torch.ones(1, 2, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.int32)
    lists = (mode, count, torch.empty(1, 2, 2, 0, dtype=torch.int32), None, None)
    out, lse = ops.block_sparse_attention(q, q, q, *lists, 32, 32, 1.0, True, backend=backend)
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", [case for case in CASES if case.writes], ids=str)
def test_autograd_hears_of_what_is_written_in_place(case: Case, backend: str) -> None:
    arguments = clone_arguments(case.arguments(torch.float32))
    written = [arguments[i] for i in case.writes]
    before = [t._version for t in written]
    getattr(ops, case.op)(*arguments, backend=backend)
    if written[0].numel():
        assert all(t._version > version for t, version in zip(written, before, strict=True))


def test_half_precision_conversion_is_exact_for_every_value() -> None:
    """All 65536 bit patterns of both formats, and float32 values around every rounding boundary."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = patterns.view(dtype)[None, :, None].contiguous()
        one = torch.ones(1, 1, dtype=dtype)
        zero = torch.zeros_like(x)
        got = ops.gate_residual(zero, one, x, backend="native")
        want = zero + x
        finite = ~want.isnan()
        assert torch.equal(got.isnan(), want.isnan())
        assert_same_bits(str(dtype), got[finite], want[finite])
        wide = x.float().flatten()
        wide = wide[wide.isfinite()].sort().values
        between = (wide[1:].double() + wide[:-1].double()) / 2
        # A bfloat16 pair sums to the value; rounding of the sum is what is tested.
        halves = between.float().to(dtype)
        rest = (between.float() - halves.float()).to(dtype)
        a, b = halves[None, :, None].contiguous(), rest[None, :, None].contiguous()
        exact = (a.float() + b.float()).to(dtype)
        assert torch.equal(ops.gate_residual(a, one, b, backend="native"), exact)


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == {name for name in ops.__all__ if hasattr(reference, name)}

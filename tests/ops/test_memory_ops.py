# SPDX-License-Identifier: Apache-2.0
"""The memory-bound ops bit for bit: on every instruction set, at odd widths, at any address, beyond the caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_attention_units as units
import torch
from attention_calls import ISAS, forced
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid3rt import ops
from rapid3rt.testing.cases import DTYPES, Case, cases_of, clone_arguments, result_tensors
from rapid3rt.testing.numerics import assert_same_bits, poison_

OPS = (
    "gather_rows",
    "scatter_rows",
    "cache_lookup",
    "cache_lookup_norm",
    "cache_store",
    "norm_modulate",
    "gate_residual",
)
WIDTHS = (1, 3, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 203, 1023, 1030)
BEYOND_CACHES = (1, 2560, 4096)  # 42 MB of float32


def call(op: str, arguments: tuple[Any, ...], backend: str = "native") -> tuple[torch.Tensor, ...]:
    """What a call returns and what it leaves in its arguments."""
    copies = clone_arguments(arguments)
    results = result_tensors(getattr(ops, op)(*copies, backend=backend))
    return (*results, *(a for a in copies if isinstance(a, torch.Tensor)))


def assert_same_call(what: str, got: tuple[Any, ...], want: tuple[Any, ...]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(f"{what} tensor {i}", a, b)


def moved(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy one element beyond an aligned address, between poisoned neighbours."""
    room = poison_(torch.empty(x.numel() + 65, dtype=x.dtype))
    room[1 : 1 + x.numel()] = x.flatten()
    return room[1 : 1 + x.numel()].view(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of(*OPS), ids=str)
def test_every_isa_gives_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    want = call(case.op, arguments)
    for isa in ISAS:
        with forced(isa):
            assert_same_call(f"{isa} {case}", call(case.op, arguments), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_width_has_the_bits_of_the_reference(isa: str, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        g = torch.Generator().manual_seed(width)
        x, y = (torch.randn(2, 3, width, generator=g).to(dtype) for _ in range(2))
        slots = torch.randn(3, 3, 3, width, generator=g).to(dtype)
        slot = torch.tensor([2, 0], dtype=torch.int32)
        coef, gap = torch.randn(2, 3, generator=g), torch.tensor([0.0, 0.25])
        with forced(isa):
            for op, arguments in (
                ("cache_lookup", (x, slots, slot, coef)),
                ("gate_residual", (x, y[:, 0].contiguous(), y)),
            ):
                what = f"{isa} {op} width {width}"
                assert_same_call(what, call(op, arguments), call(op, arguments, "reference"))
            got, want = (
                call("cache_store", (slots, x, y, slot, gap), b) for b in ("native", "reference")
            )
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=2e-6)
        assert_same_call(f"{isa} store width {width}", got[1:], want[1:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in cases_of(*OPS) if not c.bench], ids=str)
def test_addresses_need_no_alignment(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    shifted = tuple(moved(a) if isinstance(a, torch.Tensor) else a for a in arguments)
    results = result_tensors(getattr(ops, case.op)(*shifted, backend="native"))
    written = [shifted[i] for i in case.writes]
    want = call(case.op, arguments)
    assert_same_call(str(case), results, want[: len(results)])
    for i, t in zip(case.writes, written, strict=True):
        assert_same_bits(f"{case} argument {i}", t, want[len(results) + i])
        room = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        neighbours = torch.cat((room[:1], room[1 + t.numel() :]))
        assert neighbours.isnan().all(), "bytes beside the tensor were written"


@pytest.mark.parametrize("isa", ISAS)
def test_every_value_of_both_half_formats_survives(isa: str) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = patterns.view(dtype)[None, None]
        one, zero = torch.ones(1, x.shape[-1], dtype=dtype), torch.zeros_like(x)
        with forced(isa):
            got = ops.gate_residual(zero, one, x, backend="native")
        want = zero + x
        assert torch.equal(got.isnan(), want.isnan())
        assert_same_bits(f"{isa} {dtype}", got[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("isa", ISAS)
def test_ties_are_rounded_to_even(isa: str) -> None:
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        base = torch.arange(2 ** (bits - 1), 2**bits, dtype=torch.float32).to(dtype)[None, None]
        half = torch.full_like(base, 0.5)
        gate = torch.ones(1, base.shape[-1], dtype=dtype)
        with forced(isa):
            got = ops.gate_residual(base, gate, half, backend="native")
        assert_same_bits(f"{isa} {dtype}", got, (base.float() + 0.5).to(dtype))
        assert not (got.float() % 2 == 1).logical_and(base.float() % 2 == 0).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rms", [False, True])
def test_a_broken_token_stays_alone(isa: str, rms: bool) -> None:
    x = torch.randn(1, 4, 83)
    x[0, 1, 82], x[0, 3, 0] = torch.nan, torch.inf
    scale, shift = torch.randn(1, 83), torch.randn(1, 83)
    with forced(isa):
        got = ops.norm_modulate(x, scale, shift, None, None, 1e-6, rms, backend="native")
        fine = ops.norm_modulate(x[:, ::2], scale, shift, None, None, 1e-6, rms, backend="native")
    assert got[0, 1].isnan().all()
    assert got[0, 3].isnan().any()
    assert_same_bits("neighbours", got[:, ::2].contiguous(), fine)


def test_a_small_spread_about_a_large_mean_is_seen() -> None:
    g = torch.Generator().manual_seed(0)
    residual = 1000 + 0.01 * torch.randn(1, 64, 512, generator=g)
    slots, slot = torch.empty(1, 1, 64, 512), torch.zeros(1, dtype=torch.int32)
    stats = ops.cache_store(slots, residual, torch.zeros_like(residual), slot, torch.zeros(1))
    truth = residual.double()
    torch.testing.assert_close(float(stats[0, 1]), float(truth.mean()), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        float(stats[0, 2]), float(truth.std(correction=0)), rtol=1e-3, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_stores_past_the_caches_write_the_same_bits(isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(BEYOND_CACHES, generator=g) for _ in range(2))
    slot, per_row = torch.zeros(1, dtype=torch.int32), torch.randn(1, 4096, generator=g)
    first = torch.zeros(1)
    with forced(isa):
        got = ops.cache_lookup(x, y[None], slot, torch.ones(1, 1), backend="native")
        assert_same_bits("lookup", got, x + y)
        got = ops.gate_residual(x, per_row, y, backend="native")
        assert_same_bits("gate", got, x + per_row[:, None] * y)
        slots = poison_(torch.empty(1, 1, *BEYOND_CACHES[1:]))
        ops.cache_store(slots, x, y, slot, first, backend="native")
        assert_same_bits("store", slots[0], x - y)
        # A tenth of the tokens stays in the caches.
        whole, part = (
            ops.norm_modulate(t, per_row, per_row, None, None, 1e-6, False, backend="native")
            for t in (x, x[:, ::10].contiguous())
        )
        assert_same_bits("norm", whole[:, ::10].contiguous(), part)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row_bytes", [21_000_000, 20_999_973])
def test_rows_beyond_the_caches_are_copied_whole(isa: str, row_bytes: int) -> None:
    x = torch.arange(3 * row_bytes, dtype=torch.int32).to(torch.uint8).view(3, row_bytes)
    rows = torch.tensor([2, 0], dtype=torch.int32)
    out = torch.full((3 * row_bytes + 1,), 7, dtype=torch.uint8)[1:].view(3, row_bytes)
    with forced(isa):
        got = ops.gather_rows(x, rows, backend="native")
        ops.scatter_rows(out, got, rows, backend="native")
    assert torch.equal(got, x[[2, 0]])
    assert torch.equal(out[[2, 0]], x[[2, 0]])
    assert (out[1] == 7).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    width=st.integers(1, 300),
    orders=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
)
def test_lookups_and_stores_of_random_shapes(
    seed: int, tokens: int, width: int, orders: int, dtype: torch.dtype, isa: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    embedded, out = (torch.randn(2, tokens, width, generator=g).to(dtype) for _ in range(2))
    slots = torch.randn(3, orders, tokens, width, generator=g).to(dtype)
    slot = torch.randperm(3, generator=g)[:2].to(torch.int32)
    coef = torch.randn(2, orders, generator=g) * (torch.rand(2, orders, generator=g) < 0.7)
    gap = torch.rand(2, generator=g).round(decimals=1)
    with forced(isa):
        for op, arguments in (
            ("cache_lookup", (embedded, slots, slot, coef)),
            ("cache_store", (slots, out, embedded, slot, gap)),
        ):
            got, want = call(op, arguments), call(op, arguments, "reference")
            assert_same_call(f"{op} seed {seed}", got[1:], want[1:])
            if op == "cache_lookup":
                assert_same_bits(f"{op} seed {seed}", got[0], want[0])
            else:
                torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_row_units_share_nothing_with_the_base_build(isa: str, tmp_path: Path) -> None:
    unit = units.ROOT / "csrc" / "cpu" / "rowwise" / f"{isa}.cpp"
    system = {name for name in units.includes(unit) if name.startswith("<")}
    assert system == {"<immintrin.h>", "<stdint.h>"}
    units.test_an_object_shares_nothing_with_the_base_build(unit, tmp_path)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (4, 0)])
def test_statistics_of_no_values_are_zero(tokens: int, width: int, backend: str) -> None:
    x, slots = torch.zeros(2, tokens, width), torch.zeros(3, 2, tokens, width)
    slot, gap = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0.0, 0.5])
    assert torch.equal(ops.cache_store(slots, x, x, slot, gap, backend=backend), torch.zeros(2, 3))

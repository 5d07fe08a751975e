# SPDX-License-Identifier: Apache-2.0
"""Attention on every instruction set that this machine has: as exact as PyTorch, and close to each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_calls import ISAS, check_attention, forced

from rapid3rt import ops
from rapid3rt.ops import native
from rapid3rt.testing.attention import Heads, packed_heads, random_lists
from rapid3rt.testing.cases import DTYPES, Case, cases_of
from rapid3rt.testing.numerics import assert_same_bits

# Of values around 1: the vector units round in another order, and weights to bfloat16.
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LENGTHS = (1, 3, 63, 64, 65, 113, 127, 128, 129, 203, 239, 799, 1023)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of("block_sparse_attention"), ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_is_as_exact_as_sdpa(isa: str, case: Case, dtype: torch.dtype) -> None:
    with forced(isa):
        check_attention(f"{isa} {case}", case.arguments(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64, 72, 96, 128, 136])
@pytest.mark.parametrize("isa", ISAS)
def test_every_head_dim_is_exact(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(head_dim)
    geometry = Heads(rows=2, heads=2, image=150, text=20, head_dim=head_dim, block=64)
    q, k, v = packed_heads(g, dtype, geometry)
    mode = torch.tensor([[1, 0], [1, 1]], dtype=torch.uint8)
    lists = random_lists(g, geometry, 0.6)
    with forced(isa):
        check_attention(f"{isa}", (q, k, v, mode, *lists, None, 64, 64, head_dim**-0.5, True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("isa", ISAS)
def test_odd_lengths_are_exact(isa: str, block: int, dtype: torch.dtype) -> None:
    for tokens in LENGTHS if isa != "scalar" else LENGTHS[:-2]:
        g = torch.Generator().manual_seed(tokens)
        geometry = Heads(rows=1, heads=1, image=tokens, text=0, head_dim=64, block=block)
        q, k, v = packed_heads(g, dtype, geometry)
        mode = torch.ones(1, 1, dtype=torch.uint8)
        lists = random_lists(g, geometry, 0.5)
        with forced(isa):
            what = f"{isa} N {tokens}"
            check_attention(what, (q, k, v, mode, *lists, None, block, block, 0.125, True))


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "head_dim"), [(4096, 64), (4224, 128), (4429, 64), (4608, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_lengths_are_exact(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(tokens)
    geometry = Heads(rows=1, heads=1, image=tokens, text=0, head_dim=head_dim, block=128)
    q, k, v = packed_heads(g, dtype, geometry)
    lists = random_lists(g, geometry, 0.5)
    for value in (0, 1):
        mode = torch.full((1, 1), value, dtype=torch.uint8)
        check_attention(
            f"N {tokens}", (q, k, v, mode, *lists, None, 128, 128, head_dim**-0.5, True)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_the_isas_agree(head_dim: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    geometry = Heads(rows=2, heads=2, image=300, text=33, head_dim=head_dim, block=64)
    q, k, v = packed_heads(g, dtype, geometry)
    mode = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
    lists = random_lists(g, geometry, 0.5)
    kv_len = torch.tensor([333, 201], dtype=torch.int32)
    arguments = (q, k, v, mode, *lists, kv_len, 64, 64, head_dim**-0.5, True)
    results = {}
    for isa in ISAS:
        with forced(isa):
            results[isa] = ops.block_sparse_attention(*arguments, backend="native")
    want, want_lse = results["scalar"]
    for out, lse in results.values():
        torch.testing.assert_close(out, want, rtol=0, atol=CLOSE[dtype])
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(ISAS[-1] not in ("avx512_bf16", "amx"), reason="no dot products here")
def test_dot_products_run_where_they_are_the_faster_ones() -> None:
    """On Intel's processors floats are, wherever AMX cannot run."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("the maker of the processor is read from Linux")
    faster = "avx512" if "GenuineIntel" in cpuinfo.read_text() else "avx512_bf16"
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(1, 2, 70, 40, generator=g).bfloat16() for _ in range(3))  # 40: not AMX's
    arguments = (q, k, v, torch.zeros(1, 2, dtype=torch.uint8), *(None,) * 4, 64, 64, 0.16, True)
    results = {}
    for isa in (None, "avx512", "avx512_bf16"):
        with forced(isa):
            results[isa] = ops.block_sparse_attention(*arguments, backend="native")
            ran = native.kernel_isa("block_sparse_attention", torch.bfloat16, 40)
            assert ran == (isa or faster)
    for a, b in zip(results[None], results[faster], strict=True):
        assert_same_bits("the faster one", a, b)
    assert not torch.equal(results["avx512"][0], results["avx512_bf16"][0])


def test_a_kernel_is_called_by_the_set_that_it_is_for() -> None:
    for isa in ISAS:
        with forced(isa):
            of = {d: native.kernel_isa("block_sparse_attention", d, 64) for d in DTYPES}
            assert of[torch.bfloat16] == isa
            assert of[torch.float32] == of[torch.float16] == min(isa, "avx512", key=ISAS.index)
            assert native.kernel_isa("block_sparse_attention", torch.bfloat16, 7) == "scalar"
            assert native.kernel_isa("cache_store", torch.bfloat16) == isa.replace(
                "amx", "avx512_bf16"
            )


def test_the_scalar_exponential_is_as_exact_as_stated() -> None:
    """Beside a key of weight 1, one of e^x is all of the output from e^-17 down: 1 + e^x is 1."""
    x = torch.linspace(-87, -17, 30_001)
    q, k = torch.zeros(1, 1, len(x), 4), torch.zeros(1, 1, 2, 4)
    q[..., 0], k[:, :, 1] = x, 1.0
    mode = torch.zeros(1, 1, dtype=torch.uint8)
    with forced("scalar"):
        out, _ = ops.block_sparse_attention(
            q, k, k, mode, *(None,) * 4, 64, 64, 1.0, backend="native"
        )
    out = out[..., 0].flatten().double()
    true = x.double().exp()
    ulp = 2.0 ** (true.log2().floor() - 23)
    assert ((out - true).abs() / ulp).max() <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_huge_logits_choose_the_largest(isa: str, dtype: torch.dtype) -> None:
    """From 1e9 on a float is more than an exponent away from the next: weights are 0 or 1, never infinite."""
    g = torch.Generator().manual_seed(20)
    q, k, v = (torch.randn(1, 2, n, 64, generator=g).to(dtype) for n in (150, 600, 600))
    k[:, :, :, :] *= torch.linspace(0.5, 2, 600, dtype=dtype)[:, None]  # maxima rise over chunks
    mode = torch.zeros(1, 2, dtype=torch.uint8)
    logits = q.double() @ k.double().mT
    top = logits.topk(2)
    sure = top.values[..., 0] - top.values[..., 1] > 1e-4 * top.values[..., 0].abs()
    assert sure.float().mean() > 0.95
    want = v.gather(2, top.indices[..., :1].expand(-1, -1, -1, 64))
    for gain in (1e7, 1e9, 1e10, 1e20, 1e34):
        with forced(isa):
            arguments = (q, k, v, mode, *(None,) * 4, 64, 64, gain, True)
            out, lse = ops.block_sparse_attention(*arguments, backend="native")
        tolerance = 2 * torch.finfo(dtype).eps  # a base may lag behind, and weights be rounded
        torch.testing.assert_close(out[sure], want[sure], rtol=tolerance, atol=0)
        torch.testing.assert_close(
            lse.double(), logits.max(3).values * gain, rtol=1e-5, atol=0, check_dtype=False
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_logits_that_rise_over_chunks_are_exact(isa: str, dtype: torch.dtype) -> None:
    """What was summed decays whenever a later chunk raises the base."""
    g = torch.Generator().manual_seed(21)
    q, k, v = (torch.randn(1, 2, n, 64, generator=g) for n in (70, 1000, 1000))
    k = k * torch.linspace(1, 30, 1000)[:, None]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    mode = torch.zeros(1, 2, dtype=torch.uint8)
    with forced(isa):
        check_attention(f"{isa} rising", (q, k, v, mode, *(None,) * 4, 64, 64, 0.125, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_negative_scale_and_a_zero_scale_are_exact(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 70, 64, generator=g).to(dtype) for _ in range(3))
    mode = torch.zeros(1, 2, dtype=torch.uint8)
    for scale in (-0.3, 0.0):
        with forced(isa):
            what = f"{isa} scale {scale}"
            check_attention(what, (q, k, v, mode, None, None, None, None, 64, 64, scale, True))


@pytest.mark.parametrize("stride", [-64, 66])
@pytest.mark.parametrize("name", ["out", "q", "k", "v"])
def test_strides_that_no_kernel_may_see_are_refused(name: str, stride: int) -> None:
    """PyTorch has no negative strides; the compiled module refuses them by itself."""
    q = torch.zeros(1, 1, 64, 64)
    mode = torch.zeros(1, 1, dtype=torch.uint8)
    strides = dict.fromkeys(("out", "q", "k", "v"), (4096, 4096, 64))
    strides[name] = (4096, 4096, stride)
    sizes = (1, 1, 64, 64, 64)
    with pytest.raises(
        ValueError, match=rf"{name} must have strides .* not negative, got {stride}"
    ):
        native._cpu.block_sparse_attention(
            q.data_ptr(), 0, q.data_ptr(), q.data_ptr(), q.data_ptr(), mode.data_ptr(), 0, 0, 0, 0,
            *strides.values(), (0, 0, 0), (0, 0), sizes, 64, 64, 0, 1.0, False, 0, 1,
        )  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""The flex backend on a GPU: numerics over odd sizes, poisoned paddings, replayed graphs, no waiting, a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_calls import masked_sdpa, widen
from sparse_pipeline import sample

from rapid3rt import ops
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import flex, reference
from rapid3rt.testing.attention import Heads, packed_heads, random_lists
from rapid3rt.testing.cases import DTYPES, Case, cases_of
from rapid3rt.testing.numerics import assert_close, assert_same_bits, poison_

pytestmark = pytest.mark.cuda

Arguments = tuple[Any, ...]
HALF = (torch.bfloat16, torch.float16)
# Blocks of 32 are for the CPU.
SERVED = [case for case in cases_of("block_sparse_attention") if "block 32" not in str(case)]
GEOMETRIES = [
    *(Heads(rows=2, heads=3, image=n, text=n // 5, head_dim=64, block=64) for n in (1, 3, 63, 65)),
    *(Heads(rows=2, heads=2, image=n, text=41, head_dim=128, block=128) for n in (86, 87, 700)),
    Heads(rows=3, heads=2, image=640, text=0, head_dim=64, block=128),
    Heads(rows=1, heads=2, image=190, text=77, head_dim=40, block=64),
    Heads(rows=1, heads=2, image=300, text=77, head_dim=128, block=64),
]


def make(geometry: Heads, dtype: torch.dtype, *, ragged: bool = False, seed: int = 0) -> Arguments:
    """A call with dense and listed heads, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = packed_heads(g, dtype, geometry)
    mode = (torch.arange(geometry.rows * geometry.heads) % 3 != 2).to(torch.uint8)
    lists = random_lists(g, geometry, 0.4)
    kv_len = None
    if ragged:
        kv_len = torch.randint(0, geometry.tokens + 1, (geometry.rows,), generator=g).to(
            torch.int32
        )
    mode = mode.view(geometry.rows, geometry.heads)
    block, scale = geometry.block, geometry.head_dim**-0.5
    return q, k, v, mode, *lists, kv_len, block, block, scale, True


def to_gpu(arguments: Arguments) -> Arguments:
    """The same call there, layouts kept: q, k and v are views of one packed tensor."""
    packed = torch.stack(arguments[:3]).permute(1, 3, 0, 2, 4).contiguous().cuda()
    heads = packed.permute(2, 0, 3, 1, 4)
    rest = (a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments[3:])
    return (*heads, *rest)


def attend(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.block_sparse_attention(*arguments, backend="flex")


def check(what: str, arguments: Arguments) -> None:
    """Twice the error of SDPA in the same dtype, and the same bits again."""
    out, lse = attend(to_gpu(arguments))
    assert out.transpose(1, 2).is_contiguous()
    truth, truth_lse = reference.block_sparse_attention(*widen(arguments))
    if out.dtype in HALF:
        assert_close(what, out.cpu(), masked_sdpa(arguments), truth)
    else:
        torch.testing.assert_close(out.cpu().double(), truth, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.cpu().double(), truth_lse, rtol=1e-5, atol=2e-5)
    for a, b in zip(attend(to_gpu(arguments)), (out, lse), strict=True):
        assert_same_bits(f"{what}, again", a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_cases_of_all_backends(case: Case, dtype: torch.dtype) -> None:
    check(str(case), (*case.arguments(dtype)[:-1], True))


# In float32 a shape takes four times as long to compile.
ODD = [
    (g, dtype) for g in GEOMETRIES for dtype in DTYPES if dtype in HALF or g in GEOMETRIES[2:5:2]
]


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("geometry", "dtype"), ODD, ids=str)
def test_odd_sizes(geometry: Heads, dtype: torch.dtype, ragged: bool) -> None:
    check(str(geometry), make(geometry, dtype, ragged=ragged))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_keys_beyond_the_length_and_unlisted_blocks_are_not_read(dtype: torch.dtype) -> None:
    geometry = Heads(rows=2, heads=2, image=300, text=20, head_dim=64, block=64)
    clean = make(geometry, dtype)
    q, k, v, mode, count, index, order, _, *rest = clean
    mode = torch.ones_like(mode)
    seen = torch.arange(5).expand(2, 2, 5, 5)
    index, count = torch.where(seen < 3, seen, 2**31 - 1).int(), torch.full_like(count, 3)
    kv_len = torch.tensor([150, 192], dtype=torch.int32)
    call = (q, k, v, mode, count, index, order, kv_len, *rest)
    want = attend(to_gpu(call))
    for x in (k, v):
        poison_(x[0, :, 150:])
        poison_(x[1, :, 192:])
    for a, b in zip(attend(to_gpu(call)), want, strict=True):
        assert_same_bits("poisoned", a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_skipped_heads_keep_their_bytes(dtype: torch.dtype) -> None:
    call = make(GEOMETRIES[5], dtype)[:-1]
    call[3][0, 0] = 2
    q, *rest = to_gpu((*call, True))[:-1]
    out, lse = poison_(torch.empty_like(q)), poison_(torch.empty(q.shape[:3], device="cuda"))
    ops.block_sparse_attention_(out, lse, q, *rest, backend="flex")
    expected = torch.zeros(q.shape), torch.zeros(q.shape[:3])
    reference.block_sparse_attention_(*expected, *(x.float() for x in call[:3]), *call[3:])
    skipped = call[3] == 2
    for got, want in zip((out.cpu(), lse.cpu()), expected, strict=True):
        assert got[skipped].isnan().all()
        torch.testing.assert_close(got[~skipped].float(), want[~skipped], rtol=2e-2, atol=2e-2)


def test_lists_change_without_compiling_waiting_or_leaving_a_replayed_graph() -> None:
    calls = [to_gpu(make(GEOMETRIES[7], torch.bfloat16, seed=seed)) for seed in range(3)]
    wanted = [attend(call) for call in calls]
    compiles = flex.shapes.compiles
    held = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in calls[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attend(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attend(held)
    for call, want in zip(calls, wanted, strict=True):
        for kept, new in zip(held, call, strict=True):
            if isinstance(kept, torch.Tensor):
                kept.copy_(new)
        graph.replay()
        for a, b in zip(result, want, strict=True):
            assert_same_bits("replayed", a.cpu(), b.cpu())
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(calls[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Clones of packed views have strides of their own: one more shape, no recompile.
    assert flex.shapes.compiles - compiles <= 1


@pytest.mark.slow
def test_an_outer_graph_sees_the_lists() -> None:
    call = to_gpu(make(GEOMETRIES[7], torch.bfloat16))

    def twice(*arguments: Any) -> torch.Tensor:
        return 2 * ops.block_sparse_attention(*arguments, backend="flex")[0]

    with torch.no_grad():
        got = torch.compile(twice, fullgraph=True)(*call)
    torch.testing.assert_close(got, 2 * attend(call)[0])


def test_blocks_of_32_are_refused() -> None:
    call = make(Heads(rows=1, heads=1, image=64, text=0, head_dim=64, block=32), torch.bfloat16)
    with pytest.raises(UnsupportedError, match="blocks of 64 or 128"):
        attend(to_gpu(call))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_pipeline_gives_the_images_of_the_reference(kind: str, attention: str) -> None:
    got, want = (sample(kind, attention, backend, "cuda") for backend in ("flex", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

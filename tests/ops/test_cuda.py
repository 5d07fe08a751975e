# SPDX-License-Identifier: Apache-2.0
"""The native backend on a GPU: schemas, streams, devices, CUDA graphs with new lists, and what must be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rapid3rt import ops
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import cuda, library
from rapid3rt.testing.attention import Heads, packed_heads, random_lists
from rapid3rt.testing.cases import CASES, Case, cases_of, result_tensors
from rapid3rt.testing.numerics import assert_same_bits

pytestmark = pytest.mark.cuda

GEOMETRY = Heads(rows=2, heads=3, image=500, text=77, head_dim=64, block=64)
ATTENTION = ("block_sparse_attention", "block_sparse_attention_")


def served(case: Case) -> bool:
    """Whether the kernels have this case in bfloat16."""
    if case.op not in ATTENTION:
        return True
    arguments = case.arguments(torch.bfloat16)
    q = arguments[0]
    block = next(a for a in arguments if isinstance(a, int))
    return q.shape[-1] in (64, 128) and block in (64, 128)


SERVED = [case for case in CASES if not case.bench and case.flops + case.values and served(case)]
FIRST = [next(case for case in SERVED if case.op == op) for op in library.SCHEMAS]
several_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="one GPU"
)


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def on(device: str | torch.device, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)


def call(case: Case, device: str = "cuda", backend: str = "native") -> list[torch.Tensor]:
    """What a call on fresh inputs returns and writes."""
    arguments = on(device, case.arguments(torch.bfloat16))
    results = result_tensors(getattr(ops, case.op)(*arguments, backend=backend))
    return [*results, *(arguments[i] for i in case.writes)]


def attention_arguments(seed: int, density: float) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = packed_heads(g, torch.bfloat16, GEOMETRY)
    mode = torch.randint(0, 2, (2, 3), generator=g).to(torch.uint8)
    lists = random_lists(g, GEOMETRY, density)
    return on("cuda", (q, k, v, mode, *lists, None, 64, 64, 0.125, True))


def test_the_kernels_serve_this_gpu() -> None:
    assert cuda.missing_reason() is None
    assert cuda.info()["available"]


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_fakes_and_schemas_tell_the_truth(case: Case) -> None:
    arguments = on("cuda", case.arguments(torch.bfloat16))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(library, case.op), arguments, test_utils=checks)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_opcheck_passes_in_full(case: Case) -> None:
    arguments = on("cuda", case.arguments(torch.bfloat16))
    torch.library.opcheck(getattr(library, case.op), arguments)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_call_waits_for_what_its_stream_does_and_for_nothing_else(case: Case) -> None:
    """The inputs are written late, on the call's own stream; the results are read there too."""
    want = call(case)
    arguments = case.arguments(torch.bfloat16)
    blank = tuple(
        torch.zeros_like(a, device="cuda") if isinstance(a, torch.Tensor) else a for a in arguments
    )
    pinned = [a.pin_memory() if isinstance(a, torch.Tensor) else a for a in arguments]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(blank, pinned, strict=True):
            if isinstance(source, torch.Tensor):
                target.copy_(source, non_blocking=True)
        results = result_tensors(getattr(ops, case.op)(*blank, backend="native"))
    stream.synchronize()
    for i, (a, b) in enumerate(
        zip([*results, *(blank[i] for i in case.writes)], want, strict=True)
    ):
        assert_same_bits(f"{case!s} tensor {i}", a, b)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_no_call_makes_the_host_wait(case: Case) -> None:
    arguments = on("cuda", case.arguments(torch.bfloat16))
    op = getattr(ops, case.op)
    op(*arguments, backend="native")
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*arguments, backend="native")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attention_in_a_graph_follows_new_lists() -> None:
    arguments = attention_arguments(0, 0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.block_sparse_attention(*arguments, backend="native")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = ops.block_sparse_attention(*arguments, backend="native")
    for seed, density in ((1, 0.1), (2, 1.0), (3, 0.5)):
        changed = attention_arguments(seed, density)
        for target, source in zip(arguments, changed, strict=True):
            if isinstance(source, torch.Tensor):
                target.copy_(source)
        for _ in range(2):  # the work counter starts anew each time
            graph.replay()
            want, want_lse = ops.block_sparse_attention(*changed, backend="native")
            assert_same_bits(f"out {seed}", out, want)
            assert_same_bits(f"lse {seed}", lse, want_lse)


def test_lists_and_attention_in_one_graph_follow_new_queries() -> None:
    keep = torch.tensor([2, 5], dtype=torch.int32, device="cuda")
    text = (GEOMETRY.image, GEOMETRY.text)

    def path(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        lists = ops.build_block_lists(q, k, keep, *text, 64, 64, 0.125, backend="native")
        out, _ = ops.block_sparse_attention(q, k, v, *lists, None, 64, 64, 0.125, backend="native")
        return out

    heads = [
        packed_heads(torch.Generator().manual_seed(seed), torch.bfloat16, GEOMETRY)
        for seed in range(3)
    ]
    first = on("cuda", heads[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        path(*first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = path(*first)
    for changed in heads[1:]:
        for target, source in zip(first, changed, strict=True):
            target.copy_(source)
        graph.replay()
        assert_same_bits("out", out, path(*on("cuda", changed)))


@pytest.mark.parametrize("case", cases_of("cache_store")[:2], ids=str)
def test_a_store_in_a_graph_sums_anew_each_time(case: Case) -> None:
    arguments = on("cuda", case.arguments(torch.bfloat16))
    fresh = arguments[0].clone()
    want = call(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.cache_store(*arguments, backend="native")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        stats = ops.cache_store(*arguments, backend="native")
    for _ in range(3):
        arguments[0].copy_(fresh)
        graph.replay()
        assert_same_bits("stats", stats, want[0])
        assert_same_bits("slots", arguments[0], want[1])


def test_what_the_kernels_cannot_take_is_refused() -> None:
    q, k, v, mode, *lists = attention_arguments(0, 0.5)
    with pytest.raises((ValueError, UnsupportedError), match="float32"):
        ops.block_sparse_attention(q.float(), k.float(), v.float(), mode, *lists, backend="native")
    narrow = (t[..., :40].contiguous() for t in (q, k, v))
    with pytest.raises((ValueError, UnsupportedError), match="40"):
        ops.block_sparse_attention(*narrow, mode, *lists, backend="native")
    room = torch.empty(q.numel() + 1, dtype=q.dtype, device="cuda")
    misaligned = room[1:].view(q.shape)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        ops.block_sparse_attention(misaligned, k, v, mode, *lists, backend="native")


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_tensors_of_two_devices_are_refused(devices: tuple[str, str]) -> None:
    x = torch.ones(4, 4, device=devices[0])
    rows = torch.zeros(2, dtype=torch.int32, device=devices[1])
    with pytest.raises(ValueError, match="rows must be on device"):
        ops.gather_rows(x, rows, backend="native")
    with pytest.raises(ValueError, match="gather_rows must have all tensors on one device"):
        library.gather_rows(x, rows)


def test_a_wrong_call_leaves_the_device_usable() -> None:
    with pytest.raises(ValueError, match="one device"):
        library.gather_rows(torch.ones(4, 4, device="cuda"), torch.zeros(2, dtype=torch.int32))
    for case in FIRST[:3]:
        call(case)
    torch.cuda.synchronize()


@several_gpus
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_call_runs_on_its_tensors_device(case: Case) -> None:
    want = call(case, "cuda:0")
    torch.cuda.set_device(0)
    got = call(case, "cuda:1")
    assert torch.cuda.current_device() == 0
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.device.index == 1
        assert_same_bits(f"{case!s} tensor {i}", a.to("cuda:0"), b)

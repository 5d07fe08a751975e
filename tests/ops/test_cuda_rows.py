# SPDX-License-Identifier: Apache-2.0
"""The memory-bound ops on a GPU: the bits of the reference, whatever width, address, neighbours or repetition.

All memory that an op allocates is poisoned first, by `poisoned_memory`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_calls import widen

from rapid3rt import ops
from rapid3rt.ops import reference
from rapid3rt.testing.cases import DTYPES, Case, cases_of, clone_arguments, result_tensors
from rapid3rt.testing.eager import eager
from rapid3rt.testing.numerics import assert_close, assert_same_bits, poison_

pytestmark = pytest.mark.cuda

NORMS = ("norm_modulate", "cache_lookup_norm")
BITWISE = ("gather_rows", "scatter_rows", "cache_lookup", "cache_store", "gate_residual")
WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 128, 203, 256, 1030, 1536, 3072)
# More vectors than threads, and more than registers hold.
WIDE = (2056, 4104, 8200, 16384, 16400, 20003)
CASES = cases_of(*BITWISE, *NORMS)
several_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="one GPU"
)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """New tensors, results and workspace among them, hold NaN, integers their largest value."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.no_grad():
        yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def on(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fresh copies on a device."""
    return tuple(a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments)


def call(
    op: str, arguments: tuple[Any, ...], writes: tuple[int, ...] = (), backend: str = "native"
) -> list[torch.Tensor]:
    """What a call returns, and what it writes into its arguments."""
    results = result_tensors(getattr(ops, op)(*arguments, backend=backend))
    return [*results, *(arguments[i] for i in writes)]


def call_case(case: Case, dtype: torch.dtype, device: str = "cuda") -> list[torch.Tensor]:
    return call(case.op, on(device, case.arguments(dtype)), case.writes)


def assert_same(what: str, got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """The same bits; NaN of any payload, since processors differ in it."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = a.cpu(), b.cpu()
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan()), f"{what} tensor {i}: NaN elsewhere"
            a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
        assert_same_bits(f"{what} tensor {i}", a, b)


def moved(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy one element beyond an aligned address, between poisoned neighbours."""
    room = poison_(torch.empty(x.numel() + 65, dtype=x.dtype, device=x.device))
    room[1 : 1 + x.numel()] = x.flatten()
    return room[1 : 1 + x.numel()].view(x.shape)


def cache_arguments(
    seed: int, dtype: torch.dtype, tokens: int = 5, width: int = 96, rows: int = 4
) -> dict[str, tuple[Any, ...]]:
    """Calls of the ops on `rows` rows, by op; slots of two more."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, tokens, width, generator=g).to(dtype) for _ in range(2))
    slots = torch.randn(rows + 2, 3, tokens, width, generator=g).to(dtype)
    slot = torch.randperm(rows + 2, generator=g)[:rows].to(torch.int32)
    coef, gap = torch.randn(rows, 3, generator=g), torch.rand(rows, generator=g)
    coef[0, 1], gap[::3] = 0.0, 0.0
    scale, shift = (torch.randn(rows, width, generator=g).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=g).to(dtype)
    return {
        "gather_rows": (slots, slot),
        "scatter_rows": (slots, slots[:rows].flip(0).contiguous(), slot),
        "cache_lookup": (x, slots, slot, coef),
        "cache_lookup_norm": (x, slots, slot, coef, scale, shift, 1e-6),
        "cache_store": (slots, y, x, slot, gap),
        "norm_modulate": (x, scale, shift, weight, weight, 1e-6, False),
        "gate_residual": (x, scale, y),
    }


WRITES = {"scatter_rows": (0,), "cache_store": (0,)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of(*BITWISE), ids=str)
def test_kernels_have_the_bits_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    got = call_case(case, dtype)
    arguments = case.arguments(dtype)
    want = call(case.op, arguments, case.writes, "reference")
    if case.op == "cache_store":  # sums of another order
        torch.testing.assert_close(got[0].cpu(), want[0], rtol=2e-6, atol=2e-6)
        got, want = got[1:], want[1:]
    assert_same(str(case), got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases_of(*NORMS), ids=str)
def test_norms_are_as_exact_as_pytorch(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    (got,) = call_case(case, dtype)
    truth = getattr(reference, case.op)(*widen(arguments))
    rival = eager(case, on("cuda", arguments))()
    assert_close(str(case), got.cpu(), rival.cpu(), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, *WIDE])
def test_every_width_is_right(width: int, dtype: torch.dtype) -> None:
    for op, arguments in cache_arguments(width, dtype, 3, width).items():
        got = call(op, on("cuda", arguments), WRITES.get(op, ()))
        if op in NORMS:
            truth = getattr(reference, op)(*widen(arguments))
            (rival,) = call(op, arguments, (), "reference")
            assert_close(f"{op} width {width}", got[0].cpu(), rival, truth)
            continue
        want = call(op, on("cpu", arguments), WRITES.get(op, ()), "reference")
        if op == "cache_store":
            torch.testing.assert_close(got[0].cpu(), want[0], rtol=2e-6, atol=2e-6)
            got, want = got[1:], want[1:]
        assert_same(f"{op} width {width}", got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_address_changes_no_bit_and_no_neighbour(case: Case, dtype: torch.dtype) -> None:
    want = call_case(case, dtype)
    arguments = on("cuda", case.arguments(dtype))
    shifted = tuple(moved(a) if isinstance(a, torch.Tensor) else a for a in arguments)
    assert_same(str(case), call(case.op, shifted, case.writes), want)
    for i in case.writes:
        room = torch.empty(0, dtype=dtype, device="cuda").set_(shifted[i].untyped_storage())
        beside = torch.cat((room[:1], room[1 + shifted[i].numel() :]))
        assert beside.isnan().all(), "bytes beside the tensor were written"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_of_any_layout_are_read_right(case: Case) -> None:
    arguments = on("cuda", case.arguments(torch.bfloat16))
    want = call(case.op, clone_arguments(arguments), case.writes)
    strided = tuple(
        torch.stack((a, a), -1)[..., 0] if isinstance(a, torch.Tensor) else a for a in arguments
    )
    for i in case.writes:
        strided = (*strided[:i], arguments[i], *strided[i + 1 :])
    assert_same(str(case), call(case.op, strided, case.writes), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hundred_repeats_have_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    arguments = on("cuda", case.arguments(dtype))
    want = call(case.op, clone_arguments(arguments), case.writes)
    for _ in range(100):
        got = call(case.op, clone_arguments(arguments), case.writes)
        different = [
            not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            for a, b in zip(got, want, strict=True)
        ]
        assert not any(different), str(case)


@pytest.mark.parametrize(
    "op", ["cache_lookup", "cache_lookup_norm", "norm_modulate", "gate_residual"]
)
def test_a_row_depends_on_itself_alone(op: str) -> None:
    arguments = on("cuda", cache_arguments(0, torch.bfloat16)[op])
    (want,) = call(op, arguments)
    order = torch.tensor([2, 0, 3, 1], device="cuda")

    def chosen(rows: torch.Tensor) -> list[torch.Tensor]:
        per_row = [isinstance(a, torch.Tensor) and a.shape[0] == 4 for a in arguments]
        return call(op, tuple(a[rows] if p else a for a, p in zip(arguments, per_row, strict=True)))

    assert_same(f"{op} permuted", chosen(order), [want[order]])
    for row in range(4):
        assert_same(f"{op} row {row}", chosen(order[order == row]), [want[row : row + 1]])


def test_statistics_of_a_row_depend_on_itself_alone() -> None:
    slots, out, embedded, slot, gap = on(
        "cuda", cache_arguments(1, torch.bfloat16, 40)["cache_store"]
    )
    want = ops.cache_store(slots.clone(), out, embedded, slot, gap, backend="native")
    for row in range(4):
        one = [t[row : row + 1] for t in (out, embedded, slot, gap)]
        got = ops.cache_store(slots.clone(), *one, backend="native")
        assert_same_bits(f"row {row}", got, want[row : row + 1])


@pytest.mark.parametrize("op", ["cache_store", "scatter_rows"])
def test_slots_that_no_row_names_keep_their_bytes(op: str) -> None:
    arguments = on("cuda", cache_arguments(2, torch.bfloat16)[op])
    slots, slot = arguments[0], arguments[3 if op == "cache_store" else 2]
    others = torch.ones(slots.shape[0], dtype=torch.bool, device="cuda")
    others[slot.long()] = False
    slots[others] = torch.nan
    before = slots.clone()
    call(op, arguments)
    assert_same_bits("other slots", slots[others], before[others])
    assert slots[~others].isfinite().all()


def test_what_was_never_written_is_never_read() -> None:
    g = torch.Generator().manual_seed(0)
    out, embedded = (torch.randn(2, 5, 8, generator=g).cuda() for _ in range(2))
    slots = torch.full((3, 3, 5, 8), torch.nan, device="cuda")
    slot = torch.tensor([2, 0], dtype=torch.int32, device="cuda")
    stats = ops.cache_store(
        slots, out, embedded, slot, torch.zeros(2, device="cuda"), backend="native"
    )
    assert stats.isfinite().all()
    assert_same_bits("order 0", slots[slot.long(), 0], out - embedded)
    assert not slots[slot.long(), 1:].any()
    slots[:, 1:] = torch.nan
    coef = torch.tensor([[1.0, 0.0, -0.0]] * 2, device="cuda")
    got = ops.cache_lookup(embedded, slots, slot, coef, backend="native")
    assert_same_bits("lookup", got, embedded + (out - embedded))


def test_a_small_spread_about_a_large_mean_is_seen() -> None:
    g = torch.Generator().manual_seed(0)
    residual = 1000 + 0.01 * torch.randn(1, 640, 1536, generator=g)
    slots, slot = torch.empty(1, 1, 640, 1536, device="cuda"), torch.zeros(1, dtype=torch.int32)
    arguments = on("cuda", (residual, torch.zeros_like(residual), slot, torch.zeros(1)))
    stats = ops.cache_store(slots, *arguments, backend="native").cpu()
    truth = residual.double()
    torch.testing.assert_close(float(stats[0, 1]), float(truth.mean()), rtol=1e-7, atol=0)
    deviation = float(truth.std(correction=0))
    torch.testing.assert_close(float(stats[0, 2]), deviation, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_both_half_formats_survives(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = patterns.view(dtype)[None, None].cuda()
    one, zero = torch.ones(1, x.shape[-1], dtype=dtype, device="cuda"), torch.zeros_like(x)
    got = ops.gate_residual(zero, one, x, backend="native")
    assert_same(str(dtype), [got], [zero.cpu() + x.cpu()])
    gathered = ops.gather_rows(
        x[0, :, None], torch.zeros(1, dtype=torch.int32).cuda(), backend="native"
    )
    assert_same_bits("copies keep every bit", gathered, x[0, :1, None])


@pytest.mark.parametrize("rms", [False, True])
def test_a_broken_token_stays_alone(rms: bool) -> None:
    x = torch.randn(1, 4, 83).cuda()
    x[0, 1, 82], x[0, 3, 0] = torch.nan, torch.inf
    scale, shift = torch.randn(1, 83).cuda(), torch.randn(1, 83).cuda()
    got = ops.norm_modulate(x, scale, shift, None, None, 1e-6, rms, backend="native")
    fine = ops.norm_modulate(x[:, ::2], scale, shift, None, None, 1e-6, rms, backend="native")
    assert got[0, 1].isnan().all()
    assert got[0, 3].isnan().any()
    assert_same_bits("neighbours", got[:, ::2].contiguous(), fine)


def test_lookup_norm_is_lookup_then_modulate() -> None:
    x, slots, slot, coef, scale, shift, eps = on(
        "cuda", cache_arguments(3, torch.float32, 9, 640)["cache_lookup_norm"]
    )
    fused = ops.cache_lookup_norm(x, slots, slot, coef, scale, shift, eps, backend="native")
    x = ops.cache_lookup(x, slots, slot, coef, backend="native")
    want = ops.norm_modulate(x, scale, shift, None, None, eps, False, backend="native")
    assert_same_bits("fused", fused, want)


@pytest.mark.parametrize("op", list(cache_arguments(0, torch.float32)))
def test_a_graph_follows_new_ids_and_values(op: str) -> None:
    """Replays on changed inputs in the same memory give what fresh calls give."""
    arguments = on("cuda", cache_arguments(0, torch.bfloat16)[op])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(op, clone_arguments(arguments))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call(op, arguments, WRITES.get(op, ()))
    for seed in (1, 2, 3):
        changed = on("cuda", cache_arguments(seed, torch.bfloat16)[op])
        for target, source in zip(arguments, changed, strict=True):
            if isinstance(source, torch.Tensor):
                target.copy_(source)
        graph.replay()
        assert_same(f"{op} seed {seed}", results, call(op, changed, WRITES.get(op, ())))


@several_gpus
@pytest.mark.parametrize("op", list(cache_arguments(0, torch.float32)))
def test_a_call_runs_where_its_tensors_are(op: str) -> None:
    arguments = cache_arguments(0, torch.bfloat16)[op]
    want = call(op, on("cuda:0", arguments), WRITES.get(op, ()))
    with torch.cuda.device(0):
        got = call(op, on("cuda:1", arguments), WRITES.get(op, ()))
        assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    assert_same(op, got, want)


@pytest.mark.slow
def test_rows_beyond_two_gigabytes_are_found() -> None:
    """Offsets of 64 bits: the last row begins beyond 2^31 elements."""
    row = 2**30 + 3
    x = torch.zeros(3, row, dtype=torch.uint8, device="cuda")
    x[2, :7], x[2, -7:] = 5, 6
    rows = torch.tensor([2], dtype=torch.int32, device="cuda")
    got = ops.gather_rows(x, rows, backend="native")
    assert torch.equal(got[0], x[2])
    ops.scatter_rows(x, torch.full_like(got, 9), rows, backend="native")
    assert (x[2] == 9).all()
    assert not x[:2].any()


@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (4, 0)])
def test_sizes_of_nothing_are_fine(tokens: int, width: int) -> None:
    for op, arguments in cache_arguments(0, torch.float32, tokens, width).items():
        results = call(op, on("cuda", arguments), WRITES.get(op, ()))
        if op == "cache_store":
            assert torch.equal(results[0].cpu(), torch.zeros(4, 3))

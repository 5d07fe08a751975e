# SPDX-License-Identifier: Apache-2.0
"""Time every op on a GPU against the machine's roofs and named rivals, cold and warm, in one process.

    python benches/bench_cuda.py [--op NAME] [--case TEXT] [--seconds N] [--no-compile] [--json FILE]

The roofs come first and from the same run: copy bandwidth and the rate of a large matrix product. Bytes and FLOP are
those of `rapid3rt.testing.cases`. Cold: 256 MB are written before each call, more than any L2 holds; what is timed is
between two events on the stream, so launching costs nothing while the GPU is busy. Warm: the same call again and again
inside a CUDA graph. `0.50x` beside a rival: it takes half as long as we do, cold. Attention is also timed in natural
order and with a static stride. What the seconds do not suffice for is named at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_record
import torch
import torch.nn.functional as F
from rivals import COMPILED, NAMES, Arguments, make_rivals
from torch.nn.attention import SDPBackend, sdpa_kernel

from rapid3rt import ops
from rapid3rt.ops import cuda
from rapid3rt.testing.attention import Heads, listed_flops
from rapid3rt.testing.cases import FLUX, REAL_CASES, SD3, Case, real_attention, real_lists
from rapid3rt.testing.eager import Call

FLUSH_BYTES = 256 * 2**20
LEAD_CYCLES = 2_000_000  # about 1 ms: the GPU idles while the slowest rival launches its 63 ops
ROUNDS = 15
WARM_CALLS = 20
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention_cases() -> list[Case]:
    """All heads of FLUX (one image) and SD3 (two rows of guidance), dense to sparse, and the making of their lists."""
    found = []
    for label, heads, geometry in (("flux ", 24, FLUX), ("sd3 ", 24, SD3)):
        rows = 1 if geometry is FLUX else 2
        whole: Heads = replace(geometry, heads=heads, rows=rows)
        found += [real_attention(label, whole, density) for density in (1.0, 0.5, 0.25)]
        found.append(real_lists(label, whole))
    return found


def all_cases() -> list[Case]:
    """Attention first: it takes longest."""
    lists = ("block_sparse_attention", "build_block_lists")
    return [*attention_cases(), *(c for c in REAL_CASES if c.op not in lists)]


def time_cold(calls: dict[str, Call]) -> dict[str, float]:
    """Median microseconds of each call with a cold L2, in interleaved rounds."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for _ in range(3):
        for call in calls.values():
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            pair = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            torch.cuda._sleep(LEAD_CYCLES)
            flush.zero_()
            pair[0].record()
            call()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in pairs)
        for name, pairs in events.items()
    }


def time_warm(call: Call) -> float:
    """Microseconds of a call that follows itself in a CUDA graph: the best of three rounds' means."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(WARM_CALLS):
            call()
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / WARM_CALLS)
    return min(times[1:])


def measure_roofs() -> dict[str, float]:
    """Copy bandwidth in GB/s over 2 GiB, and TFLOP/s of a bfloat16 product of 8192 x 8192 matrices."""
    source = torch.randn(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    times = time_cold({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {
        "copy_gb_per_s": 2 * source.nbytes / times["copy"] / 1e3,
        "product_tflop_per_s": 2 * 8192**3 / times["product"] / 1e6,
    }


def sdpa_with(backend: SDPBackend, arguments: Arguments) -> Call:
    """PyTorch's dense attention by one of its kernels."""
    q, k, v = arguments[:3]

    def call() -> object:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=arguments[10])

    call()
    return call


def scheduled(name: str, call: Call) -> Call:
    """The call under another way to hand out work."""
    module = cuda._load()[0]

    def run() -> object:
        module.force_schedule(name)
        try:
            return call()
        finally:
            module.force_schedule("queue")

    return run


def own_variants(arguments: Arguments) -> dict[str, Call]:
    """Attention as it would be without the longest-first queue."""
    natural = (*arguments[:6], None, *arguments[7:])
    op = ops.block_sparse_attention
    return {
        "natural order": lambda: op(*natural),
        "static stride": scheduled("static", lambda: op(*natural)),
    }


def find_rivals(
    case: Case, arguments: Arguments, names: tuple[str, ...]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls to beat, and for those that cannot run, why."""
    calls, failed = make_rivals(case, arguments, names, False)
    if case.op == "block_sparse_attention":
        for name, backend in SDPA.items():
            try:
                calls[name] = sdpa_with(backend, arguments)
            except RuntimeError as error:
                failed[name] = str(error).splitlines()[0]
        calls |= own_variants(arguments)
    return calls, failed


def check(case: Case, arguments: Arguments) -> None:
    """Refuse to time a wrong result."""

    def run(backend: str) -> list[torch.Tensor]:
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        result = getattr(ops, case.op)(*given, backend=backend)
        results = result if isinstance(result, tuple) else (result,)
        return [t for t in (*results, *(given[i] for i in case.writes)) if t is not None]

    for got, want in zip(run("native"), run("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def measure(case: Case, names: tuple[str, ...], roofs: dict[str, float]) -> dict[str, Any]:
    """One case in bfloat16: our time, its share of the roof, and how long the rivals take."""
    moved = case.arguments(torch.bfloat16)
    arguments = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in moved)
    check(case, arguments)
    op = getattr(ops, case.op)
    rivals, failed = find_rivals(case, arguments, names)
    times = time_cold({"ours": lambda: op(*arguments), **rivals})
    ours = times.pop("ours")
    result: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "cold_us": ours,
        "warm_us": time_warm(lambda: op(*arguments)),
        "rivals": {name: {"us": us, "ratio": us / ours} for name, us in times.items()},
        "failed": failed,
    }
    if case.op == "block_sparse_attention":
        result["tflop_per_s"] = listed_flops(arguments) / ours / 1e6
        result["of_product"] = result["tflop_per_s"] / roofs["product_tflop_per_s"]
    else:
        result["gb_per_s"] = case.num_bytes(torch.bfloat16) / ours / 1e3
        result["of_copy"] = result["gb_per_s"] / roofs["copy_gb_per_s"]
    return result


def show(result: dict[str, Any]) -> None:
    """Print one line of the table."""
    if "tflop_per_s" in result:
        speed = f"{result['tflop_per_s']:7.0f} TFLOP/s {result['of_product']:4.0%}"
    else:
        speed = f"{result['gb_per_s']:7.0f} GB/s    {result['of_copy']:4.0%}"
    against = [f"{name} {rival['ratio']:.2f}x" for name, rival in result["rivals"].items()]
    against += [f"{name} FAILED ({why})" for name, why in result["failed"].items()]
    print(
        f"  {result['cold_us']:9.1f} us cold {result['warm_us']:9.1f} warm {speed}  "
        f"{result['op']} {result['case']}  |  {'  '.join(against)}",
        flush=True,
    )


def run(options: Any) -> dict[str, Any]:
    """Measure case by case until the seconds are spent."""
    began = time.monotonic()
    roofs = measure_roofs()
    print(
        f"roofs: copy {roofs['copy_gb_per_s']:.0f} GB/s, bfloat16 product {roofs['product_tflop_per_s']:.0f} TFLOP/s"
    )
    names = tuple(n for n in NAMES if not (options.no_compile and n in COMPILED))
    names = tuple(n for n in names if n != "sdpa mask")  # a mask of all pairs, far behind
    cases = [c for c in all_cases() if options.op in (None, c.op) and options.case in c.name]
    results: list[dict[str, Any]] = []
    not_measured: list[str] = []
    failed: list[str] = []
    found = {"roofs": roofs, "results": results, "not_measured": not_measured, "failed": failed}

    def keep() -> None:
        """After every case: the next one may be stopped."""
        if options.json:
            gpu_record.write(options.json, json.dumps(found, indent=1) + "\n")

    for case in cases:
        if time.monotonic() - began > options.seconds:
            not_measured.append(str(case))
            continue
        try:
            results.append(measure(case, names, roofs))
        # Whatever a rival or a kernel does, the other cases are still measured.
        except Exception as error:
            failed.append(f"{case}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            print(f"FAILED: {failed[-1]}", flush=True)
            continue
        show(results[-1])
        keep()
    for name in not_measured:
        print(f"NOT MEASURED, no time left: {name}")
    keep()
    return found


def main() -> int:
    """Run the bench; 1 where a case failed, also because a result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op")
    parser.add_argument("--case", default="", metavar="TEXT", help="a part of a case's name")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    reason = cuda.missing_reason()
    if reason is not None:
        print(f"bench_cuda: {reason}", file=sys.stderr)
        return 2
    os.environ["RAPID3RT_BACKEND"] = "native"  # proven or not
    torch.manual_seed(0)
    with torch.no_grad():
        found = run(options)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Time every op against named rivals, in interleaved rounds of one process, and check it before.

    python benches/bench_ops.py [--op NAME] [--case TEXT] [--dtype NAME] [--rival NAME] [--isa NAME] [--device cuda]
                                [--quick] [--busy] [--json FILE] [--plot FILE]

Cases are those of `rapid3rt.testing.cases`: the small ones that tests check, and ones of the size of FLUX and SD3.
`--op`, `--case` (a part of the name, such as flux, sd3, short), `--dtype`, `--rival` and `--isa` may be given several
times. FlexAttention over every attention shape in bf16:

    python benches/bench_ops.py --op block_sparse_attention --dtype bfloat16 --rival sdpa --rival flex

Rivals: `copy`, a tensor of half the call's bytes into another one; `eager`, the formula in PyTorch's ops, rounded
after each; `compile`, the same through torch.compile; for attention `sdpa` without lists, `sdpa mask`, and `flex`,
FlexAttention compiled, with the same lists; for lists `dense attention` of the same call, ours. `0.50x` beside a
rival: it takes half as long as we do. One that cannot run, or whose result is another, is FAILED with its reason. An
instruction set runs in a process of its own with RAPID3RT_CPU_ISA; there half precision meets `sdpa fp32` besides. One
that this machine or build lacks is not measured. malloc is told to keep its pages: fresh ones from the kernel would
cost more than the op. On a machine that others use, `--busy` measures one thread by its own CPU time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import machine
from rivals import COMPILED, NAMES, Arguments, make_rivals

from rapid3rt import ops
from rapid3rt.ops import native
from rapid3rt.testing.attention import listed_flops
from rapid3rt.testing.cases import (
    CASES,
    DTYPES,
    REAL_CASES,
    Case,
    clone_arguments,
    result_tensors,
)
from rapid3rt.testing.eager import Call
from rapid3rt.testing.timing import time_rivals

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
FORMULAS = {
    "gather_rows": "bytes = 2 R size of a row",
    "scatter_rows": "bytes = 2 R size of a row",
    "cache_lookup": "bytes = (2 + O) R I D size: embedded and O orders read, out written",
    "cache_lookup_norm": "bytes = (2 + O) R I D size",
    "cache_store": "bytes = (2 + 2 O) R I D size: out, embedded and O orders read, O orders written",
    "norm_modulate": "bytes = 2 R I D size",
    "gate_residual": "bytes = 3 R I D size",
    "build_block_lists": "bytes = 2 R H N K size: q and k read",
    "block_sparse_attention": "FLOP = 4 K for each pair of a query and a listed key",
}


def keep_pages() -> None:
    """Make glibc's malloc keep what is freed, as caching allocators do."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap, which is unmapped when freed
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check(case: Case, arguments: Arguments) -> None:
    """Refuse to time a wrong result."""
    native, expected = clone_arguments(arguments), clone_arguments(arguments)
    got = result_tensors(getattr(ops, case.op)(*native))
    want = result_tensors(getattr(ops, case.op)(*expected, backend="reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def measure(case: Case, dtype: torch.dtype, options: Any) -> dict[str, Any]:
    """One line of the table."""
    arguments = tuple(
        a.to(options.device) if isinstance(a, torch.Tensor) else a for a in case.arguments(dtype)
    )
    check(case, arguments)
    op = getattr(ops, case.op)
    rivals, failed = make_rivals(case, arguments, options.rivals, options.forced)
    calls: dict[str, Call] = {"ours": lambda: op(*arguments), **rivals}
    times = time_rivals(
        calls, rounds=options.rounds, round_ms=options.round_ms, clock=options.clock
    )
    ours = times.pop("ours")
    result: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "isa": isa_that_serves(case, arguments, dtype),
        "us": ours.median_us,
        "spread": ours.spread,
        "rivals": {
            name: {"us": t.median_us, "spread": t.spread, "ratio": t.median_us / ours.median_us}
            for name, t in times.items()
        },
        "failed": failed,
    }
    if case.op == "block_sparse_attention":
        q, k = arguments[:2]
        flops = listed_flops(arguments)
        result["density"] = flops / (4 * q.numel() * k.shape[2])
        result["gflops"] = flops / ours.median_us / 1e3
    else:
        result["gbytes_per_s"] = case.num_bytes(dtype) / ours.median_us / 1e3
    return result


def isa_that_serves(case: Case, arguments: Arguments, dtype: torch.dtype) -> str | None:
    """The instruction set whose kernel runs: float32 has none of AMX. None where it is not a CPU that does."""
    x = arguments[0]
    if x.device.type != "cpu" or not ops.info()["available"]:
        return None
    return native.kernel_isa(case.op, dtype, x.shape[-1])


def measure_overhead(rounds: int) -> list[dict[str, Any]]:
    """Time of the reuse path on tensors of no size: what a call costs besides its work."""
    x, out, slots = torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), torch.zeros(2, 1, 1, 8)
    rows, coef, gap = torch.arange(2, dtype=torch.int32), torch.ones(2, 1), torch.zeros(2)
    calls: dict[str, Call] = {
        "cache_lookup": lambda: ops.cache_lookup(x, slots, rows, coef),
        "cache_store": lambda: ops.cache_store(slots, x, x, rows, gap),
        "gather_rows": lambda: ops.gather_rows(x, rows),
        "scatter_rows": lambda: ops.scatter_rows(out, x, rows),
    }
    return [
        {"op": name, "case": "overhead", "us": t.median_us, "spread": t.spread}
        for name, t in time_rivals(calls, rounds=rounds).items()
    ]


def show(result: dict[str, Any]) -> None:
    """Print one line: time and spread, speed, and how many times as long each rival takes."""
    speed = ""
    if "gflops" in result:
        speed = f"{result['gflops']:8.0f} GFLOP/s"
    elif "gbytes_per_s" in result:
        speed = f"{result['gbytes_per_s']:8.1f} GB/s   "
    against = [f"{name} {rival['ratio']:.2f}x" for name, rival in result.get("rivals", {}).items()]
    against += [f"{name} FAILED ({why})" for name, why in result.get("failed", {}).items()]
    print(
        f"  {result.get('dtype', ''):<9}{result.get('isa') or '':<12}{result['us']:>10.1f} us"
        f" +-{result['spread'] / 2:>4.0%}{speed}  {result['case']}  |  {'  '.join(against)}",
        flush=True,
    )


def chosen_cases(options: Any) -> list[Case]:
    """Cases that the command line names; quick: small ones, and one attention case of real size."""
    cases = [c for c in (*CASES, *REAL_CASES) if c.bench]
    if options.quick:
        cases = [c for c in cases if c in CASES or c.name.startswith("flux R1 H4")]
        cases = [c for c in cases if c in CASES or c.name.endswith("block 128 density 0.25")]
    ops_named = options.op or [c.op for c in cases]
    texts = options.case or [""]
    return [c for c in cases if c.op in ops_named and any(text in c.name for text in texts)]


def chosen_rivals(options: Any) -> tuple[str, ...]:
    """Names that the command line asks for: all, but what torch.compile makes only where that is wanted."""
    compiles = not (options.no_compile or options.forced or (options.quick and not options.rival))
    return tuple(n for n in options.rival or NAMES if compiles or n not in COMPILED)


def run(options: Any) -> list[dict[str, Any]]:
    """Measure the chosen cases with the instruction set of this process."""
    results: list[dict[str, Any]] = []
    names = options.dtype or (["float32", "bfloat16"] if not options.quick else ["bfloat16"])
    dtypes = [d for d in DTYPES if str(d).removeprefix("torch.") in names]
    narrowed = options.op or options.case or options.rival or options.forced
    if options.device == "cpu" and not narrowed:
        print("calls on tensors of no size: what a call costs besides its work")
        for result in measure_overhead(options.rounds):
            results.append(result)
            show({**result, "case": result["op"]})
    chosen = chosen_cases(options)
    for op, formula in FORMULAS.items():
        cases = [c for c in chosen if c.op == op]
        if cases:
            print(f"{op}: {formula}")
        for case in cases:
            for dtype in dtypes:
                results.append(measure(case, dtype, options))
                show(results[-1])
    return results


def run_forced(isa: str, options: Any) -> list[dict[str, Any]]:
    """The same in a process in which another instruction set runs."""
    command = [sys.executable, __file__, "--forced"]
    for name in ("op", "case", "dtype", "rival"):
        for value in getattr(options, name) or []:
            command += [f"--{name}", value]
    command += ["--quick"] * options.quick + ["--busy"] * options.busy
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        environment = {**os.environ, "RAPID3RT_CPU_ISA": isa}
        subprocess.run([*command, "--json", str(path)], env=environment, check=True)
        return list(json.loads(path.read_text())["results"])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Speed over density against dense SDPA, a curve per shape, dtype and instruction set."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    curves: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        is_attention = r["op"] == "block_sparse_attention" and "sdpa" in r["rivals"]
        if not is_attention or r["case"].startswith("R"):
            continue
        shape = r["case"].split(" density ")[0]
        name = f"{shape}, {r['dtype']}, {r['isa']}"
        curves.setdefault(name, []).append((r["density"], r["rivals"]["sdpa"]["ratio"]))
        if "flex" in r["rivals"]:
            ratio = r["rivals"]["sdpa"]["us"] / r["rivals"]["flex"]["us"]
            curves.setdefault(f"flex: {shape}, {r['dtype']}", []).append((r["density"], ratio))
    for name, points in curves.items():
        style = "--" if name.startswith("flex") else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="computed pairs / all pairs", ylabel="speed, dense SDPA = 1", yscale="log")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; 0 when every case was right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=list(FORMULAS), metavar="NAME")
    parser.add_argument("--case", action="append", metavar="TEXT", help="a part of a case's name")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rival", action="append", choices=NAMES, help="only these")
    parser.add_argument("--isa", action="append", choices=ISAS, help="also force this one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds")
    parser.add_argument("--busy", action="store_true", help="one thread, by its CPU time")
    parser.add_argument("--no-compile", action="store_true", help="without flex and compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of speed over density")
    parser.add_argument("--forced", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rivals = chosen_rivals(options)
    if not chosen_cases(options):
        parser.error("no case has such a name; rapid3rt.testing.cases lists them")
    options.rounds, options.round_ms = (3, 10.0) if options.quick else (7, 30.0)
    options.clock = time.thread_time if options.busy else time.perf_counter
    if options.busy:
        torch.set_num_threads(1)
    if options.device == "cpu":
        keep_pages()
    with torch.no_grad():
        results = run(options)
    missing = [] if options.forced else [i for i in ISAS if i not in ops.info().get("isas", ())]
    for isa in options.isa or []:
        if isa not in missing:
            results += run_forced(isa, options)
    for isa in missing:
        print(f"{isa}: NOT MEASURED, this machine or build lacks it")
    left_out = (
        [] if options.forced else [n for n in options.rival or NAMES if n not in options.rivals]
    )
    for name in left_out:
        print(f"{name}: NOT MEASURED, nothing is compiled in this run")
    if options.json:
        clock = "CPU time of one thread" if options.busy else "wall clock"
        record = {"machine": machine(), "clock": clock, "not_measured": missing, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Time every op over the cases that the tests check, against named rivals, in interleaved rounds.

Rivals: the same formula in eager PyTorch (`eager`), and for attention dense `sdpa` besides: block lists must pay for
themselves against it. Each case is checked against its reference before it is timed. `overhead` cases are so small
that only the cost of a call is left. Ratios of one run count; times of different runs do not compare.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rapid3rt import ops
from rapid3rt.ops import reference
from rapid3rt.testing.cases import CASES, DTYPES, Case, clone_arguments, result_tensors
from rapid3rt.testing.timing import Timing, time_rivals

OVERHEAD_US = 15.0


def eager(case: Case, arguments: tuple[Any, ...]) -> Callable[[], object]:
    """The rival that a user would write: plain PyTorch in the dtype of the tensors."""
    if case.op == "gather_rows":
        x, rows = arguments
        return lambda: x.index_select(0, rows)
    if case.op == "scatter_rows":
        out, x, rows = arguments
        wide = rows.long()
        return lambda: out.index_copy_(0, wide, x)
    if case.op == "cache_lookup":
        embedded, slots, slot, coef = arguments
        weight = coef[:, 0, None, None].to(embedded.dtype)
        return lambda: embedded + weight * slots[:, 0].index_select(0, slot)
    if case.op == "cache_lookup_norm":
        embedded, slots, slot, coef, scale, shift, eps = arguments
        weight = coef[:, 0, None, None].to(embedded.dtype)

        def lookup_norm() -> torch.Tensor:
            x = embedded + weight * slots[:, 0].index_select(0, slot)
            return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

        return lookup_norm
    if case.op == "norm_modulate":
        x, scale, shift, weight, bias, eps, _ = arguments
        return lambda: (
            F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale[:, None]) + shift[:, None]
        )
    if case.op == "gate_residual":
        residual, gate, y = arguments
        return lambda: residual + gate[:, None] * y
    if case.op == "block_sparse_attention":
        q, k, v = arguments[:3]
        return lambda: F.scaled_dot_product_attention(q, k, v)
    return lambda: getattr(reference, case.op)(*arguments)


def rival_name(case: Case) -> str:
    """What the rival is called in the table."""
    return "dense sdpa" if case.op == "block_sparse_attention" else "eager"


def check(case: Case, dtype: torch.dtype) -> None:
    """Refuse to time a wrong result."""
    native, expected = (clone_arguments(case.arguments(dtype)) for _ in range(2))
    got = result_tensors(getattr(ops, case.op)(*native, backend="native"))
    want = result_tensors(getattr(ops, case.op)(*expected, backend="reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    check(case, dtype)
    arguments = case.arguments(dtype)
    op = getattr(ops, case.op)
    rival = rival_name(case)
    times = time_rivals(
        {"native": lambda: op(*arguments, backend="native"), rival: eager(case, arguments)},
        rounds=rounds,
    )
    ours, theirs = times["native"], times[rival]
    return {
        "op": case.op,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "native_us": ours.median_us,
        "spread": ours.spread,
        "rival": rival,
        "rival_us": theirs.median_us,
        "speedup": theirs.median_us / ours.median_us,
        "gflops": case.flops / ours.median_us / 1e3,
        "gbytes_per_s": case.num_bytes(dtype) / ours.median_us / 1e3,
    }


def measure_overhead(rounds: int) -> list[dict[str, Any]]:
    """Time of the reuse path on tensors of no size: what a call costs besides its work."""
    x, slots = torch.zeros(2, 1, 8), torch.zeros(2, 1, 1, 8)
    rows, coef, gap = torch.arange(2, dtype=torch.int32), torch.ones(2, 1), torch.zeros(2)
    calls: dict[str, Callable[[], object]] = {
        "cache_lookup": lambda: ops.cache_lookup(x, slots, rows, coef),
        "cache_store": lambda: ops.cache_store(slots, x, x, rows, gap),
        "gather_rows": lambda: ops.gather_rows(x, rows),
        "scatter_rows": lambda: ops.scatter_rows(x, x, rows),
    }
    times: dict[str, Timing] = time_rivals(calls, rounds=rounds)
    return [
        {
            "op": name,
            "case": "overhead",
            "native_us": t.median_us,
            "spread": t.spread,
            "goal_us": OVERHEAD_US,
        }
        for name, t in times.items()
    ]


def show(result: dict[str, Any]) -> None:
    """Print one line."""
    start = f"{result['op']:<24}{result.get('dtype', ''):<9}{result['native_us']:>10.1f} us"
    if "rival" in result:
        start += (
            f"{result['rival_us']:>10.1f} us {result['rival']:<11}{result['speedup']:>6.2f}x"
            f"{result['gflops']:>8.2f} GF/s{result['gbytes_per_s']:>8.2f} GB/s"
        )
    print(f"{start}  {result['case']}")


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; 0 when every case was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="float32 only, few rounds")
    options = parser.parse_args(arguments)
    rounds = 3 if options.quick else 9
    results = []
    with torch.no_grad():
        for result in measure_overhead(rounds):
            results.append(result)
            show(result)
        for case in (case for case in CASES if case.bench):
            for dtype in DTYPES[:1] if options.quick else DTYPES:
                results.append(measure(case, dtype, rounds))
                show(results[-1])
    if options.json:
        machine = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        text = json.dumps(
            {**machine, "kernels": ops.describe_backend(), "results": results}, indent=1
        )
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

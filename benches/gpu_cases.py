# SPDX-License-Identifier: Apache-2.0
"""Run every case of every op on the GPU's own kernels, again and again, and hold the results to the same bits.

    python benches/gpu_cases.py [--repeats N] [--real] [--device cuda:0]

Inputs are made on the CPU and copied, results are compared on the GPU: almost no kernel but ours runs, so that a
sanitizer has little else to look at. Calls that the kernels refuse are counted and named; an op of which no call ran
is an error. --real adds the cases of the size of real models.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

import torch

from rapid3rt import ops
from rapid3rt.errors import UnsupportedError
from rapid3rt.testing.cases import (
    CASES,
    CROWDED_CASES,
    DTYPES,
    REAL_CASES,
    Case,
    result_tensors,
)


def call(case: Case, arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """The bytes of everything that a call returns and writes. arguments: on the GPU; what it writes is copied first."""
    moved = [
        a.clone() if i in case.writes and isinstance(a, torch.Tensor) else a
        for i, a in enumerate(arguments)
    ]
    results = result_tensors(getattr(ops, case.op)(*moved, backend="native"))
    written = [moved[i] for i in case.writes if moved[i] is not None]
    return [t.contiguous().view(torch.uint8) for t in (*results, *written) if t.numel()]


def check_case(case: Case, dtype: torch.dtype, repeats: int, device: torch.device) -> str | None:
    """Raise AssertionError where two runs differ. Returns why the kernels refuse the case, None where they ran."""
    arguments = tuple(
        a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in case.arguments(dtype)
    )
    try:
        first = call(case, arguments)
    except (ValueError, UnsupportedError) as error:
        return str(error)
    for i in range(1, repeats):
        again = call(case, arguments)
        same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert same, f"{case} in {dtype}: run {i} differs from the first"
    return None


def main(arguments: list[str] | None = None) -> int:
    """0 where every op ran and every result had the same bits each time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--device", default="cuda:0")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    chosen = (*CASES, *CROWDED_CASES, *(REAL_CASES if options.real else ()))
    cases = [c for c in chosen if c.flops + c.values]
    ran: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    with torch.no_grad():
        for case in cases:
            for dtype in DTYPES:
                reason = check_case(case, dtype, options.repeats, device)
                (ran if reason is None else refused)[case.op] += 1
                if reason is not None:
                    print(f"refused: {case} in {dtype}: {reason}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    never = sorted({c.op for c in cases} - set(ran))
    if never:
        print(f"no call of {', '.join(never)} ran")
        return 1
    print(
        f"{sum(ran.values())} calls {options.repeats} times each, same bits; {sum(refused.values())} refused"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

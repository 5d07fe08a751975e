# SPDX-License-Identifier: Apache-2.0
"""The bench of the ops: which rivals it measures, and what it says of those that it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rapid3rt.testing.cases import CASES, REAL_CASES, Case

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

import bench_ops
import rivals

TINY, SHORT = "R16 H2 N256+64", "short R8 H2 N256+32"


def made(start: str, *names: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Some rivals of the first sparse attention case whose name begins so."""
    case: Case = next(
        c for c in (*CASES, *REAL_CASES) if c.name.startswith(start) and c.name.endswith("0.5")
    )
    with torch.no_grad():
        return rivals.make_rivals(case, case.arguments(torch.bfloat16), names, forced=False)


def test_a_rival_that_cannot_run_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_arguments: Any) -> Any:
        raise NotImplementedError("no such kernel\nand much more")

    monkeypatch.setattr(rivals, "flex", broken)
    calls, failed = made(TINY, "sdpa", "flex")
    assert list(calls) == ["sdpa"]
    assert failed == {"flex": "NotImplementedError: no such kernel"}
    result = {"us": 1.0, "spread": 0.0, "case": "a case", "rivals": {}, "failed": failed}
    bench_ops.show(result)
    assert "flex FAILED (NotImplementedError: no such kernel)" in capsys.readouterr().out


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "masked_sdpa", lambda arguments: lambda: 2 * arguments[0])
    calls, failed = made(TINY, "sdpa mask")
    assert not calls
    assert failed["sdpa mask"].startswith("AssertionError: Tensor-likes are not close")


def test_the_command_line_chooses_rivals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_ops, "keep_pages", lambda: None)  # it would last for all tests
    assert set(made(TINY, "sdpa", "sdpa mask", "copy")[0]) == {"sdpa", "sdpa mask"}
    few = ["--quick", "--op", "block_sparse_attention", "--case", "R16 H2", "--rival"]
    assert bench_ops.main([*few, "sdpa"]) == 0
    out = capsys.readouterr().out
    assert " sdpa " in out
    assert "sdpa mask" not in out
    assert bench_ops.main([*few, "flex", "--no-compile"]) == 0
    assert "flex: NOT MEASURED, nothing is compiled in this run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_ops.main(["--case", "no such case"])
    assert "no case has such a name" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_flex_is_compiled_however_many_shapes_came_before() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for start in (TINY, SHORT):
            calls, failed = made(start, "flex")
            assert not failed
            assert list(calls) == ["flex"]

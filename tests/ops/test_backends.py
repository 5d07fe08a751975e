# SPDX-License-Identifier: Apache-2.0
"""Choice of backend: explicit fails loudly, automatic falls back with one warning, the environment counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

from rapid3rt import ops
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import backends, library, native, reference


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.delenv("RAPID3RT_BACKEND", raising=False)


def gather(backend: str | None = None) -> torch.Tensor:
    return ops.gather_rows(torch.arange(3.0), torch.tensor([2], dtype=torch.int32), backend=backend)


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(native, "_missing", "module rapid3rt._cpu cannot be loaded: no such file")


def test_native_is_chosen_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.info()["available"]
    monkeypatch.setattr(reference, "gather_rows", None)
    assert gather().item() == 2


def test_reference_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "gather_rows", None)
    assert gather("reference").item() == 2


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(
        ValueError, match="backend must be one of native, flex, reference, got 'cuda'"
    ):
        gather("cuda")


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPID3RT_BACKEND", "reference")
    monkeypatch.setattr(library, "gather_rows", None)
    assert gather().item() == 2
    assert ops.describe_backend() == "reference (RAPID3RT_BACKEND)"


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPID3RT_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"RAPID3RT_BACKEND must be one of .*, got 'fast'"):
        gather()


def test_an_explicit_choice_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    with pytest.raises(UnsupportedError, match="no such file"):
        gather("native")
    with pytest.raises(UnsupportedError, match="flex"):
        gather("flex")


def test_the_automatic_choice_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    with pytest.warns(
        RuntimeWarning, match=r"reference ops on device 'cpu', slowly: .*no such file"
    ) as caught:
        assert gather().item() == 2
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gather().item() == 2
    assert "no such file" in ops.describe_backend()


def test_native_has_no_kernels_for_other_devices() -> None:
    reason = native.missing_reason("meta")
    assert reason is not None
    assert "no native kernels for device 'meta'" in reason


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RAPID3RT_CPU_ISA": isa}
    command = [sys.executable, "-c", f"from rapid3rt import ops; {code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_environment_forces_a_lower_isa() -> None:
    done = run_with_isa("scalar", "print(ops.info()['isa'])")
    assert done.stdout.strip() == "scalar", done.stderr


def test_a_wrong_isa_lets_the_package_be_imported() -> None:
    done = run_with_isa("mmx", "print(ops.describe_backend())")
    assert done.stdout.startswith("none: RAPID3RT_CPU_ISA must be one of scalar"), done.stderr


def wrong_isas() -> list[str]:
    """An unknown name, and every set that this machine lacks."""
    known = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
    available = ops.info()["isas"]
    assert available == known[: len(available)]
    return ["mmx", *known[len(available) :]]


@pytest.mark.parametrize("isa", wrong_isas())
def test_a_wrong_isa_is_told_in_one_line_and_refused_by_every_op_that_would_use_it(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = f"RAPID3RT_CPU_ISA must be one of {', '.join(ops.info()['isas'])} ("
    monkeypatch.setenv("RAPID3RT_CPU_ISA", isa)
    for name, value in zip(("_cpu", "_missing", "_wrong_isa"), native._load(), strict=True):
        monkeypatch.setattr(native, name, value)
    assert not native.info()["available"]
    told = ops.describe_backend()
    assert told.startswith(f"none: {message}")
    assert told.endswith(f"got '{isa}'")
    for backend in (None, "native"):
        with pytest.raises(ValueError, match=re.escape(message)):
            gather(backend)
    assert gather("reference").item() == 2


def test_a_backend_that_nothing_can_serve_is_described_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAPID3RT_BACKEND", "fast")
    assert ops.describe_backend().startswith("none: RAPID3RT_BACKEND must be one of native")
    monkeypatch.setenv("RAPID3RT_BACKEND", "flex")
    assert "no FlexAttention backend" in ops.describe_backend()


def test_the_best_isa_runs_unless_another_is_forced() -> None:
    info = ops.info()
    assert info["isa"] == (os.environ.get("RAPID3RT_CPU_ISA") or info["isas"][-1])
    assert info["isa"] in ops.describe_backend()

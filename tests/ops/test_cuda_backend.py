# SPDX-License-Identifier: Apache-2.0
"""The native backend on GPUs, as far as that shows without one: who is served, why not, what a kernel is handed.

A stand-in for the module `_cuda` takes device, stream and workspace off a call and hands the rest to the CPU kernels:
what the GPU's kernels are told is then held to the same cases.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rapid3rt import ops
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import cuda, library, native
from rapid3rt.testing.cases import CASES, Case, clone_arguments, result_tensors
from rapid3rt.testing.numerics import assert_same_bits

SHIPPED = "80-real,86-real,89-real,90-real,120-real,80-virtual"
WORKSPACE_BYTES = 24
STREAM = 17
SMALL = [case for case in CASES if not case.bench]


def test_these_are_the_architectures_that_are_built() -> None:
    rules = (Path(__file__).parents[2] / "cmake" / "cuda.cmake").read_text()
    assert f"set(RAPID3RT_CUDA_ALL {SHIPPED.replace(',', ' ')})" in rules


@pytest.mark.parametrize(
    ("architectures", "capability", "driver"),
    [
        (SHIPPED, (8, 0), 13000),
        (SHIPPED, (8, 6), 13010),
        (SHIPPED, (8, 7), 13000),  # Orin takes the code of 8.6
        (SHIPPED, (9, 0), 13000),
        (SHIPPED, (12, 1), 13000),
        (SHIPPED, (10, 0), 13000),  # by PTX
        ("80", (8, 9), 13000),
        ("80", (12, 0), 13000),
        ("90a-real", (9, 0), 13000),
    ],
)
def test_a_gpu_is_served(architectures: str, capability: tuple[int, int], driver: int) -> None:
    assert cuda.image_reason(architectures, capability, driver, 13000) is None


@pytest.mark.parametrize(
    ("architectures", "capability", "driver", "runtime", "told"),
    [
        (SHIPPED, (7, 5), 13000, 13000, "compute capability 7.5 has no kernels, they begin at 8.0"),
        ("90-real", (8, 6), 13000, 13000, "no kernels for compute capability 8.6, only 90-real"),
        ("86-real", (8, 0), 13000, 13000, "no kernels for compute capability 8.0"),
        ("90-real", (12, 0), 13000, 13000, "no kernels for compute capability 12.0"),
        ("100a-real", (10, 3), 13000, 13000, "no kernels for compute capability 10.3"),
        ("90-virtual", (8, 0), 13000, 13000, "no kernels for compute capability 8.0"),
        (
            SHIPPED,
            (9, 0),
            12040,
            13000,
            "goes up to CUDA 12.4, this build needs 13.0: install driv",
        ),
        (SHIPPED, (9, 0), 12040, 13000, "580 or newer, or build with an older CUDA toolkit"),
        (SHIPPED, (9, 0), 0, 13000, "the NVIDIA driver is missing"),
        (SHIPPED, (9, 0), 13000, 14010, "install a newer driver"),
        (SHIPPED, (10, 0), 13000, 13010, "needs the PTX .* a driver for CUDA 13.0 cannot do"),
    ],
)
def test_a_gpu_is_not_served_and_told_why(
    architectures: str, capability: tuple[int, int], driver: int, runtime: int, told: str
) -> None:
    reason = cuda.image_reason(architectures, capability, driver, runtime)
    assert reason is not None
    assert "\n" not in reason
    assert re.search(told, reason), reason


def test_an_older_minor_driver_runs_machine_code() -> None:
    assert cuda.image_reason(SHIPPED, (9, 0), 13000, 13010) is None


class FakeModule:
    """`_cuda` without a GPU: the CPU kernels behind its signatures, and the calls that came."""

    architectures = SHIPPED
    runtime_version = 13000

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, int]] = []
        self.sized_for: tuple[Any, ...] = ()

    def driver_version(self) -> int:
        return 13010

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_workspace_bytes"):
            return self._size
        return lambda *arguments: self._call(name, arguments)

    def _size(self, *arguments: Any) -> int:
        self.sized_for = arguments
        return WORKSPACE_BYTES

    def _call(self, name: str, arguments: tuple[Any, ...]) -> None:
        *rest, index, stream = arguments
        workspace = 0
        if name in ("block_sparse_attention", "build_block_lists", "cache_store"):
            workspace = rest.pop()
            assert self.sized_for == tuple(rest)
        self.calls.append((name, workspace, index, stream))
        getattr(native._cpu, name)(*rest, 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModule]:
    """Sends the calls on CPU tensors through `cuda.run` to a stand-in."""
    module = FakeModule()
    monkeypatch.setattr(cuda, "_load", lambda: (module, None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(
        native, "_run", lambda name, on, *arguments: cuda.run(name, on.device, arguments)
    )
    cuda._serving.cache_clear()
    yield module
    cuda._serving.cache_clear()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_kernel_is_told_what_the_cpu_kernel_is_told(case: Case, gpu: FakeModule) -> None:
    got_arguments, want_arguments = (clone_arguments(case.arguments(torch.float32)) for _ in "ab")
    got = result_tensors(getattr(native, case.op)(*got_arguments))
    want = result_tensors(getattr(ops, case.op)(*want_arguments, backend="reference"))
    for position in case.writes:
        if case.op != "block_sparse_attention_":
            a, b = got_arguments[position], want_arguments[position]
            assert_same_bits(f"{case!s} argument {position}", a, b)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert bool(gpu.calls) == bool(case.flops + case.values)
    for name, workspace, index, stream in gpu.calls:
        assert case.op.startswith(name)
        assert (workspace != 0) == (name in cuda._HAVE_WORKSPACE)
        assert (index, stream) == (None, STREAM)  # a CPU tensor has no index


@pytest.mark.usefixtures("gpu")
def test_what_runs_is_told() -> None:
    assert cuda.missing_reason() is None
    assert native.missing_reason("cuda") is None
    assert cuda.info() == {
        "available": True,
        "built": True,
        "architectures": SHIPPED,
        "runtime": "13.0",
        "driver": "13.1",
        "device": "NVIDIA H100",
        "capability": (9, 0),
    }


def test_a_call_on_a_gpu_that_is_not_served_says_why(
    gpu: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    with pytest.raises(UnsupportedError, match=r"'native' is not available on cuda:.*begin at 8.0"):
        native.gather_rows(torch.ones(2), torch.zeros(1, dtype=torch.int32))
    assert not gpu.calls
    assert "capability 7.5" in cuda.info()["reason"]


def test_a_torch_without_cuda_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in str(cuda.missing_reason())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU" in str(cuda.missing_reason())
    assert not cuda.info()["available"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ModuleNotFoundError("No module named 'rapid3rt._cuda'"),
            "no CUDA kernels: build with RAPID",
        ),
        (ImportError("undefined symbol: x"), "cannot be loaded: undefined symbol: x"),
    ],
)
def test_a_module_that_cannot_be_loaded_is_told(
    error: ImportError, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: str) -> Any:
        raise error

    monkeypatch.setattr(cuda.importlib, "import_module", fail)
    cuda._load.cache_clear()
    try:
        module, reason = cuda._load()
    finally:
        cuda._load.cache_clear()
    assert module is None
    assert told in str(reason)


def test_tensors_of_two_devices_never_reach_a_kernel() -> None:
    op = library._on_one_device("gather_rows", native.gather_rows)
    with pytest.raises(
        ValueError, match="gather_rows must have all tensors on one device, got cpu and meta"
    ):
        op(torch.ones(2), torch.zeros(1, dtype=torch.int32, device="meta"))
    assert op(torch.ones(2), torch.zeros(1, dtype=torch.int32)).item() == 1


@pytest.mark.slow
def test_importing_the_package_never_loads_the_module() -> None:
    code = "import sys, rapid3rt.ops; print('rapid3rt._cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(
    importlib.util.find_spec("rapid3rt._cuda") is None, reason="this build has no CUDA module"
)
def test_the_module_loads_without_a_driver() -> None:
    module = importlib.import_module("rapid3rt._cuda")
    assert module.runtime_version >= 12080
    assert module.driver_version() >= 0
    with pytest.raises(ValueError, match="schedule must be queue or static, got 'random'"):
        module.force_schedule("random")
    heads, misaligned = (64, 64, 64), 8
    arguments = (
        0, 0, misaligned, 0, 0, 0, 0, 0, 0, 0,
        heads, heads, heads, heads, heads, (1, 1), (1, 1, 1, 1, 64), 64, 64, 1, 1.0, False, 1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="q must start at a multiple of 16 bytes, got address 8"):
        module.block_sparse_attention_workspace_bytes(*arguments)

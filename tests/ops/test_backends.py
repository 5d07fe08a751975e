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
from rapid3rt.ops import backends, flex, library, native, proven, reference


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", set())
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
    monkeypatch.setattr(flex, "_CPU_TORCH", "99")
    with pytest.raises(
        UnsupportedError, match=r"'flex' on device 'cpu': .* needs torch 99, this is"
    ):
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


def test_attention_and_the_other_ops_share_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    q, mode = torch.ones(1, 1, 1, 8), torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="no such file"):
        ops.require(None, CPU)
    gather()
    ops.block_sparse_attention(q, q, q, mode, None, None, None, None, 32, 32, 1.0)


def test_native_has_no_kernels_for_other_devices() -> None:
    reason = native.missing_reason("meta")
    assert reason is not None
    assert "no native kernels for device 'meta'" in reason


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RAPID3RT_CPU_ISA": isa}
    command = [sys.executable, "-c", f"from rapid3rt import ops; {code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_environment_forces_a_lower_isa() -> None:
    done = run_with_isa("scalar", "print(ops.info()['isa'])")
    assert done.stdout.strip() == "scalar", done.stderr


@pytest.mark.slow
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
    monkeypatch.setattr(flex, "_CPU_TORCH", "99")
    assert ops.describe_backend().startswith("none: RAPID3RT_BACKEND 'flex' on device 'cpu': ")


def test_the_best_isa_runs_unless_another_is_forced() -> None:
    info = ops.info()
    assert info["isa"] == (os.environ.get("RAPID3RT_CPU_ISA") or info["isas"][-1])
    assert info["isa"] in ops.describe_backend()


def test_under_flex_the_other_ops_take_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_CPU_TORCH", "2.6")
    assert backends.choose("flex", CPU, torch.float32) == "native"
    without_native(monkeypatch)
    with pytest.warns(RuntimeWarning, match="no such file"):
        assert backends.choose("flex", CPU, torch.bfloat16) == "reference"


def test_flex_on_the_cpu_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_CPU_TORCH", "2.6")
    assert attention(CPU, torch.float32) == "native"
    assert attention(CPU, torch.float32, backend="flex") == "flex"
    without_native(monkeypatch)
    with pytest.warns(RuntimeWarning, match="no such file"):
        assert attention(CPU, torch.bfloat16) == "reference"


# A GPU that is not there -------------------------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP32 = torch.bfloat16, torch.float32


def attention(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int = 128,
    block: int = 128,
    lse: bool = False,
    backend: str | None = None,
) -> str:
    return backends.choose_attention(backend, device, dtype, head_dim, block, lse)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100 with native kernels, proven in bfloat16 and float32, and with Triton."""
    missing = native.missing_reason
    monkeypatch.setattr(
        native, "missing_reason", lambda kind: None if kind == "cuda" else missing(kind)
    )
    monkeypatch.setattr(
        flex, "capability", lambda device: (9, 0) if device.type == "cuda" else None
    )
    monkeypatch.setattr(flex, "_has_triton", lambda: True)
    monkeypatch.setattr(flex, "_SMALL_BLOCK_TORCH", "2.6")
    monkeypatch.setattr(
        proven, "is_proven", lambda gpu, dtype: gpu == (9, 0) and dtype in (BF16, FP32)
    )
    return monkeypatch


def prove_nothing(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(proven, "is_proven", lambda *_: False)


@pytest.mark.usefixtures("gpu")
def test_a_proven_gpu_runs_the_native_kernels() -> None:
    assert attention(GPU, BF16) == "native"
    assert attention(GPU, BF16, lse=True) == "native"
    assert backends.choose(None, GPU, BF16) == "native"
    assert backends.choose("flex", GPU, BF16) == "native"
    assert ops.describe_backend("cuda") == "native"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block"),
    [(torch.float16, 128, 128), (FP32, 128, 128), (BF16, 96, 128), (BF16, 40, 64)],
)
@pytest.mark.usefixtures("gpu")
def test_what_native_attention_cannot_or_may_not_do_goes_to_flex(
    dtype: torch.dtype, head_dim: int, block: int
) -> None:
    assert attention(GPU, dtype, head_dim=head_dim, block=block) == "flex"


def test_a_gpu_without_proof_runs_flex_and_pytorch_without_a_warning(
    gpu: pytest.MonkeyPatch,
) -> None:
    prove_nothing(gpu)
    assert attention(GPU, BF16) == "flex"
    assert backends.choose(None, GPU, BF16) == "reference"
    assert backends.choose("flex", GPU, BF16) == "reference"
    ops.require(None, GPU)
    told = ops.describe_backend("cuda")
    assert told.startswith(
        "flex for attention, reference for the other ops (native kernels are not "
    )
    assert "not proven on compute capability 9.0 in bfloat16" in told


def test_a_gpu_without_triton_runs_the_reference_with_one_warning(
    gpu: pytest.MonkeyPatch,
) -> None:
    prove_nothing(gpu)
    gpu.setattr(flex, "_has_triton", lambda: False)
    with pytest.warns(RuntimeWarning, match=r"slowly: native kernels are not .*needs Triton"):
        ops.require(None, GPU)
    assert attention(GPU, BF16) == "reference"
    assert attention(GPU, BF16, lse=True) == "reference"
    assert backends.choose(None, GPU, BF16) == "reference"
    with pytest.raises(UnsupportedError, match="pip install triton"):
        ops.require("flex", GPU)


@pytest.mark.usefixtures("gpu")
def test_blocks_of_32_run_the_reference_on_a_gpu() -> None:
    with pytest.warns(RuntimeWarning, match="blocks of 64 or 128 tokens"):
        assert attention(GPU, BF16, block=32) == "reference"


def test_an_explicit_choice_on_a_gpu_needs_no_proof_but_fails_where_it_cannot_serve(
    gpu: pytest.MonkeyPatch,
) -> None:
    prove_nothing(gpu)
    assert attention(GPU, BF16, backend="native") == "native"
    assert backends.choose("native", GPU, FP32) == "native"
    for wrong in ({"dtype": FP32}, {"head_dim": 40}, {"block": 32}):
        with pytest.raises(
            UnsupportedError, match="backend 'native' on device 'cuda': native attention"
        ):
            attention(**({"device": GPU, "dtype": BF16, "backend": "native"} | wrong))  # type: ignore[arg-type]
    for other in ({"head_dim": 8}, {"block": 32}):
        with pytest.raises(
            UnsupportedError, match="backend 'flex' on device 'cuda': FlexAttention"
        ):
            attention(**({"device": GPU, "dtype": FP32, "backend": "flex"} | other))  # type: ignore[arg-type]


def test_the_environment_chooses_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    gpu.setenv("RAPID3RT_BACKEND", "flex")
    assert attention(GPU, BF16) == "flex"
    assert ops.describe_backend("cuda") == "flex (RAPID3RT_BACKEND)"
    gpu.setenv("RAPID3RT_BACKEND", "reference")
    assert attention(GPU, torch.float16) == "reference"


def test_a_build_without_cuda_kernels_runs_flex(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(native, "missing_reason", lambda kind: f"no native kernels for device {kind!r}")
    assert attention(GPU, BF16) == "flex"
    with pytest.raises(UnsupportedError, match="no native kernels for device 'cuda'"):
        ops.require("native", GPU)


def test_an_old_gpu_is_refused_by_flex_in_words(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(flex, "capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedError, match=r"capability 8\.0, this one has 7\.5"):
        attention(GPU, torch.float16, backend="flex")


def test_without_a_gpu_cuda_is_told_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "capability", lambda device: None)
    assert ops.describe_backend("cuda") == "none: there is no CUDA GPU"
    with pytest.raises(UnsupportedError, match="there is no CUDA GPU"):
        ops.require("flex", GPU)


def test_a_choice_is_made_once(gpu: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    gpu.setattr(proven, "is_proven", lambda *_: bool(asked.append(1)) or True)
    for _ in range(3):
        assert attention(GPU, BF16) == "native"
        assert backends.choose(None, GPU, BF16) == "native"
    assert len(asked) == 2

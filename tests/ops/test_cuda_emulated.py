# SPDX-License-Identifier: Apache-2.0
"""The memory-bound CUDA kernels without a GPU: compiled as C++ and run on emulated CTAs against their CPU twins."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
UNITS = ("lists", "lookup", "modulate", "rows", "store")
TWINS = ("ids.cpp", "isa.cpp", "lists.cpp", "lookup.cpp", "modulate.cpp", "rows.cpp")
ROWWISE = ("rowwise/choose.cpp", "rowwise/scalar.cpp")
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-w")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the objects of the kernels, of their twins and of the emulation, assertions and all."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    folders = {name: tmp_path_factory.mktemp(name) for name in ("cuda", "cpu")}
    include = [f"-I{CSRC / path}" for path in ("tests/emulated", "include", "cpu")]
    kernels = [CSRC / "cuda" / f"{name}.cu" for name in UNITS]
    twins = [CSRC / "cpu" / name for name in (*TWINS, *ROWWISE)]
    twins.append(CSRC / "tests" / "emulated" / "emulated.cpp")
    for folder, sources in (("cuda", kernels), ("cpu", twins)):
        run(compiler, *FLAGS, *include, "-c", "-x", "c++", *sources, cwd=folders[folder])
    return folders["cuda"].parent


@pytest.mark.parametrize("name", ["cuda_lists", "cuda_rows"])
def test_emulated_kernels_do_as_their_cpu_twins(name: str, compiled: Path) -> None:
    build_and_run(name, compiled)


def test_a_debug_build_stops_at_ids_out_of_range(compiled: Path) -> None:
    build_and_run("cuda_debug", compiled)


def build_and_run(name: str, compiled: Path) -> None:
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    objects = sorted(compiled.glob("c*0/*.o"))
    include = [f"-I{CSRC / path}" for path in ("tests/emulated", "tests", "include")]
    test = CSRC / "tests" / f"{name}_test.cpp"
    run(compiler, *FLAGS, *include, test, *objects, "-o", name, cwd=compiled)
    assert run(compiled / name, cwd=compiled).endswith(": ok\n")


def test_the_build_and_this_test_know_the_same_units() -> None:
    listed = (CSRC / "tests" / "CMakeLists.txt").read_text()
    found = {path.stem for path in (CSRC / "cuda").glob("*.cu")}
    assert found == set(UNITS)
    assert all(f"${{CUDA}}/{name}.cu" in listed for name in UNITS)

# SPDX-License-Identifier: Apache-2.0
"""When the CUDA module is built, and for what: the rules of cmake/cuda.cmake under made-up compilers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RULES = ROOT / "cmake" / "cuda.cmake"
ALL = "80-real;86-real;89-real;90-real;120-real;80-virtual"

# The rules alone: where they would begin to build, they say for what.
PROJECT = f"""
cmake_minimum_required(VERSION 3.20)
project(rules NONE)
list(APPEND CMAKE_MODULE_PATH "${{CMAKE_CURRENT_SOURCE_DIR}}")
macro(enable_language language)
  message(STATUS "would build for ${{CMAKE_CUDA_ARCHITECTURES}}")
  return()
endmacro()
include("{RULES}")
"""

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH")


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def configure(folder: Path, nvcc: str, *defines: str, works: bool = True) -> str:
    """What the rules say. nvcc: its version, empty for none; works: whether it can compile."""
    (folder / "CMakeLists.txt").write_text(PROJECT)
    answer = "$ENV{CUDACXX}" if works else "NOTFOUND"
    (folder / "CheckLanguage.cmake").write_text(
        f"macro(check_language language)\n  set(CMAKE_CUDA_COMPILER {answer})\nendmacro()\n"
    )
    compiler = folder / "nvcc" if nvcc else ""
    if nvcc:
        write_program(folder / "nvcc", f'echo "Cuda compilation tools, release, V{nvcc}"')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "RAPID3RT"))}
    command = ["cmake", "-S", folder, "-B", folder / "build", f"-DRAPID3RT_NVCC={compiler}"]
    done = subprocess.run(
        [*command, *(f"-D{d}" for d in defines)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("value", ["on", "auto"])
def test_the_module_is_built_for_all_wherever_there_is_a_compiler(
    value: str, tmp_path: Path
) -> None:
    told = configure(tmp_path, "12.8.93", f"RAPID3RT_CUDA={value}")
    assert f"would build for {ALL} " in told + " "


@pytest.mark.parametrize(
    ("nvcc", "works", "why"),
    [
        ("", True, "there is no nvcc on PATH"),
        ("12.4.131", True, "is '12.4.131', not 12.8 or newer"),
        ("13.0.88", False, "does not work, RAPID3RT_CUDA=on shows why"),
    ],
)
def test_auto_leaves_the_module_out_in_one_line(
    nvcc: str, works: bool, why: str, tmp_path: Path
) -> None:
    told = configure(tmp_path, nvcc, "RAPID3RT_CUDA=auto", works=works)
    lines = [line for line in told.split(" -- ") if "rapid3rt: CUDA module left out" in line]
    assert len(lines) == 1
    assert why in lines[0]
    assert "would build" not in told
    assert "Error" not in told


@pytest.mark.parametrize("value", ["on", "auto"])
def test_architectures_can_be_named(value: str, tmp_path: Path) -> None:
    named = (f"RAPID3RT_CUDA={value}", "CMAKE_CUDA_ARCHITECTURES=90-real")
    assert "would build for 90-real " in configure(tmp_path, "13.0.88", *named) + " "


@pytest.mark.parametrize(
    ("nvcc", "defines", "why"),
    [
        ("", ["RAPID3RT_CUDA=on"], "RAPID3RT_CUDA=on, but there is no nvcc"),
        ("11.8.89", ["RAPID3RT_CUDA=on"], "RAPID3RT_CUDA=on, but .* is '11.8.89', not 12.8"),
        ("13.0.88", ["RAPID3RT_CUDA=yes"], "RAPID3RT_CUDA must be on, off or auto, got yes"),
        (
            "13.0.88",
            ["RAPID3RT_CUDA=on", "CMAKE_CUDA_ARCHITECTURES=native"],
            "CMAKE_CUDA_ARCHITECTURES must be names such as 90-real, got native",
        ),
    ],
)
def test_what_cannot_be_built_is_an_error(
    nvcc: str, defines: list[str], why: str, tmp_path: Path
) -> None:
    told = configure(tmp_path, nvcc, *defines)
    assert "CMake Error" in told
    assert re.search(why, told), told


def test_off_asks_nobody(tmp_path: Path) -> None:
    told = configure(tmp_path, "13.0.88", "RAPID3RT_CUDA=off")
    assert "rapid3rt" not in told.replace(str(tmp_path), "")

# SPDX-License-Identifier: Apache-2.0
"""The units of the instruction sets stay apart: what they include, and which symbols their objects carry."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ATTENTION = ROOT / "csrc" / "cpu" / "attention"
BASE = ("dispatch.cpp", "scalar.cpp")
UNITS = sorted(p for p in ATTENTION.glob("*.cpp") if p.name not in BASE)
FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
FLAGS["avx512_bf16"] = FLAGS["avx512"] + " -mavx512bf16"
FLAGS["amx"] = FLAGS["avx512_bf16"] + " -mamx-tile -mamx-bf16"


def includes(path: Path) -> set[str]:
    """All headers that a source reads, through its own headers too."""
    found = set(re.findall(r"#include ([<\"][^>\"]+[>\"])", path.read_text()))
    own = [name.strip('"') for name in found if name.startswith('"')]
    return found.union(*(includes(ATTENTION.parent / name) for name in own))


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.stem)
def test_a_unit_includes_intrinsics_and_its_own_headers_only(unit: Path) -> None:
    allowed = {"<immintrin.h>", "<stdint.h>"}
    assert {name for name in includes(unit) if name.startswith("<")} <= allowed
    for name in includes(unit):
        if name.startswith('"') and not name.endswith('tile.h"'):
            text = (ATTENTION.parent / name.strip('"')).read_text()
            assert "namespace rapid3rt {\nnamespace {" in text, f"{name} has no anonymous namespace"


def test_the_flags_here_are_those_of_the_build() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    for isa, flags in FLAGS.items():
        line = re.search(rf"set\(RAPID3RT_FLAGS_{isa} (.*)\)", text)
        assert line is not None
        before = re.match(r"\$\{RAPID3RT_FLAGS_(\w+)\}(.*)", line[1])
        assert flags == (FLAGS[before[1]] + before[2] if before else line[1])
    assert {p.stem for p in UNITS} == set(FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.stem)
def test_an_object_shares_nothing_with_the_base_build(unit: Path, tmp_path: Path) -> None:
    """A weak symbol may be the copy that the linker keeps for everyone: instructions that a machine lacks."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None or shutil.which("nm") is None:
        pytest.skip("no compiler or nm")
    made = tmp_path / "unit.o"
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-c", str(unit), "-o", str(made)]
    command += [*FLAGS[unit.stem].split(), f"-I{ATTENTION.parent}", "-w"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "unrecognized" in done.stderr:
        pytest.skip(f"{compiler} lacks {unit.stem}")
    assert done.returncode == 0, done.stderr
    listing = subprocess.run(["nm", str(made)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    weak = [name for kind, name in symbols if kind in "WwVvu"]
    assert not weak
    defined = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert len(defined) == 1, "the table of the kernel is all that others see"
    needed = {name for kind, name in symbols if kind == "U"}
    assert needed <= {"memset", "memcpy", "memmove", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}

# SPDX-License-Identifier: Apache-2.0
"""The C++ test of attention, its AMX tiles emulated: their control flow runs wherever AVX-512 BF16 is.

`make sanitize` runs the same test under sanitizers.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from test_attention_units import FLAGS

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
TESTS = CPU.parent / "tests"
BASE = [
    CPU / name for name in ("attention/dispatch.cpp", "attention/scalar.cpp", "ids.cpp", "isa.cpp")
]


@pytest.mark.slow
def test_attention_in_cpp_with_emulated_tiles(tmp_path: Path) -> None:
    """Right up to every instruction set here; 2^x is as exact as stated; nothing unlisted is read."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    sets = [f"-DRAPID3RT_{isa.upper()}" for isa in FLAGS]
    common = ["-std=c++17", "-O2", "-w", f"-I{CPU}", f"-I{CPU.parent / 'include'}", *sets]
    common.append("-DRAPID3RT_AMX_EMULATED")

    def compile_objects(sources: list[Path], *flags: str) -> None:
        command = [compiler, *common, *flags, "-c", *map(str, sources)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if done.returncode != 0 and "unrecognized" in done.stderr:
            pytest.skip(f"{compiler} lacks {flags}")
        assert done.returncode == 0, done.stderr

    compile_objects([TESTS / "attention_test.cpp", *BASE])
    for isa, flags in FLAGS.items():
        sources = [CPU / "attention" / f"{isa}.cpp", TESTS / f"exp2_{isa}.cpp"]
        (folder := tmp_path / isa).mkdir()
        for source in filter(Path.exists, sources):
            compile_objects([source], *flags.split(), "-o", str(folder / f"{source.stem}.o"))
    program = tmp_path / "attention_test"
    objects = map(str, tmp_path.rglob("*.o"))
    subprocess.run([compiler, *objects, "-lpthread", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention: ok up to" in done.stdout
    assert "exp2, degree 5" in done.stdout

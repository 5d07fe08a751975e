# SPDX-License-Identifier: Apache-2.0
"""What can be known of the CUDA kernels without a GPU: they compile for every architecture, keep everything in
registers and within their budgets, and hold the instructions that they are written for.

The objects are compiled once for all tests, all units at once as far as cores and memory go, and what was learnt is
kept under build/ until a source or the compiler changes. With nvcc missing, everything here is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda-gates"
UNITS = sorted((CSRC / "cuda").rglob("*.cu"))
ARCHITECTURES = (80, 86, 89, 90, 120)
GIB_PER_COMPILER = 4

# Registers that a thread may take, by the end of a kernel's name without its parameters. What is given away here is
# given away on purpose: beyond 168 a third CTA of 128 threads, beyond 128 a fourth no longer fits.
BUDGETS = {
    r"attention_sm80<\w+,64,64>": 168,
    r"attention_sm80<\w+,64,128>": 240,
    r"attention_sm80<\w+,128,64>": 208,
    r"attention_sm80<\w+,128,128>": 255,
}
BUDGET = 128  # of kernels not in the table

# What the attention kernels are made of, in PTX and in machine code (SASS).
PTX = (
    "cp.async.cg.shared.global",
    "ldmatrix.sync",
    "ldmatrix.sync.aligned.m8n8.x4.trans",
    "mma.sync",
)
SASS = ("LDGSTS", "LDSM", "HMMA")
# Spilled registers come back from local memory.
NOT_SASS = ("LDL", "STL")

pytestmark = pytest.mark.slow

# pip puts tools beside its packages, not on PATH.
TOOLS = os.pathsep.join([os.environ["PATH"], f"{sysconfig.get_path('purelib')}/nvidia/cu13/bin"])

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA kernels are NOT checked"
)
Report = dict[str, dict[str, Any]]


def run(*command: str | Path, path: str = os.environ["PATH"]) -> str:
    """What a command prints, both streams."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compilers_at_once() -> int:
    """One per core, and per 4 GiB of memory."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return max(1, min(os.cpu_count() or 1, gib // GIB_PER_COMPILER))


def flags() -> list[str]:
    """How the build compiles, and ptxas telling what it did."""
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    code.append("-gencode=arch=compute_80,code=compute_80")
    include = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}"]
    return ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-Wall", *code, *include, "-Xptxas=-v"]


def fingerprint() -> str:
    """Of everything that the result depends on."""
    known = hashlib.sha256(run("nvcc", "--version").encode())
    known.update(Path(__file__).read_bytes())
    for folder in ("cuda", "include"):
        for path in sorted((CSRC / folder).rglob("*")):
            if path.is_file():
                known.update(f"{path.relative_to(CSRC)}\n".encode() + path.read_bytes())
    return known.hexdigest()[:16]


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters."""
    name = run("c++filt", mangled).strip() if shutil.which("c++filt") else mangled
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # casts of template arguments
    return re.sub(r"\w+::|\s", "", re.sub(r"\(.*\)$", "", name))


def parse_ptxas(text: str) -> Iterator[dict[str, Any]]:
    """One record per kernel and architecture."""
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", text)[1:]
    for name, architecture, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        memory = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", body
        )
        registers = re.search(r"Used (\d+) registers", body)
        assert memory is not None, body
        assert registers is not None, body
        yield {
            "kernel": readable(name),
            "architecture": int(architecture),
            "stack": int(memory[1]),
            "spilled": int(memory[2]) + int(memory[3]),
            "registers": int(registers[1]),
        }


def count_instructions(text: str, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """How often each instruction stands in each kernel of a listing of machine code, by architecture and kernel."""
    found: dict[str, dict[str, int]] = {}
    kernel = architecture = ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            kernel = f"{architecture} {readable(match[1])}"
            found[kernel] = dict.fromkeys(names, 0)
        elif (match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", line)) and (
            match[1] in names
        ):
            found[kernel][match[1]] += 1
    return found


def shows_machine_code() -> bool:
    """Whether the tools for it are there; cuobjdump calls nvdisasm."""
    return all(shutil.which(name, path=TOOLS) for name in ("cuobjdump", "nvdisasm"))


def compile_unit(unit: Path, folder: Path) -> dict[str, Any]:
    """Compile one unit for all architectures, and tell what came of it."""
    made = folder / f"{unit.stem}.o"
    told = run("nvcc", *flags(), "-c", unit, "-o", made)
    result: dict[str, Any] = {
        "warnings": [line for line in told.splitlines() if "warning" in line.lower()],
        "kernels": list(parse_ptxas(told)),
        "instructions": None,
    }
    if shows_machine_code():
        listing = run("cuobjdump", "-sass", made, path=TOOLS)
        result["instructions"] = count_instructions(listing, (*SASS, *NOT_SASS))
    if "attention" in unit.parts:
        ptx = folder / f"{unit.stem}.ptx"
        run(
            "nvcc",
            *[f for f in flags() if "gencode" not in f],
            "-arch=compute_80",
            "-ptx",
            unit,
            "-o",
            ptx,
        )
        result["ptx"] = {name: ptx.read_text().count(name) for name in PTX}
    return result


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What compiling every unit told, by its name."""
    kept = CACHE / f"{fingerprint()}{'-sass' * shows_machine_code()}.json"
    if kept.exists():
        known: Report = json.loads(kept.read_text())
        return known
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(compilers_at_once()) as pool:
        results = pool.map(lambda unit: compile_unit(unit, folder), UNITS)
        made = dict(zip((str(unit.relative_to(CSRC)) for unit in UNITS), results, strict=True))
    CACHE.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(made, indent=1))
    part.replace(kept)
    return made


def kernels_of(report: Report) -> list[dict[str, Any]]:
    return [kernel for unit in report.values() for kernel in unit["kernels"]]


@needs_nvcc
def test_every_unit_compiles_for_every_architecture_without_a_warning(report: Report) -> None:
    assert {str(unit.relative_to(CSRC)) for unit in UNITS} == set(report)
    for unit, told in report.items():
        assert not told["warnings"], f"{unit}: {told['warnings']}"
        assert {kernel["architecture"] for kernel in told["kernels"]} == set(ARCHITECTURES), unit


@needs_nvcc
def test_nothing_spills_and_no_kernel_has_a_stack(report: Report) -> None:
    spilling = [kernel for kernel in kernels_of(report) if kernel["spilled"] or kernel["stack"]]
    assert not spilling


@needs_nvcc
def test_registers_stay_within_their_budgets(report: Report) -> None:
    for kernel in kernels_of(report):
        allowed = [most for name, most in BUDGETS.items() if re.fullmatch(name, kernel["kernel"])]
        assert kernel["registers"] <= (allowed or [BUDGET])[0], kernel
    names = {kernel["kernel"] for kernel in kernels_of(report)}
    for name in BUDGETS:
        assert any(re.fullmatch(name, kernel) for kernel in names), f"no kernel {name}"


@needs_nvcc
def test_attention_is_written_in_the_instructions_meant(report: Report) -> None:
    told = {unit: made["ptx"] for unit, made in report.items() if "ptx" in made}
    assert len(told) == 4
    for unit, counts in told.items():
        assert all(counts.values()), f"{unit}: {counts}"


@needs_nvcc
def test_machine_code_holds_the_instructions_meant(report: Report) -> None:
    if any(told["instructions"] is None for told in report.values()):
        pytest.skip(
            "machine code is NOT checked: cuobjdump and nvdisasm are missing "
            "(pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
        )
    attention = 0
    for told in report.values():
        for kernel, counts in told["instructions"].items():
            assert not any(counts[name] for name in NOT_SASS), f"{kernel}: {counts}"
            if "attention_sm80" in kernel:
                assert all(counts[name] for name in SASS), f"{kernel}: {counts}"
                attention += 1
    assert attention == 8 * len(ARCHITECTURES)


def test_listings_of_machine_code_are_understood() -> None:
    listing = """
    Fatbin elf code:
    arch = sm_90
            Function : _Z3addPf
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R7], [R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*1f30*/              @UP1 STL [R1], R5 ;
    """
    counts = count_instructions(listing, (*SASS, *NOT_SASS))
    assert list(counts.values()) == [{"LDGSTS": 1, "LDSM": 0, "HMMA": 1, "LDL": 0, "STL": 1}]
    assert next(iter(counts)).startswith("sm_90 ")


def test_names_of_kernels_are_understood() -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    mangled = "_ZN8rapid3rt4cuda12_GLOBAL__N_15scaleINS_8bfloat16ELi64ELb1ELNS0_4KindE2EEEvPT_f"
    assert readable(mangled) == "scale<bfloat16,64,true,2>"
    assert readable("_ZN8rapid3rt4cuda12_GLOBAL__N_14copyEPKvl") == "copy"


def test_at_most_twelve_units_are_compiled() -> None:
    assert 4 < len([p for p in (CSRC / "cuda").rglob("*") if p.suffix in (".cu", ".cpp")]) <= 12


@pytest.mark.parametrize(
    ("test", "sources"),
    [
        (
            "cuda_attention_test",
            (),
        ),  # the kernel's very lines, thread by thread, against sums in double
        ("cuda_dispatch_test", ("cuda/attention/dispatch.cpp",)),
    ],
)
def test_attention_is_right_on_an_emulated_machine(
    test: str, sources: tuple[str, ...], tmp_path: Path
) -> None:
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    include = [f"-I{CSRC / folder}" for folder in ("tests/no_gpu", "include", "cuda", "tests")]
    files = [CSRC / "tests" / f"{test}.cpp", *(CSRC / source for source in sources)]
    made = tmp_path / test
    # NDEBUG, as the module is built: what is out of range is passed over.
    flags = ("-std=c++17", "-O2", "-DNDEBUG", "-Wall", "-Wextra", "-Werror")
    run(compiler, *flags, *include, *files, "-o", made)
    assert "ok" in run(made)

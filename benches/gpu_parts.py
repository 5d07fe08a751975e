# SPDX-License-Identifier: Apache-2.0
"""The parts of a GPU check: what each runs, and what it comes to. `gpu_check.py` chooses and records them.

Every program runs as a child with a deadline, in an empty folder: from the checkout it would import the package's
sources instead of the build. What can be told without a GPU is held by tests/testing/test_gpu_check.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_record

ROOT = gpu_record.ROOT
BENCHES = ROOT / "benches"
FLEX = ROOT / "tests" / "ops" / "test_cuda_flex.py"
WORK = ROOT / "build" / "gpu-check"
SITE, WHEELS, START, RUN, LOGS = (WORK / n for n in ("site", "wheels", "start", "run", "logs"))
REAL = ("80-real", "86-real", "89-real", "90-real", "120-real")  # as cmake/cuda.cmake
TO_RUN = (
    *("torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"),
    *("tqdm", "pytest", "requests", "filelock"),
)
HEADERS = "nvidia_cutlass"  # a wheel that nobody imports
TO_BUILD = ("pip", "scikit_build_core", "pybind11")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STOPPED = 124
# An editable install would come before PYTHONPATH: its finder stands in front of all others.
CUSTOMIZE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
"""
PROBE = """import importlib.util, sys
print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])
"""
BUILT = """import json, rapid3rt
from rapid3rt.ops import cuda
print(json.dumps({**cuda.info(), "file": rapid3rt.__file__}))
"""


class CheckError(Exception):
    """Something that a part cannot go on without; its text is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a part came to. status: passed, failed, timeout or missing. details go into the record as they are."""

    status: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Check:
    """One run of the check. wheels: folder of what may be lacking. deadline: of the part, by `time.monotonic`."""

    machine: dict[str, Any]
    wheels: Path
    deadline: float = 0.0

    def call(self, name: str, command: list[str], **environment: str) -> tuple[int, str]:
        """Run a program to the deadline; its exit status, 124 when it was stopped, and all it said, kept as a log.

        It writes the log itself: what was said by then is there also when we are killed.
        """
        log = LOGS / f"{name}.log"
        with log.open("w") as out:
            child = subprocess.Popen(
                command, cwd=RUN, env=child_environment() | environment,
                stdout=out, stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
            try:
                status = child.wait(max(self.deadline - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired:
                status = STOPPED
            finally:
                with suppress(ProcessLookupError):  # what it left running holds the GPU
                    os.killpg(child.pid, signal.SIGKILL)  # its own group, nobody else's processes
                child.wait()
        return status, log.read_text(errors="replace")


def child_environment() -> dict[str, str]:
    """Where children find the build, what was missing here, and the programs that came with it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAPID3RT_")}
    return {
        **kept,
        "PATH": f"{WHEELS / 'bin'}{os.pathsep}{kept.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(
            filter(None, map(str, (START, SITE, WHEELS, ROOT, kept.get("PYTHONPATH", ""))))
        ),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "300",  # pytest cuts the reasons of failures to the width of a terminal that is not there
        "HF_HUB_OFFLINE": "1",
    }


def prepare() -> None:
    """Make the folders of the check, and what keeps an editable install out of its way."""
    for folder in (WORK, WHEELS, START, RUN, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    gpu_record.write(START / "sitecustomize.py", CUSTOMIZE)


def keep_logs(folder: Path, most: int = 400_000) -> None:
    """Everything that programs said, in one file of a folder; of each at most so many characters, the last ones."""
    logs = sorted(LOGS.glob("*.log"), key=lambda path: path.stat().st_mtime)
    parts = [f"===== {path.stem}\n{path.read_text(errors='replace')[-most:]}" for path in logs]
    gpu_record.write(folder / "gpu-check.log", "\n".join(parts))


def tail(said: str, lines: int = 25) -> list[str]:
    """The end of what a program said, for the record."""
    return said.strip().splitlines()[-lines:]


def failure(status: int, summary: str, said: str) -> Outcome:
    """What a program that did not end well comes to."""
    found = "timeout" if status == STOPPED else "failed"
    return Outcome(status=found, summary=summary, details={"log": tail(said)})


def architecture_for(capability: tuple[int, int]) -> str:
    """The unit of the shipped module that serves a GPU: machine code of its major number, else PTX."""
    found = "80-virtual"
    for name in REAL:
        major, minor = divmod(int(name.removesuffix("-real")), 10)
        if major == capability[0] and minor <= capability[1]:
            found = name
    return found


def is_installed(wheel: Path) -> bool:
    """Whether this Python has what a wheel holds, in whatever version."""
    try:
        metadata.distribution(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def bring_missing(check: Check) -> None:
    """Unpack what this Python lacks from the folder of wheels. Raises CheckError where something is missing still."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    found = [w for w in sorted(check.wheels.glob("*.whl")) if not w.name.startswith(HEADERS)]
    lacking = [str(w) for w in found if not is_installed(w)]
    if lacking:
        status, said = check.call("wheels", [*pip, "--upgrade", "--target", str(WHEELS), *lacking])
        if status != 0:
            raise CheckError(f"pip cannot unpack {check.wheels}: {' '.join(tail(said, 1))}")
    _, said = check.call("needs", [sys.executable, "-c", PROBE, *TO_RUN, *TO_BUILD])
    if said.strip():
        raise CheckError(
            f"{sys.executable} lacks {', '.join(said.split())}: bring wheels in the folder {check.wheels.name}, "
            "which `make wheels-offline` fills where there is a network"
        )


def build(check: Check) -> Outcome:
    """Build the package with this machine's compilers and look at what came out."""
    bring_missing(check)
    if not check.machine["nvcc"]:
        raise CheckError(
            "there is no nvcc on PATH or in /usr/local/cuda; docs/cuda.md gets one from pip"
        )
    architecture = architecture_for(tuple(check.machine["capability"]))
    settings = (
        f"build-dir={WORK / 'cmake'}",
        f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}",
        "cmake.define.CMAKE_CUDA_FLAGS=-lineinfo",  # sanitizers name lines then
    )
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--upgrade", "--target", str(SITE)]
    command += [*(f"--config-settings={s}" for s in settings), str(ROOT)]
    status, said = check.call("build", command, RAPID3RT_CUDA="on")
    if status != 0:
        return failure(status, "pip cannot build the package", said)
    status, said = check.call("built", [sys.executable, "-c", BUILT])
    if status != 0:
        return failure(status, "the build cannot be imported", said)
    facts = json.loads(tail(said, 1)[0])
    if not Path(facts["file"]).is_relative_to(SITE):
        return Outcome(status="failed", summary=f"another rapid3rt is in front: {facts['file']}")
    if not facts["available"]:
        return Outcome(status="failed", summary=facts["reason"])
    return Outcome(status="passed", summary=f"{facts['architectures']}, runtime {facts['runtime']}")


def cuda_tests(folder: Path) -> list[Path]:
    """Test files that hold tests for a GPU; no other file is imported."""
    return [p for p in sorted(folder.rglob("test_*.py")) if "pytest.mark.cuda" in p.read_text()]


def count_tests(report: Path) -> dict[str, int]:
    """Tests of a JUnit report, by what became of them."""
    found = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if report.is_file():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            found = {key: found[key] + int(suite.get(key, "0")) for key in found}
    return found


def run_tests(check: Check, name: str, files: list[Path]) -> Outcome:
    """The GPU tests of some files, under the suite's own strictness. None that passed is a failure."""
    report = WORK / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", f"--junitxml={report}"]
    status, said = check.call(name, [*command, *map(str, files)])
    counts = count_tests(report)
    wrong, skipped = counts["failures"] + counts["errors"], counts["skipped"]
    good = counts["tests"] - wrong - skipped
    summary = f"{good} passed, {wrong} failed, {skipped} skipped"
    if status != 0 or not good:
        return failure(status, summary, said)
    return Outcome(status="passed", summary=summary)


def tests(check: Check) -> Outcome:
    """The GPU tests of the ops: the cases of the CPU's tests and more."""
    return run_tests(check, "tests", [p for p in cuda_tests(ROOT / "tests" / "ops") if p != FLEX])


def flex(check: Check) -> Outcome:
    """FlexAttention, which serves where our kernels do not and compiles for minutes: no part of their proof."""
    return run_tests(check, "flex", [FLEX])


def runtime(check: Check) -> Outcome:
    """All other GPU tests: no part of the proof of the kernels."""
    inside = ROOT / "tests" / "ops"
    files = [p for p in cuda_tests(ROOT / "tests") if inside not in p.parents]
    return run_tests(check, "runtime", files)


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on PATH or beside the toolkit."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    beside = os.pathsep.join(map(str, (home / "bin", home / "compute-sanitizer")))
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path=beside)


def our_errors(said: str) -> list[str]:
    """Reports of compute-sanitizer that name a kernel of ours, a line each; torch's own kernels are not ours.

    A report begins with one space behind the bars and goes on with more.
    """
    reports: list[list[str]] = []
    for line in said.splitlines():
        bars, text = line[:9], line[9:]
        if bars != "=" * 9 or not text.strip():
            continue
        if not text.startswith("  "):
            reports.append([])
        if reports:
            reports[-1].append(text.strip())
    return [" ".join(r[:2]) for r in reports if any("rapid3rt" in line for line in r[1:])]


def sanitize(tool: str) -> Callable[[Check], Outcome]:
    """A part that runs all small cases once under one tool of compute-sanitizer."""

    def part(check: Check) -> Outcome:
        program = find_sanitizer()
        if program is None:
            return Outcome(
                status="missing", summary="COMPUTE-SANITIZER IS MISSING, nothing was checked"
            )
        # No limits: what torch's kernels are told of must not use up the reports that are printed, and importing torch
        # takes longer than a program is given until its first CUDA call.
        command = [program, "--tool", tool, "--print-limit", "0", "--launch-timeout", "0"]
        command += [sys.executable, str(BENCHES / "gpu_cases.py")]
        # Without torch's cache every tensor is an allocation of its own: what lies beyond it shows.
        status, said = check.call(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        errors = our_errors(said)
        ran = re.search(r"^\d+ calls .*same bits.*$", said, re.MULTILINE)
        summed_up = re.search(r"SUMMARY: (\d+) ", said)
        if ran is None or summed_up is None or errors:
            found = failure(status, f"{len(errors)} errors in our kernels", said)
            return Outcome(
                status=found.status,
                summary=found.summary,
                details={**found.details, "errors": errors[:20]},
            )
        others = f"; {summed_up[1]} reports on others' kernels" if summed_up[1] != "0" else ""
        return Outcome(status="passed", summary=ran[0] + others)

    return part


def repeats(check: Check) -> Outcome:
    """Every case 100 times, at real sizes too: the same bits each time."""
    command = [sys.executable, str(BENCHES / "gpu_cases.py"), "--repeats", "100", "--real"]
    status, said = check.call("repeats", command)
    summary = " ".join(tail(said, 1))
    return failure(status, summary, said) if status else Outcome(status="passed", summary=summary)


def benches(check: Check) -> Outcome:
    """Every op at real sizes against the roofs and the rivals; what the time did not suffice for is named."""
    results = WORK / "benches.json"
    results.unlink(missing_ok=True)
    seconds = max(check.deadline - time.monotonic() - 60, 30)
    command = [sys.executable, str(BENCHES / "bench_cuda.py"), f"--seconds={seconds:.0f}"]
    status, said = check.call("benches", [*command, "--json", str(results)])
    if not results.is_file():
        return failure(status, " ".join(tail(said, 1)), said)
    found = json.loads(results.read_text())
    failed = found["failed"]
    summary = (
        f"{len(found['results'])} measured, {len(found['not_measured'])} not, {len(failed)} failed"
    )
    outcome = "timeout" if status == STOPPED else "failed" if failed else "passed"
    return Outcome(status=outcome, summary=summary, details={**found, "table": said.splitlines()})


PARTS: dict[str, Callable[[Check], Outcome]] = {
    "build": build,
    "tests": tests,
    **{tool: sanitize(tool) for tool in SANITIZERS},
    "repeats": repeats,
    "benches": benches,
    "flex": flex,
    "runtime": runtime,
}
GROUPS = {"sanitizer": SANITIZERS}

# SPDX-License-Identifier: Apache-2.0
"""The GPU check, as far as it can be told without a GPU: what runs again, what counts as proof, whose error it is."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

import gpu_cases
import gpu_check
import gpu_parts
import gpu_record

from rapid3rt.ops import proven

MACHINE = {
    "capability": [9, 0],
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.95.05",
    "torch": "2.11.0+cu130",
    "python": "3.12.3",
    "nvcc": "13.0.88",
    "commit": "0123456789ab",
    "sources": "feedfacefeedface",
}
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void rapid3rt::cuda::gather<int4>(RowsParams)+0x1b0 in rows.cu:31
=========     by thread (0,0,0) in block (2,0,0)
=========     Access to 0x7f0000 is out of bounds
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x50
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Error: Race reported between Write access at void rapid3rt::cuda::norm(int)+0x2a0 in norm.h:7
=========     and Read access at void rapid3rt::cuda::norm(int)+0x3c0 in norm.h:9 [16 hazards]
=========
========= ERROR SUMMARY: 3 errors
"""


def record_of(*passed: str, **machine: Any) -> dict[str, Any]:
    parts = {n: {"status": "passed", "seconds": 1.0, "summary": "good"} for n in passed}
    return {"format": 1, "machine": {**MACHINE, **machine}, "parts": parts}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with little in it: sources to hash, and the places that a proof goes to."""
    for name, text in (
        ("csrc/a.cu", "one"),
        ("rapid3rt/ops/proven.json", '{"format": 1, "records": []}'),
        ("benches/results/x.json", "{}"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_any_changed_source_makes_other_sources(tree: Path) -> None:
    before = gpu_record.digest_sources(tree)
    (tree / "rapid3rt/ops/proven.json").write_text("changed by accepting")
    (tree / "csrc/notes.md").write_text("no source")
    assert gpu_record.digest_sources(tree) == before
    (tree / "csrc/a.cu").write_text("two")
    assert gpu_record.digest_sources(tree) != before


def test_a_record_goes_on_for_the_same_machine_and_sources_only(tmp_path: Path) -> None:
    path = tmp_path / gpu_record.NAME
    gpu_record.keep(record_of("build"), tmp_path)
    assert gpu_record.load(path, MACHINE)["parts"].keys() == {"build"}
    for key, value in (("sources", "0"), ("driver", "590.1"), ("device", "NVIDIA H200")):
        assert gpu_record.load(path, {**MACHINE, key: value})["parts"] == {}
    other_commit = gpu_record.load(path, {**MACHINE, "commit": "later"})
    assert other_commit["machine"]["commit"] == "later"
    assert other_commit["parts"]


def test_every_part_of_the_proof_is_a_part() -> None:
    assert set(gpu_record.PROOF) <= set(gpu_parts.PARTS)
    assert not gpu_record.is_proof(record_of(*gpu_record.PROOF[:-1]))
    assert gpu_record.is_proof(record_of(*gpu_record.PROOF))


def test_the_table_says_what_is_still_to_pass() -> None:
    table = gpu_record.format_table(record_of("build", "tests"))
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0, driver 580.95.05" in table
    assert "NOT PROVEN, still to pass: memcheck, racecheck, initcheck, synccheck, repeats" in table
    assert table.splitlines().count("PROVEN") == 0
    assert "PROVEN" in gpu_record.format_table(record_of(*gpu_record.PROOF)).splitlines()


def test_an_accepted_record_is_what_the_package_reads(tree: Path, tmp_path: Path) -> None:
    sources = gpu_record.digest_sources(tree)
    for capability in ([9, 0], [8, 6], [9, 0]):
        found = record_of(*gpu_record.PROOF, sources=sources, capability=capability)
        gpu_record.keep(found, tmp_path / "out")
        told = gpu_record.accept(tmp_path / "out" / gpu_record.NAME, tree)
        assert f"gpu-check-{capability[0]}.{capability[1]}.json" in told
    proofs = proven.parse((tree / "rapid3rt/ops/proven.json").read_text())
    assert [p.capability for p in proofs] == [(8, 6), (9, 0)]
    assert proofs[1].commit == MACHINE["commit"]
    assert proofs[1].dtypes == ("bfloat16", "float16", "float32")
    kept = json.loads((tree / "benches/results/gpu-check-9.0.json").read_text())
    assert kept["parts"]["memcheck"]["status"] == "passed"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "must be a gpu-check.json"),
        ("{}", "must be a gpu-check.json"),
        (json.dumps(record_of("build")), "must have passed build, tests"),
        (json.dumps(record_of(*gpu_record.PROOF)), "must come from these sources"),
        (json.dumps({**record_of(*gpu_record.PROOF), "format": 2}), "must have passed"),
    ],
)
def test_a_record_that_proves_nothing_here_is_refused(text: str, why: str, tree: Path) -> None:
    path = tree / gpu_record.NAME
    path.write_text(text)
    with pytest.raises(ValueError, match=why):
        gpu_record.accept(path, tree)
    assert proven.parse((tree / "rapid3rt/ops/proven.json").read_text()) == ()


def test_the_package_carries_what_the_records_say() -> None:
    records = sorted(gpu_record.RESULTS.glob("gpu-check-*.json"))
    written = [json.loads(path.read_text()) for path in records]
    assert all(map(gpu_record.is_proof, written))
    entries = [gpu_record.entry(r, r["machine"]["commit"]) for r in written]
    carried = json.loads(gpu_record.PROVEN.read_text())["records"]
    assert carried == sorted(entries, key=lambda r: r["capability"])


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "80-real"),
        ((8, 7), "86-real"),
        ((9, 0), "90-real"),
        ((10, 0), "80-virtual"),
        ((12, 1), "120-real"),
    ],
)
def test_what_is_checked_is_what_is_shipped(capability: Any, architecture: str) -> None:
    assert gpu_parts.architecture_for(capability) == architecture
    rules = (gpu_record.ROOT / "cmake" / "cuda.cmake").read_text()
    assert f"set(RAPID3RT_CUDA_ALL {' '.join(gpu_parts.REAL)} 80-virtual)" in rules


def test_sanitizer_reports_are_told_by_whose_kernel_it_is() -> None:
    errors = gpu_parts.our_errors(MEMCHECK)
    assert len(errors) == 2
    assert "Invalid __global__ read of size 16 bytes at void rapid3rt::cuda::gather" in errors[0]
    assert "Race reported" in errors[1]
    assert gpu_parts.our_errors("") == []


def sanitizer(folder: Path, said: str) -> None:
    program = folder / "compute-sanitizer"
    (folder / "said").write_text(said)
    program.write_text(f"#!/bin/sh\ncat '{folder / 'said'}'\n")
    program.chmod(0o755)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_parts.Check:
    """A check in a folder of its own, with a deadline of a minute and no program but ours on PATH."""
    for name in ("WORK", "SITE", "WHEELS", "START", "RUN", "LOGS"):
        monkeypatch.setattr(gpu_parts, name, tmp_path / name.lower())
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    gpu_parts.prepare()
    wheels = tmp_path / "brought"
    wheels.mkdir()
    return gpu_parts.Check(machine=dict(MACHINE), wheels=wheels, deadline=time.monotonic() + 60)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (
            "12 calls 1 times each, same bits; 3 refused\n========= ERROR SUMMARY: 0 errors\n",
            "passed",
        ),
        ("12 calls 1 times each, same bits; 0 refused\n" + MEMCHECK, "failed"),
        ("========= ERROR SUMMARY: 0 errors\n", "failed"),  # the cases did not end
        ("12 calls 1 times each, same bits; 0 refused\n", "failed"),  # nobody looked
    ],
)
def test_a_sanitizer_must_have_seen_all_cases(
    said: str, status: str, check: gpu_parts.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer(tmp_path, said)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_parts.PARTS["memcheck"](check).status == status


@pytest.mark.slow
def test_all_cases_run_and_say_what_the_check_looks_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu_cases.main(["--device", "cpu", "--repeats", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\d+ calls 2 times each, same bits; 0 refused", last)


def test_runs_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in gpu_cases.CASES if c.op == "gate_residual")
    values = iter((1.0, 1.0, 2.0))
    monkeypatch.setattr(
        gpu_cases.ops, "gate_residual", lambda *_, **__: torch.full((3,), next(values))
    )
    with pytest.raises(AssertionError, match="run 2 differs from the first"):
        gpu_cases.check_case(case, torch.float32, 3, torch.device("cpu"))


def test_an_error_of_the_device_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in gpu_cases.CASES if c.op == "gate_residual")

    def broken(*_: Any, backend: str) -> Any:
        if backend == "native":
            raise RuntimeError("gate_residual: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_cases.ops, "gate_residual", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_cases.check_case(case, torch.float32, 1, torch.device("cpu"))


def test_a_missing_sanitizer_is_no_pass(
    check: gpu_parts.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = gpu_parts.PARTS["racecheck"](check)
    assert outcome.status == "missing"
    assert "COMPUTE-SANITIZER IS MISSING" in outcome.summary


def test_a_part_ends_at_its_deadline(check: gpu_parts.Check) -> None:
    check.deadline = time.monotonic() + 1
    began = time.monotonic()
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    status, _ = check.call("sleep", [sys.executable, "-c", sleeper])
    assert status == gpu_parts.STOPPED
    assert time.monotonic() - began < 20
    assert gpu_parts.failure(status, "", "").status == "timeout"


def test_nothing_that_a_part_started_outlives_it(check: gpu_parts.Check, tmp_path: Path) -> None:
    """It would hold the GPU beside the next part."""
    left = tmp_path / "left"
    child = f"import time; time.sleep(2); open({str(left)!r}, 'w').close()"
    starter = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); print('on')"
    )
    assert check.call("start", [sys.executable, "-c", starter]) == (0, "on\n")
    time.sleep(4)
    assert not left.exists()


def test_a_log_is_there_while_a_program_runs(check: gpu_parts.Check, tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "talk.log"
    reader = f"print('said'); print(open({str(logs)!r}).read())"
    assert check.call("talk", [sys.executable, "-c", reader]) == (0, "said\nsaid\n\n")
    gpu_parts.keep_logs(tmp_path / "out")
    assert (tmp_path / "out" / "gpu-check.log").read_text() == "===== talk\nsaid\nsaid\n\n"


def test_children_find_what_was_brought_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/brought")
    assert gpu_parts.child_environment()["PYTHONPATH"].endswith(":/brought")
    monkeypatch.delenv("PYTHONPATH")
    assert not gpu_parts.child_environment()["PYTHONPATH"].endswith(":")


def test_what_a_python_lacks_is_named(
    check: gpu_parts.Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "TO_RUN", ("json", "no_such_package"))
    monkeypatch.setattr(gpu_parts, "TO_BUILD", ())
    with pytest.raises(
        gpu_parts.CheckError, match="lacks no_such_package: bring wheels in the folder"
    ):
        gpu_parts.bring_missing(check)


def test_wheels_of_what_is_there_stay_packed() -> None:
    assert gpu_parts.is_installed(Path("pytest-9.2.0-py3-none-any.whl"))
    assert not gpu_parts.is_installed(Path("no_such_package-1.0-py3-none-any.whl"))


@pytest.mark.slow
def test_tests_that_all_skip_prove_nothing(check: gpu_parts.Check, tmp_path: Path) -> None:
    path = tmp_path / "test_one.py"
    path.write_text("import pytest\n@pytest.mark.cuda\ndef test_x():\n    pytest.skip('no GPU')\n")
    assert gpu_parts.cuda_tests(tmp_path) == [path]
    outcome = gpu_parts.run_tests(check, "tests", [path])
    assert (outcome.status, outcome.summary) == ("failed", "0 passed, 0 failed, 1 skipped")
    path.write_text("import pytest\n@pytest.mark.cuda\ndef test_x():\n    pass\n")
    outcome = gpu_parts.run_tests(check, "tests", [path])
    assert (outcome.status, outcome.summary) == ("passed", "1 passed, 0 failed, 0 skipped")


def test_parts_that_have_passed_are_not_run_again(check: gpu_parts.Check) -> None:
    record = record_of("build", "tests")
    assert gpu_check.chosen_parts([], record)[:2] == ["build", "memcheck"]  # no build is there
    (check.wheels.parent / "site" / "rapid3rt").mkdir(parents=True)
    assert gpu_check.chosen_parts([], record)[:2] == ["memcheck", "racecheck"]
    assert gpu_check.chosen_parts(["tests", "sanitizer"], record) == [
        "tests",
        *gpu_parts.SANITIZERS,
    ]


def test_the_check_stops_after_a_build_that_failed_and_keeps_what_it_knows(
    check: gpu_parts.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(_check: Any) -> Any:
        raise gpu_parts.CheckError("there is no nvcc")

    monkeypatch.setattr(gpu_check, "read_machine", lambda: dict(MACHINE))
    monkeypatch.setitem(gpu_check.PARTS, "build", lacking)
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--out", str(out), "--wheels", str(check.wheels)]
    )
    assert gpu_check.main() == 1
    record = json.loads((out / gpu_record.NAME).read_text())
    assert list(record["parts"]) == ["build"]
    assert record["parts"]["build"]["summary"] == "there is no nvcc"
    assert "NOT PROVEN" in (out / "gpu-check.txt").read_text()


@pytest.mark.parametrize(("total", "runs"), [("60", True), ("0.4", False)])
def test_a_machine_that_forgot_goes_on_with_the_record_that_lies_there(
    total: str,
    runs: bool,
    check: gpu_parts.Check,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    ran: list[str] = []
    for name in gpu_check.PARTS:
        outcome = gpu_parts.Outcome(status="passed", summary="good")
        monkeypatch.setitem(
            gpu_check.PARTS, name, lambda _, name=name, outcome=outcome: ran.append(name) or outcome
        )
    monkeypatch.setattr(gpu_check, "read_machine", lambda: dict(MACHINE))
    out = tmp_path / "out"
    gpu_record.keep(record_of("build", "tests", "memcheck"), out)
    words = ["--out", str(out), "--wheels", str(check.wheels), "--total", total]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *words])
    assert gpu_check.main() == (0 if runs else 1)
    rest = [n for n in gpu_check.PARTS if n not in ("tests", "memcheck")]
    assert ran == (rest if runs else [])  # the build itself is not there
    record = json.loads((out / gpu_record.NAME).read_text())
    assert gpu_record.is_proof(record) == runs
    assert ("no time left for build, racecheck" in capsys.readouterr().out) != runs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_a_machine_without_a_gpu_is_told_in_one_line(
    check: gpu_parts.Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "out")])
    assert gpu_check.main() == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
    assert check.machine
    assert not (tmp_path / "out").exists()

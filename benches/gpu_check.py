# SPDX-License-Identifier: Apache-2.0
"""Prove the CUDA kernels on the GPU of this machine: build, tests, sanitizers, repeats, benches. `make gpu-check`.

    python benches/gpu_check.py [--part NAME ...] [--out FOLDER] [--wheels FOLDER] [--minutes N] [--total N]

Works with the Python that runs it, its torch and its nvcc, without a network and without an environment of its own:
the package is built into `build/gpu-check/site`, and what this Python lacks comes from the wheels that
`make wheels-offline` has collected elsewhere. Parts that have passed on this machine from these very sources are not
run again unless they are named; each ends within its minutes, and none begins that could not end within the total. The
folder gets gpu-check.json, gpu-check.txt and gpu-check.log, all that programs said, after every part; where this
machine has no record of its own, one of the same device and sources that lies there is gone on with.
`python benches/gpu_record.py FOLDER/gpu-check.json` then enters the proof into the checkout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_record
from gpu_parts import GROUPS, PARTS, SITE, WORK, Check, CheckError, Outcome

_LEAST_SECONDS = 30.0  # with less a part is not begun
FACTS = """import json, platform, torch
found = {"torch": torch.__version__, "python": platform.python_version(), "device": None}
if torch.cuda.is_available():
    found |= {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
print(json.dumps(found))
"""


def ask(*command: str) -> str:
    """What a program says, empty where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def read_machine() -> dict[str, Any]:
    """What this machine is. Raises CheckError without a torch that works or without a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", FACTS], env=gpu_parts.child_environment(), capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode != 0:
        raise CheckError(f"{sys.executable} has no torch that works: {last_line(done.stderr)}")
    facts: dict[str, Any] = json.loads(last_line(done.stdout))
    if facts["device"] is None:
        raise CheckError(f"torch {facts['torch']} of {sys.executable} sees no CUDA GPU")
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    beside = os.pathsep.join(f"{home}/bin" for home in (*homes, "/usr/local/cuda"))
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=beside)
    compiler = ask(nvcc or "nvcc", "--version")
    return {
        **facts,
        "driver": driver.partition("\n")[0],
        "nvcc": "".join(re.findall(r"V(\d+\.\d+\.\d+)", compiler)[:1]),
        "commit": gpu_record.commit_of(),
        "sources": gpu_record.digest_sources(),
    }


def last_line(said: str) -> str:
    """The last line of what a program said, empty where it said nothing."""
    return said.strip().rpartition("\n")[2]


def chosen_parts(named: list[str], record: dict[str, Any]) -> list[str]:
    """Parts to run: the named ones, else those that have not passed; the build first where there is none."""
    names = [n for name in named for n in GROUPS.get(name, (name,))]
    if not names:
        names = [n for n in PARTS if not passed(record, n)]
    if names and not (SITE / "rapid3rt").is_dir():
        names = ["build", *(n for n in names if n != "build")]
    return names


def passed(record: dict[str, Any], name: str) -> bool:
    """Whether a part has passed."""
    return bool(record["parts"].get(name, {}).get("status") == "passed")


def run_part(name: str, check: Check, deadline: float) -> dict[str, Any]:
    """What the record keeps of a part. deadline: by `time.monotonic`."""
    print(f"gpu-check: {name} ...", flush=True)
    began = time.monotonic()
    check.deadline = deadline
    try:
        outcome = PARTS[name](check)
    except CheckError as error:
        outcome = Outcome(status="failed", summary=str(error))
    seconds = round(time.monotonic() - began, 1)
    print(f"gpu-check: {name} {outcome.status} in {seconds:.0f} s: {outcome.summary}", flush=True)
    if outcome.status != "passed":
        print("\n".join(outcome.details.get("log", [])), flush=True)
    return {
        "status": outcome.status,
        "seconds": seconds,
        "summary": outcome.summary,
        **outcome.details,
    }


def run(options: Any) -> int:
    """Run the chosen parts and keep the record after each; 0 when every one passed."""
    gpu_parts.prepare()
    machine = read_machine()
    record = gpu_record.load(WORK / gpu_record.NAME, machine)
    if not record["parts"]:
        record = gpu_record.load(options.out / gpu_record.NAME, machine)
    if not record["parts"]:
        shutil.rmtree(SITE, ignore_errors=True)  # of other sources
    check = Check(machine=machine, wheels=options.wheels)
    names = chosen_parts(options.part, record)
    end = time.monotonic() + 60 * options.total
    for name in names:
        now = time.monotonic()
        if end - now < _LEAST_SECONDS:
            print(
                f"gpu-check: no time left for {', '.join(names[names.index(name) :])}", flush=True
            )
            break
        record["parts"][name] = run_part(name, check, min(now + 60 * options.minutes, end))
        record["parts"] = {n: record["parts"][n] for n in PARTS if n in record["parts"]}
        gpu_record.keep(record, WORK, options.out)
        gpu_parts.keep_logs(options.out)
        if name == "build" and not passed(record, name):
            break
    gpu_record.keep(record, options.out)
    print(gpu_record.format_table(record))
    return 0 if all(passed(record, n) for n in names) else 1


def main() -> int:
    """Run the check from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", default=[], choices=[*PARTS, *GROUPS])
    parser.add_argument("--out", type=Path, default=gpu_record.ROOT / "gpu-check")
    parser.add_argument("--wheels", type=Path, default=gpu_record.ROOT / "wheels-offline")
    parser.add_argument("--minutes", type=float, default=8.0, help="the most that a part may take")
    parser.add_argument("--total", type=float, default=math.inf, help="minutes that all may take")
    options = parser.parse_args()
    options.out, options.wheels = options.out.resolve(), options.wheels.resolve()
    try:
        return run(options)
    except CheckError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # children end too
    sys.exit(main())

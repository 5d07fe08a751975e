# SPDX-License-Identifier: Apache-2.0
"""What a GPU check leaves behind: one JSON and one table per machine, and, once accepted, the proof in the package.

    python benches/gpu_record.py FILE       # accept gpu-check.json that a GPU machine wrote from these very sources

A record belongs to a machine and to sources: another GPU, driver or torch, or any changed source, begins a new one.
Accepting copies it to `benches/results/gpu-check-CAPABILITY.json` and enters it into `rapid3rt/ops/proven.json`, which
the automatic choice and `rapid3rt doctor` read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"
PROVEN = ROOT / "rapid3rt" / "ops" / "proven.json"
NAME = "gpu-check.json"
FORMAT = 1
SOURCES = ("CMakeLists.txt", "cmake", "csrc", "rapid3rt", "tests", "benches")
SUFFIXES = {".txt", ".cmake", ".cpp", ".h", ".cu", ".cuh", ".py"}
# All of these must have passed before the kernels count as proven.
PROOF = ("build", "tests", "memcheck", "racecheck", "initcheck", "synccheck", "repeats")
DTYPES = ("bfloat16", "float16", "float32")
IDENTITY = ("capability", "device", "driver", "torch", "sources")


def digest_sources(root: Path = ROOT) -> str:
    """Hash of everything that a check depends on; knows no git, a copied tree has none."""
    found = hashlib.sha256()
    for name in SOURCES:
        place = root / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        for path in files:
            if path.suffix in SUFFIXES and path.is_file():
                found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def commit_of(root: Path = ROOT) -> str:
    """Commit that is checked out, with -dirty where something tracked differs; empty without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return ""
    return done.stdout.strip()


def write(path: Path, text: str) -> None:
    """Write beside the file, then rename: whoever is killed leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(text)
    beside.replace(path)


def load(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The record to go on with: that of the same machine and sources, else an empty one."""
    if path.is_file():
        record: dict[str, Any] = json.loads(path.read_text())
        same = all(record["machine"].get(key) == machine[key] for key in IDENTITY)
        if record.get("format") == FORMAT and same:
            return {**record, "machine": machine}
    return {"format": FORMAT, "machine": machine, "parts": {}}


def keep(record: dict[str, Any], *folders: Path) -> None:
    """Write a record and its table into some folders."""
    for folder in folders:
        write(folder / NAME, json.dumps(record, indent=1) + "\n")
        write((folder / NAME).with_suffix(".txt"), format_table(record))


def is_proof(record: dict[str, Any]) -> bool:
    """Whether every part that a proof needs has passed."""
    return all(record["parts"].get(name, {}).get("status") == "passed" for name in PROOF)


def format_table(record: dict[str, Any]) -> str:
    """Machine, a line per part, the benches, and what it comes to."""
    machine = record["machine"]
    lines = [
        f"{machine['device']}, compute capability {'.'.join(map(str, machine['capability']))}, "
        f"driver {machine['driver']}",
        f"torch {machine['torch']}, python {machine['python']}, nvcc {machine['nvcc']}, "
        f"commit {machine['commit'] or 'unknown'}, sources {machine['sources']}",
        "",
    ]
    for name, part in record["parts"].items():
        lines.append(f"{name:<10} {part['status']:<8} {part['seconds']:>6.0f} s  {part['summary']}")
    missing = [n for n in PROOF if record["parts"].get(n, {}).get("status") != "passed"]
    lines += ["", f"NOT PROVEN, still to pass: {', '.join(missing)}" if missing else "PROVEN"]
    return "\n".join([*lines, *record["parts"].get("benches", {}).get("table", [])]) + "\n"


def entry(record: dict[str, Any], commit: str) -> dict[str, Any]:
    """The record as `rapid3rt.ops.proven` reads it."""
    machine = record["machine"]
    kept = {name: machine[name] for name in ("capability", "device", "driver", "torch")}
    return {**kept, "dtypes": list(DTYPES), "commit": commit}


def accept(path: Path, root: Path = ROOT) -> str:
    """Enter a record into the checkout that it was made from; say what was done.

    Raises
    ------
    ValueError: it is no record, a part has not passed, or these are not its sources.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        machine, known = record["machine"], record["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} must be a gpu-check.json: {error}") from None
    if not known or not is_proof(record):
        raise ValueError(
            f"{path.name} must have passed {', '.join(PROOF)}:\n{format_table(record)}"
        )
    here = digest_sources(root)
    if machine["sources"] != here:
        raise ValueError(
            f"{path.name} must come from these sources ({here}), got {machine['sources']}: check out its commit, or "
            "check again"
        )
    commit = (machine["commit"] or commit_of(root)).removesuffix("-dirty")
    name = f"gpu-check-{'.'.join(map(str, machine['capability']))}.json"
    kept = {**record, "machine": {**machine, "commit": commit}}
    write(root / RESULTS.relative_to(ROOT) / name, json.dumps(kept, indent=1) + "\n")
    proven = root / PROVEN.relative_to(ROOT)
    others = [
        r for r in json.loads(proven.read_text())["records"]
        if r["capability"] != machine["capability"]
    ]  # fmt: skip
    records = sorted([*others, entry(record, commit)], key=lambda r: r["capability"])
    write(proven, json.dumps({"format": FORMAT, "records": records}, indent=1) + "\n")
    return f"wrote benches/results/{name} and rapid3rt/ops/proven.json: commit both"


def main() -> int:
    """Accept the record that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="gpu-check.json from a GPU machine")
    try:
        print(accept(parser.parse_args().file))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

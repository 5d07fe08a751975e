# SPDX-License-Identifier: Apache-2.0
"""Where a benchmark's numbers go: one JSON with machine, commit and command, and the table on the screen."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rapid3rt.testing.machine import machine as measured_on

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, threads, versions, commit and the command line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        **measured_on(),
        "commit": commit.stdout.strip(),
        # Where things lie on this machine is nobody's business.
        "command": shlex.join(["python", *(a if a[:1] != "/" else Path(a).name for a in sys.argv)]),
    }


def save(name: str, results: dict[str, Any]) -> Path:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    return path


def tiny_parser(description: str | None) -> argparse.ArgumentParser:
    """For the command line of a bench on a tiny pipeline: `--model` and `--save`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny-sd3", "tiny-flux"), default="tiny-sd3")
    parser.add_argument("--save", help="write benches/results/NAME.json")
    return parser


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    arguments: Sequence[str] | None,
) -> None:
    """Measure what the command line asks for; save it where it says so. parser: of `tiny_parser`."""
    options = parser.parse_args(arguments)
    results = measure(options)
    if options.save:
        print(save(options.save, results))

# SPDX-License-Identifier: Apache-2.0
"""Where a schedule search starts from and what it keeps: policies, families, measurements, and whose a folder is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rapid3rt.calibrate.arguments import told_apart
from rapid3rt.calibrate.measure import Bench
from rapid3rt.calibrate.search import search as search_grid
from rapid3rt.pipeline import bundled_policy, model_id
from rapid3rt.planning.jsonfile import write_document
from rapid3rt.policies import WarpFamily
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.types import ActionCosts

FAMILY_EVALUATIONS = 24
"""Warps to try where there is no calibrated policy."""
_FREE = ("evaluations", "batch_size")
"""Settings that may change from one call to the next: more evaluations go on with the same search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A calibrated policy. costs: None where they were not measured."""

    path: Path
    family: WarpFamily
    costs: ActionCosts | None


def find_policy(policy: str | Path | None, pipe: Any) -> Start | None:
    """The policy to start from: a folder, else the bundled one of this model; None where there is none.

    Raises ValueError for one of another model.
    """
    model = model_id(pipe.transformer)
    path = bundled_policy(model) if policy is None else Path(policy)
    if path is None:
        return None
    content = PolicyFolder.load(path)
    if content.model != model:
        raise ValueError(f"policy must be calibrated for {model}, got one for {content.model}")
    if content.schedule is None:
        raise ValueError(f"policy must hold a searched family, got heads alone in {str(path)!r}")
    costs = content.costs if content.costs.measured else None
    return Start(path=path, family=content.schedule, costs=costs)


def identity(
    pipe: Any,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    start: Start | None,
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """What tells one search from another."""
    return {
        "model": model_id(pipe.transformer),
        "prompts": _digest(list(prompts)),
        "policy": None if start is None else _digest(asdict(start.family)),
        "call": _digest(told_apart(call)),
        **{name: value for name, value in settings.items() if name not in _FREE},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_claim(home: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where the folder is another search's, naming the field in which it is."""
    path = home / "search.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be the settings of a search, got {error}") from None
    for name, value in wanted.items():
        got = there.get(name) if isinstance(there, dict) else there
        if got != value:
            raise ValueError(
                f"{path}: {name} must be {value!r}, as asked for now, got {got!r} of another search; give another out "
                "or remove the folder"
            )


def claim(home: Path, wanted: Mapping[str, Any]) -> None:
    """Make the folder of this search, or go on in it. Raises ValueError as `check_claim`."""
    check_claim(home, wanted)
    if not (home / "search.json").exists():
        write_document(home / "search.json", wanted)


def take_over(bench: Bench, policy: Path) -> None:
    """Copy references and measurements of a calibration of the same model, prompts and arguments, where there are any.

    They take two thirds of an hour on a real model, and are the same.
    """
    theirs, references = policy / "measurements.json", policy / "references.safetensors"
    if not theirs.is_file() or not references.is_file() or (bench.out / references.name).exists():
        return
    values = json.loads(theirs.read_text())
    if values.get("calibration") != bench.key:
        return
    bench.values = {**values, **bench.values}
    write_document(bench.path, bench.values)
    copy = bench.out / f".{references.name}"
    shutil.copyfile(references, copy)
    copy.replace(bench.out / references.name)


def search_family(bench: Bench, seen: int) -> WarpFamily:
    """A short family search by the pairs that may decide, and by no others."""
    home = bench.out / "family"
    own = Bench(
        bench.pipe,
        bench.prompts[:seen],
        home,
        bench.steps,
        bench.seed,
        bench.batch_size,
        bench.call,
        bench.progress,
    )
    path = home / "references.safetensors"
    if not path.exists():
        images = {"images": bench.reference()[:seen].contiguous()}
        save_file(images, path, metadata={"calibration": own.key})
    return search_grid(own, FAMILY_EVALUATIONS)

# SPDX-License-Identifier: Apache-2.0
"""Policy folders: `config.json` beside the files it names. What `calibrate` writes and `accelerate(policy=DIR)` reads.

A folder holds a searched schedule family and the measured cost of every action on the machine that
calibrated it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapid3rt.planning.jsonfile import read_fields, write_document
from rapid3rt.policies.schedule import WarpFamily, load_schedule, save_schedule
from rapid3rt.types import ActionCosts

FORMAT, VERSION = "rapid3rt.policy", 1
_SCHEDULE = "schedule.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFolder:
    """A calibrated policy. model: id of the model it was made for; family: of its transformer.

    provenance: what a reader wants to know about its making (prompts, seeds, commands, errors
    before and after).
    """

    model: str
    schedule: WarpFamily
    costs: ActionCosts
    provenance: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder; existing files of the same names are replaced one by one, atomically."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_schedule(self.schedule, folder / _SCHEDULE)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "schedule",
            "model": self.model,
            "levels": list(self.costs.levels),
            "reuse": self.costs.reuse,
            "measured": self.costs.measured,
            "provenance": self.provenance,
        }
        write_document(folder / "config.json", document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PolicyFolder:
        """Read a folder. Raises ValueError naming the file and the field that is wrong."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            msg = f"policy must be a folder with a config.json, got {str(folder)!r}"
            raise ValueError(msg)
        fields = read_fields(folder / "config.json", kind=FORMAT, version=VERSION)
        fields.text("kind", ("schedule",))
        levels = fields.numbers("levels", 0.0)
        if not levels:
            fields.fail("levels", "hold at least the dense cost", [])
        if not (folder / _SCHEDULE).is_file():
            msg = f"policy folder {str(folder)!r} must hold a {_SCHEDULE}, got none"
            raise ValueError(msg)
        schedule = load_schedule(folder / _SCHEDULE)
        if not isinstance(schedule, WarpFamily):
            msg = f"{folder / _SCHEDULE}: kind must be 'family' in a policy folder, got 'fixed'"
            raise ValueError(msg)
        provenance = fields.get("provenance")
        return cls(
            model=fields.text("model"),
            schedule=schedule,
            costs=ActionCosts(
                levels=levels,
                reuse=fields.number("reuse", 0.0),
                measured=fields.flag("measured"),
            ),
            provenance=provenance if isinstance(provenance, dict) else {},
        )

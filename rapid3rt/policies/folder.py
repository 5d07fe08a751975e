# SPDX-License-Identifier: Apache-2.0
"""Policy folders: `config.json` beside the files it names. What `calibrate` and training write, `accelerate` reads.

`kind` `schedule`: a searched family (`schedule.json`) and the measured cost of every action. `kind` `learned`: trained
heads (`heads.safetensors`) on top of it, and what they cost and reach at every dial. Folders travel over the hub:
`save_pretrained`, `from_pretrained`, `push_to_hub`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load, save

from rapid3rt.planning.jsonfile import Fields, check_document, read_fields, write_document
from rapid3rt.policies.learned import Dial, Heads, HeadsConfig
from rapid3rt.policies.schedule import WarpFamily, load_schedule, save_schedule
from rapid3rt.types import ADAMS_BASHFORTH, AUTO, ActionCosts

FORMAT, VERSION = "rapid3rt.policy", 1
PATTERNS = ("*.json", "*.safetensors")
"""The files of a folder."""
_SCHEDULE, _HEADS = "schedule.json", "heads.safetensors"
_CARD = """---
{{ card_data }}
---

# A policy for [rapid3rt](https://github.com/rapid3rt/rapid3rt)

It decides, for every image of a batch on its own, how far a diffusion transformer steps and what it computes.

    rapid3rt.accelerate(pipe, policy="this repository", speed=2.5)

`config.json` names the model it was made for and says how it was made.
"""


@dataclass(kw_only=True)
class PolicyFolder(
    ModelHubMixin,
    library_name="rapid3rt",
    tags=["rapid3rt", "diffusion"],
    model_card_template=_CARD,
):
    """A policy at rest.

    model: id of the model it was made for. schedule: the searched family, None for heads that have no prior. costs: of
    the actions, measured. provenance: what a reader wants to know about its making (prompts, seeds, commands, errors
    before and after). heads: the trained part, None for a searched family alone. order: of the heads' steps.
    calibration: what was measured at every dial, dials rising. latent_grid: rows and columns of the image tokens that
    the heads were trained on.
    """

    model: str
    schedule: WarpFamily | None
    costs: ActionCosts
    provenance: dict[str, Any]
    heads: Heads | None = None
    order: int = AUTO
    calibration: tuple[Dial, ...] = ()
    latent_grid: tuple[int, int] | None = field(default=None)

    @property
    def family(self) -> str:
        """Of the transformers that it is for."""
        if self.heads is not None:
            return self.heads.config.family
        assert self.schedule is not None
        return self.schedule.family

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder; existing files of the same names are replaced one by one, atomically.

        config.json, which knows the weights by their digest, comes last: what a crash leaves half new does not load.
        Raises `ValueError` for numbers that are not finite, `OSError`, before anything is replaced.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": "schedule" if self.heads is None else "learned",
            "model": self.model,
            "levels": list(self.costs.levels),
            "reuse": self.costs.reuse,
            "measured": self.costs.measured,
            "provenance": self.provenance,
        }
        if self.heads is not None:
            document["learned"] = {
                "heads": {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in asdict(self.heads.config).items()
                },
                "order": self.order,
                "calibration": [asdict(dial) for dial in self.calibration],
                "latent_grid": None if self.latent_grid is None else list(self.latent_grid),
            }
            weights = save({n: x.contiguous() for n, x in self.heads.state_dict().items()})
            document["learned"]["weights"] = hashlib.sha256(weights).hexdigest()
            check_document(document)
            _replace(folder / _HEADS, weights)
        if self.schedule is not None:
            save_schedule(self.schedule, folder / _SCHEDULE)
        write_document(folder / "config.json", document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PolicyFolder:
        """Read a folder. Raises ValueError naming the file and the field that is wrong."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            msg = f"policy must be a folder with a config.json, got {str(folder)!r}"
            raise ValueError(msg)
        config = read_fields(folder / "config.json", kind=FORMAT, version=VERSION)
        is_learned = config.text("kind", ("schedule", "learned")) == "learned"
        levels = config.numbers("levels", 0.0)
        if not levels:
            config.fail("levels", "hold at least the dense cost", [])
        learned = _read_learned(folder, config.child("learned")) if is_learned else {}
        schedule = None
        if not is_learned or learned["heads"].config.has_prior:
            schedule = _read_family(folder)
        if is_learned:
            _check_fit(config.child("learned").child("heads"), learned["heads"], schedule, levels)
        provenance = config.get("provenance")
        return cls(
            model=config.text("model"),
            schedule=schedule,
            costs=ActionCosts(
                levels=levels,
                reuse=config.number("reuse", 0.0),
                measured=config.flag("measured"),
            ),
            provenance=provenance if isinstance(provenance, dict) else {},
            **learned,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> PolicyFolder:
        if Path(model_id).is_dir():
            return cls.load(model_id)
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        given = {name: options[name] for name in names if name in options}
        return cls.load(snapshot_download(model_id, allow_patterns=list(PATTERNS), **given))


def _replace(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _read_family(folder: Path) -> WarpFamily:
    if not (folder / _SCHEDULE).is_file():
        msg = f"policy folder {str(folder)!r} must hold a {_SCHEDULE}, got none"
        raise ValueError(msg)
    schedule = load_schedule(folder / _SCHEDULE)
    if not isinstance(schedule, WarpFamily):
        msg = f"{folder / _SCHEDULE}: kind must be 'family' in a policy folder, got 'fixed'"
        raise ValueError(msg)
    return schedule


def _read_learned(folder: Path, config: Fields) -> dict[str, Any]:
    with torch.device("meta"):  # no random numbers are drawn for weights that are read
        heads = Heads(_read_heads_config(config.child("heads")))
    path = folder / _HEADS
    if not path.is_file():
        raise ValueError(f"policy folder {str(folder)!r} must hold a {_HEADS}, got none")
    content = path.read_bytes()
    try:
        weights = {name: x.float() for name, x in load(content).items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: content must be the weights of the heads in config.json, got: {error}"
        ) from None
    _check_weights(path, weights, heads.state_dict())
    found = hashlib.sha256(content).hexdigest()
    if config.data.get("weights", found) != found:
        named = config.text("weights")
        config.fail("weights", f"be the digest of {_HEADS}, {found[:12]}; save both anew", named)
    told = torch.tensor(heads.config.dials)
    for name, dials in weights.items():
        if name.endswith(".dials") and not torch.equal(dials, told):
            known = [round(dial, 4) for dial in dials.tolist()]
            config.child("heads").fail("dials", f"be those of {_HEADS}, {known}", told.tolist())
    heads.load_state_dict(weights, assign=True)
    heads.eval().requires_grad_(False)
    grid = None if config.get("latent_grid") is None else config.numbers("latent_grid", 1)
    if grid is not None and len(grid) != 2:
        config.fail("latent_grid", "be null or two numbers", list(grid))
    return {
        "heads": heads,
        "order": config.integer("order", AUTO, ADAMS_BASHFORTH),
        "calibration": _read_calibration(config),
        "latent_grid": None if grid is None else (int(grid[0]), int(grid[1])),
    }


def _check_weights(
    path: Path, weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Raise ValueError for the first weight that the heads in config.json do not have, or have in another shape."""
    for name in sorted(weights.keys() | expected.keys()):
        there, here = (
            f"of shape {tuple(x[name].shape)}" if name in x else "absent"
            for x in (weights, expected)
        )
        if there != here:
            raise ValueError(f"{path}: {name} must be {here}, as config.json has it, got {there}")
        if not bool(weights[name].isfinite().all()):
            raise ValueError(f"{path}: {name} must be finite, got NaN or infinity")


def _check_fit(
    config: Fields, heads: Heads, schedule: WarpFamily | None, levels: Sequence[float]
) -> None:
    """Heads, schedule and costs of one folder must be of one model."""
    if schedule is not None and schedule.family != heads.config.family:
        config.fail("family", f"be that of {_SCHEDULE}, {schedule.family!r}", heads.config.family)
    if "sparse" in heads.config.heads and heads.config.levels > len(levels):
        config.fail("levels", f"be at most the {len(levels)} that have costs", heads.config.levels)


def _read_heads_config(config: Fields) -> HeadsConfig:
    names = config.array("heads")
    config.check_names([f.name for f in fields(HeadsConfig)])
    try:
        return HeadsConfig(
            family=config.text("family"),
            channels=config.integer("channels", 1),
            conditioning=config.integer("conditioning", 1),
            heads=tuple(names),
            levels=config.integer("levels", 1),
            width=config.integer("width", 1),
            side=config.optional_integer("side", 1),
            has_prior=config.flag("has_prior"),
            dials=config.numbers("dials", 0.0),
            silent=config.numbers("silent", 0.0) if "silent" in config.data else (),
        )
    except (ValueError, TypeError) as error:
        if str(error).startswith(config.file):
            raise
        raise ValueError(f"{config.file}: {config.where}: {error}") from None


def _read_calibration(config: Fields) -> tuple[Dial, ...]:
    dials = tuple(
        Dial(**{f.name: entry.number(f.name, 0.0) for f in fields(Dial)})
        for entry in config.children("calibration")
    )
    rising = all(
        a.dial < b.dial and a.equivalent_steps < b.equivalent_steps for a, b in pairwise(dials)
    )
    if not rising:
        config.fail("calibration", "rise in dial and equivalent_steps", [d.dial for d in dials])
    return dials

# SPDX-License-Identifier: Apache-2.0
"""Evaluate policies on held-out pairs (METHOD.md, section 6): error at equal cost against every rival, and adaptivity.

    python -m training.evaluate POLICY [POLICY ...] --model tiny-sd3 --split test --out DIR

POLICY: folders of one recipe, one for each training seed. DIR gets `evaluate.json` (everything), `evaluate.md` (the
tables), pictures, and `cache` with every run, so that an interrupted evaluation goes on; give several evaluations one
`--cache` and they share the rivals' runs. The sizes that METHOD.md asks for are the defaults: hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

import rapid3rt
from rapid3rt.calibrate.command import make_folder, stop
from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.pipeline import BUNDLED_POLICIES, model_id
from rapid3rt.planning.jsonfile import write_document
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.tiny import GUIDANCE, bundled_names
from training import adaptivity, panels, ways
from training.comparison import OURS, Comparison, verdicts
from training.config import Dtype
from training.machine import machine, set_threads
from training.peers import has_cache_dit
from training.protocol import Calibration, Protocol, Settings
from training.study import Measured, Study
from training.tables import markdown
from training.ways import PLAIN

FORMAT, VERSION = "rapid3rt.evaluation", 1
_PREFIX = "tiny-"
_EXAMPLES, _EXAMPLES_FROM = 8, 64
_EXAMPLE_DIAL = 6


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    try:
        set_threads(options.threads)
        evaluate(options)
    except KeyboardInterrupt:
        stop("evaluate: stopped; the same command goes on with what it has measured")
    except (ValueError, OSError, UnsupportedError, StateError) as error:
        sys.exit(f"evaluate: {error}")


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Run, compare, write, print; returns the document."""
    out: Path = options.out
    make_folder(out)
    pipe = load_model(options.model, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    settings = _settings(options)
    for folder in (*settings.policies, settings.base):
        _check_policy(folder, settings.base, model_id(pipe.transformer))
    if not panels.can_draw():
        print("no pictures: they need matplotlib (pip install 'rapid3rt[plot]')", file=sys.stderr)
    if settings.peers is None and not has_cache_dit():
        print("not compared with cache-dit: pip install 'rapid3rt[bench]'", file=sys.stderr)
    protocol = Protocol(pipe, settings, options.cache or out / "cache")
    protocol.try_out()
    calibration = protocol.calibrate()
    study = protocol.study(calibration)
    document = describe(study, settings, calibration, options.model, options.dtype)
    write_document(out / "evaluate.json", document)
    pictures = panels.draw_all(document, out) if panels.can_draw() else []
    pictures.append(_draw_examples(protocol, study, out / "pairs.png"))
    text = markdown(document, [path.name for path in pictures])
    _write_text(out / "evaluate.md", text)
    print(text)
    return document


def load_model(name: str, dtype: str) -> Any:
    """The pipeline of a name such as `tiny-sd3`, in a dtype such as `float32`. Raises `ValueError` for one unknown."""
    known = [_PREFIX + bundled for bundled in bundled_names()]
    if name not in known:
        raise ValueError(f"model must be one of {', '.join(known)}, got {name!r}")
    return rapid3rt.load_tiny(name.removeprefix(_PREFIX), getattr(torch, dtype))


def describe(
    study: Study, settings: Settings, calibration: Calibration, model: str, dtype: str
) -> dict[str, Any]:
    """The document: what was asked, where it ran, what was measured and what it says. model, dtype: their names."""
    comparison = Comparison(study, settings.draws)
    chosen = asdict(settings)
    for name in ("policies", "base", "schedules"):
        del chosen[name]
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "settings": {"model": model, "dtype": dtype, **chosen},
        "machine": machine(),
        "policies": [_named(folder) for folder in settings.policies],
        "base": _named(settings.base),
        "schedules": [path.name for path in settings.schedules],
        "calibration": calibration.to_dict(),
        "ways": comparison.ways(),
        "against": comparison.against(),
        "iso": comparison.iso(),
        **adaptivity.everything(comparison),
    }
    document["verdicts"] = verdicts(document, settings.dials)
    # As a reader of the file sees it: keys are text, lists are lists.
    read: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return read


def _named(folder: Path) -> dict[str, str]:
    whole = folder.resolve()
    # Trainings leave theirs in RUN/policy: the run tells them apart.
    name = whole.parent.name if whole.name == "policy" else whole.name
    return {"name": name, "digest": ways.folder_digest(folder)}


def _check_policy(folder: Path, base: Path, model: str) -> None:
    """Of another model, on another grid or priced otherwise than its rivals, a policy makes numbers without meaning."""
    policy, rivals = PolicyFolder.load(folder), PolicyFolder.load(base)
    if policy.model != model:
        raise ValueError(
            f"policy must be made for {model}, got '{folder}', made for {policy.model}"
        )
    grids = policy.schedule, rivals.schedule
    families = {ways.digest(grid) for grid in grids if grid is not None}
    for name, same in (
        ("searched family", None in grids or len(families) == 1),
        ("action costs", policy.costs == rivals.costs),
    ):
        if not same:
            raise ValueError(
                f"base must have the {name} of the policy '{folder}', got another in '{base}'; "
                "name the folder that the policy was trained on with --base"
            )


def _draw_examples(protocol: Protocol, study: Study, path: Path) -> Path:
    """Eight pairs from easy to hard: the full run, plain steps, ours of the first seed."""
    dial = min(study.dials, key=lambda k: abs(k - _EXAMPLE_DIAL))
    first = min(_EXAMPLES_FROM, len(study.scenes))
    order = np.argsort(study.searched[study.tables[0]].error[0][:first])
    shown = order[np.linspace(0, first - 1, min(_EXAMPLES, first)).round().astype(int)]
    plain, ours = study.rivals["plain"][dial], study.ours[dial]
    chosen = (ways.plain(PLAIN), ways.plain(dial), protocol.ours[dial][0])
    images = [protocol.runs.outcome(way, first).images for way in chosen]
    examples = [
        panels.Example(
            caption=study.scenes[i].caption,
            images=tuple(batch[i] for batch in images),
            notes=tuple(_note(way, i) for way in (study.full, plain, ours)),
        )
        for i in shown
    ]
    panels.draw_grid(examples, (f"plain {PLAIN}", f"plain {dial}", f"{OURS}, mean {dial}"), path)
    return path


def _note(way: Measured, pair: int) -> str:
    return f"{way.nfe[0, pair]:.0f} evaluations, m {1000 * way.error[0, pair]:.2f}e-3"


def _write_text(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _settings(options: argparse.Namespace) -> Settings:
    names = {field.name for field in fields(Settings)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name in names and value is not None
    }
    given.setdefault("base", BUNDLED_POLICIES / options.model.removeprefix(_PREFIX) / "policy")
    # What was not asked for follows what was: a short run is a prefix of itself, a dial is no further mean.
    default = Settings(policies=given["policies"], base=given["base"])
    dials, pairs = given.get("dials", default.dials), given.get("pairs", default.pairs)
    for name in ("others", "calibration"):
        given.setdefault(name, min(getattr(default, name), pairs))
    given.setdefault("means", _further_means(given["policies"], default.means, dials))
    given.setdefault("claimed", tuple(k for k in default.claimed if k in dials))
    return Settings(**given)


def _further_means(
    policies: Sequence[Path], means: Sequence[float], dials: Sequence[int]
) -> tuple[float, ...]:
    """The means within what all policies were calibrated for, the ends of that in place of those beyond."""
    tables = [PolicyFolder.load(folder).calibration for folder in policies]
    low = max((table[0].equivalent_steps for table in tables if table), default=0.0)
    high = min((table[-1].equivalent_steps for table in tables if table), default=float(PLAIN))
    inside = {min(max(k, math.ceil(100 * low) / 100), math.floor(100 * high) / 100) for k in means}
    return tuple(sorted(inside - set(dials)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("policies", type=Path, nargs="+", metavar="POLICY", help="folders, one per training seed")
    add("--model", required=True, help="tiny-sd3 or tiny-flux")
    add("--out", type=Path, required=True, help="folder of the results")
    add("--cache", type=Path, help="folder of the runs, may be shared; else OUT/cache")
    add("--base", type=Path, help="calibrated folder they started from; else the bundled one")
    add("--schedule", dest="schedules", type=Path, action="append", help="a searched schedule")
    add("--split", help="train, calibration, validation or test; else test")
    add("--seed", type=int, help="of the pairs; else 0")
    add("--pairs", type=int, help="for the main ways; else 1000")
    add("--others", type=int, help="prefix of them for the other ways; else 256")
    add("--calibration", type=int, help="validation pairs that set the rivals; else 64, or PAIRS")
    add("--dials", type=int, nargs="+", help="means that are compared; else 5 6 8 10 14")
    add("--means", type=float, nargs="*", help="further means, of ours alone; else 4 12")
    add("--claimed", type=int, nargs="*", help="dials of the shuffled control; else 6 8")
    add("--derangements", type=int, help="shuffles of each; else 2")
    add("--reference", type=int, help="steps of the converged solutions; else 120")
    add("--draws", type=int, help="of the bootstrap; else 2000")
    dtypes = get_args(Dtype)
    add("--dtype", choices=dtypes, default="float32", help="of the generator; else float32")
    add(
        "--peers",
        nargs="*",
        metavar="CACHE",
        help="caches of others to compare with; else all that are installed, without names none",
    )
    add("--guidance", type=float, help=f"guidance scale of the call; else {GUIDANCE:g}")
    add("--threads", type=int, default=0, help="of torch, 0: as it chooses; else 0")
    return parser


if __name__ == "__main__":
    main()

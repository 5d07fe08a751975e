# SPDX-License-Identifier: Apache-2.0
"""From the name of a policy to the policy. A new rule is one line in `_MAKERS` and in `GRAMMAR`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from rapid3rt.planning.trace import Trace
from rapid3rt.policies.controller import Controller
from rapid3rt.policies.fixed import Dense, Steps
from rapid3rt.policies.replay import Replay
from rapid3rt.policies.schedule import schedule_policy
from rapid3rt.policies.threshold import Threshold
from rapid3rt.types import ADAMS_BASHFORTH, AUTO, EULER, Policy

GRAMMAR = {
    "dense": "dense",
    "steps": "steps:K[/trim][/ab2|/auto]",
    "threshold": "threshold:X[/ab2|/auto]",
    "controller": "controller:TOL",
    "schedule": "schedule:FILE",
    "replay": "replay:FILE",
}


def parse(name: str) -> Policy:
    """Make the policy that `name` stands for, such as `steps:9/trim/ab2` or `schedule:sd3.json`.

    Raises
    ------
    ValueError
        The name is unknown (the known ones are listed, nearest first), malformed (what is wrong is
        said), or its file is corrupt or foreign (file and field are named).
    FileNotFoundError
        A schedule or trace is not there.
    """
    kind, colon, argument = name.partition(":")
    if kind not in _MAKERS:
        known = ", ".join(known_names(kind))
        msg = f"policy must be one of {known}, auto, or a policy folder that is here, got '{name}'"
        raise ValueError(msg)
    if bool(argument) != (":" in GRAMMAR[kind]) or (colon and not argument):
        raise _malformed(kind, name)
    return _MAKERS[kind](argument)


def is_rule(name: str) -> bool:
    """Whether a name is of a rule that `parse` knows or should complain about, and not of a folder or hub id."""
    kind, colon, _ = name.partition(":")
    if kind in GRAMMAR:
        return True
    is_path = "/" in kind or kind.startswith((".", "~")) or Path(name).is_dir()
    return bool(colon) and not is_path


def known_names(near: str = "") -> list[str]:
    """The grammar of every policy, those whose name is nearest to `near` first."""

    def distance(kind: str) -> float:
        return -difflib.SequenceMatcher(None, near.lower(), kind).ratio()

    return [GRAMMAR[kind] for kind in sorted(GRAMMAR, key=distance)]


def _malformed(kind: str, name: str) -> ValueError:
    return ValueError(f"policy '{kind}' must be written {GRAMMAR[kind]}, got '{name}'")


def _options(kind: str, argument: str, allowed: tuple[str, ...]) -> tuple[str, set[str]]:
    """The value before the first slash and the options after it, each known and given once."""
    value, *options = argument.split("/")
    if len(set(options)) != len(options) or not set(options) <= set(allowed):
        raise _malformed(kind, f"{kind}:{argument}")
    return value, set(options)


def _float(kind: str, argument: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise _malformed(kind, f"{kind}:{argument}") from None


def _order(kind: str, argument: str, options: set[str]) -> int:
    if {"ab2", "auto"} <= options:
        raise _malformed(kind, f"{kind}:{argument}")
    return ADAMS_BASHFORTH if "ab2" in options else AUTO if "auto" in options else EULER


def _steps(argument: str) -> Policy:
    value, options = _options("steps", argument, ("trim", "ab2", "auto"))
    if not (value.isascii() and value.isdigit()):
        msg = "steps"
        raise _malformed(msg, f"steps:{argument}")
    return Steps(int(value), trim="trim" in options, order=_order("steps", argument, options))


def _threshold(argument: str) -> Policy:
    value, options = _options("threshold", argument, ("ab2", "auto"))
    return Threshold(
        _float("threshold", argument, value), order=_order("threshold", argument, options)
    )


_MAKERS: dict[str, Callable[[str], Policy]] = {
    "dense": lambda _: Dense(),
    "steps": _steps,
    "threshold": _threshold,
    "controller": lambda argument: Controller(_float("controller", argument, argument)),
    "schedule": schedule_policy,
    "replay": lambda argument: Replay(Trace.load(argument), name=f"replay:{argument}"),
}

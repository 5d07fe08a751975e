# SPDX-License-Identifier: Apache-2.0
"""The ways to make an image that an evaluation compares (METHOD.md, section 6): ours, every rival, the controls.

A way opens a context in which one call of the pipeline makes a batch. Its key says everything that its images depend
on besides pipeline, prompts and noises, the contents of its files included: results are stored under it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rapid3rt.policies.controller import Controller
from rapid3rt.policies.replay import Replay
from rapid3rt.policies.schedule import (
    FixedPlan,
    FixedSchedule,
    ScheduleFamily,
    WarpFamily,
)
from rapid3rt.policies.threshold import Threshold
from rapid3rt.runtime.trace import Trace
from rapid3rt.tiny.rivals import solver
from rapid3rt.types import COMPUTE, ActionCosts
from training.bank import accelerated
from training.peers import Peer, Setting

PLAIN = 28
"""Steps of the call that users make."""
Opened = AbstractContextManager[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way.

    key: of its results. steps: `num_inference_steps` of the call. evaluations: that an image is expected to take, for
    the progress bar. open: makes the context for one call, from the pipeline and the number of its first pair; it may
    give the `Work` that tells what was spent. costs: prices its actions; None where the run does, by a table of its
    own. alone: every image has a call of its own, else every batch.
    """

    key: str
    evaluations: float
    open: Callable[[Any, int], Opened]
    steps: int = PLAIN
    costs: ActionCosts | None = None
    alone: bool = False


def plain(k: int) -> Way:
    """The pipeline as it is, at k steps."""
    return Way(key=f"plain k={k}", evaluations=k, steps=k, open=lambda *_: nullcontext())


def multistep(name: str, k: int) -> Way:
    """A multistep solver of diffusers, one of `rapid3rt.tiny.rivals.SOLVERS`, at k steps."""
    return Way(key=f"{name} k={k}", evaluations=k, steps=k, open=lambda pipe, _: solver(pipe, name))


def converged(k: int) -> Way:
    """The converged solution: k even steps of the highest order that is stable."""
    return replace(steps(k, "trim/auto", ActionCosts()), steps=k)


def steps(k: int, rule: str, costs: ActionCosts) -> Way:
    """`steps:k/RULE` for all images. rule: trim, trim/ab2 or trim/auto."""
    return _policy(f"steps:{k}/{rule}", k, lambda: f"steps:{k}/{rule}", costs)


def searched(family: WarpFamily, k: int, costs: ActionCosts) -> Way:
    """The searched family at k evaluations for every image."""
    key = f"searched {digest(family)} k={k}"
    return _policy(key, k, lambda: ScheduleFamily(family, budget=k), costs)


def allocated(family: WarpFamily, mean: float, costs: ActionCosts) -> Way:
    """The searched family with its searched allocation, asked for a mean of evaluations: before anything is learned."""
    key = f"allocated {digest(family)} by {_short(family.allocation and asdict(family.allocation))} mean={mean!r}"
    return _policy(key, mean, lambda: ScheduleFamily(family, speed=PLAIN / mean), costs)


def fixed(plan: FixedPlan, costs: ActionCosts, name: str = "schedule") -> Way:
    """A fixed schedule. name: for its errors."""
    computes = sum(tick.action == COMPUTE for tick in plan.ticks)
    return _policy(
        f"schedule {digest(plan)}", computes, lambda: FixedSchedule(plan, name=name), costs
    )


def controller(tolerance: float, family: WarpFamily, k: float, costs: ActionCosts) -> Way:
    """`controller:tolerance` on the searched grid, which is expected to take k evaluations."""
    key = f"controller:{tolerance!r} on {digest(family)}"
    return _policy(key, k, lambda: Controller(tolerance, family=family, order=family.order), costs)


def threshold(x: float, k: float, costs: ActionCosts) -> Way:
    """`threshold:x`, which is expected to take k evaluations."""
    return _policy(f"threshold:{x!r}", k, lambda: Threshold(x), costs)


def cached(peer: Peer, setting: Setting, evaluations: float) -> Way:
    """The plain pipeline under a cache of others, which is expected to cost so many evaluations."""
    key = f"{peer.name} steps={setting.steps} warm={setting.warm_up} reach={setting.reach!r}"
    return Way(
        key=key,
        evaluations=evaluations,
        steps=setting.steps,
        open=lambda pipe, _: peer.open(pipe, setting),
        alone=True,
    )


def served(folder: Path, mean: float) -> Way:
    """A policy folder as users load it, asked for a mean of evaluations. The folder prices its own actions."""
    speed = PLAIN / mean
    key = f"policy {folder_digest(folder)} speed={speed!r}"
    return Way(
        key=key, evaluations=mean, open=lambda pipe, _: accelerated(pipe, folder, speed=speed)
    )


def shuffled(way: Way, traces: Sequence[Trace], order: Sequence[int], name: str) -> Way:
    """Every image walks another image's trace (the shuffled control).

    traces: of the way's batches, in order; they price the actions. order: image i takes the plan of image `order[i]`,
    both counted over all batches. name: tells this order from others in the key.
    """
    plans = [ticks for trace in traces for ticks in trace.images]
    firsts = itertools.accumulate((len(trace.images) for trace in traces), initial=0)
    batches = dict(zip(firsts, traces, strict=False))

    def open_batch(pipe: Any, start: int) -> Opened:
        batch = batches[start]
        taken = tuple(plans[j] for j in order[start : start + len(batch.images)])
        return accelerated(pipe, Replay(replace(batch, images=taken), name="shuffled"))

    key = f"{way.key} shuffled {name}"
    return replace(way, key=key, open=open_batch, costs=traces[0].costs)


def _policy(key: str, evaluations: float, make: Callable[[], Any], costs: ActionCosts) -> Way:
    return Way(
        key=key,
        evaluations=evaluations,
        open=lambda pipe, _: accelerated(pipe, make()),
        costs=costs,
    )


def digest(plan: FixedPlan | WarpFamily) -> str:
    """What a schedule does, as a short name: its provenance and its allocation do not count."""
    content = asdict(plan)
    content.pop("provenance")
    content.pop("allocation", None)
    if content.get("fit") is None:
        content.pop("fit", None)
    return _short(content)


def _short(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def folder_digest(folder: Path) -> str:
    """Contents of a policy folder as a short name: config, schedule and weights.

    Raises `ValueError` where there is no config.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"policy must be a folder with a config.json, got '{folder}'")
    files = {folder / "config.json", folder / "schedule.json", *folder.glob("*.safetensors")}
    found = hashlib.sha256()
    for file in sorted(f for f in files if f.is_file()):
        found.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:12]

# SPDX-License-Identifier: Apache-2.0
"""accelerate, restore, report: the only place that wires adapters, policies and the session together."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rapid3rt import ops
from rapid3rt.adapters import ADAPTERS, Adapter
from rapid3rt.errors import StateError, UnsupportedError, check_count, check_number
from rapid3rt.policies import is_rule, parse
from rapid3rt.policies.base import evaluations_at
from rapid3rt.policies.budget import BudgetedDense, with_budget, with_speed
from rapid3rt.policies.controller import Controller
from rapid3rt.policies.fixed import Dense
from rapid3rt.policies.folder import PATTERNS, PolicyFolder
from rapid3rt.policies.learned import LearnedPolicy
from rapid3rt.policies.schedule import ScheduleFamily
from rapid3rt.runtime.executor import Executor
from rapid3rt.runtime.frames import pipeline_call
from rapid3rt.runtime.report import Report
from rapid3rt.runtime.session import Choice, Session
from rapid3rt.runtime.twins import (
    make_controlnet_twin,
    make_scheduler_twin,
    make_transformer_twin,
)
from rapid3rt.runtime.twins.base import real_class, session_of
from rapid3rt.runtime.twins.scheduler import check_scheduler
from rapid3rt.runtime.twins.transformer import check_transformer
from rapid3rt.types import ATTENTION_MODES, AUTO, ActionCosts, Policy

BUNDLED_POLICIES = Path(__file__).parent / "tiny" / "assets"
DEFAULT_SPEED = 2.5
_SWAPPED = ("transformer", "scheduler", "controlnet")


def accelerate(
    pipe: Any,
    policy: str | os.PathLike[str] | Policy = "auto",
    *,
    budget: int | None = None,
    speed: float | None = None,
    attention: str = "exact",
    backend: str | None = None,
) -> Any:
    """Let a policy decide, for every image of every batch of this pipeline, what to compute.

    Swaps the transformer, the scheduler and, where there is one, the ControlNet of this pipeline object for twins; the
    call of the pipeline does not change.

    Residuals live as long as a call of the pipeline. After an exception in a callback or another part of the pipeline
    that is none of these, they stay until the next call or `restore`.

    Parameters
    ----------
    pipe: a diffusers pipeline with a supported transformer and a FlowMatch Euler scheduler.
    policy: a `Policy`, "auto", "dense", "steps:K[/trim][/ab2|/auto]", "threshold:X", "controller:X", "schedule:FILE",
        "replay:FILE", or the folder (or hub id) of a calibrated policy.
    budget: hard cap on the evaluations of every image, 1 to the run's steps.
    speed: asks for steps / speed evaluations, at least 1: a mean over images where the policy has an allocation, else a
        budget. At most one of budget and speed.
    attention: "exact" keeps dense rows on the model's own attention; "fast" sends every row to the sparse kernel.
    backend: kernels to use, as in `rapid3rt.ops`; None chooses.

    Returns
    -------
    The same pipeline object.

    Raises
    ------
    ValueError: unknown policy, budget or speed out of range, or a combination that has no meaning.
    UnsupportedError: a transformer, scheduler or component that cannot be served.
    StateError: the pipeline is accelerated already.
    """
    _refuse_twins(pipe)
    _refuse_running(pipe)
    adapter = find_adapter(pipe)
    controlnet = find_controlnet(pipe, adapter)
    check_scheduler(pipe.scheduler)
    check_transformer(pipe.transformer)
    if attention not in ATTENTION_MODES:
        raise ValueError(f"attention must be 'exact' or 'fast', got {attention!r}")
    ops.require(backend, device_of(pipe))
    budget, speed = _check_dial(budget, speed)
    model = model_id(pipe.transformer)
    source = _resolve(policy, model, adapter.family)
    is_usual = budget is None and speed is None and source.wants_dial
    if is_usual:
        speed = DEFAULT_SPEED
    _limit(
        source.policy, budget, speed
    )  # refuses meaningless combinations now, not at the first call
    executor = Executor(adapter, backend, attention == "exact")
    choose = partial(_choose, source, budget, speed, is_usual)
    session = Session(pipe, adapter, executor, choose, source.costs, model)
    real_transformer, real_scheduler = pipe.transformer, pipe.scheduler
    session.real = (real_transformer, real_scheduler, controlnet)
    session.scheduler = make_scheduler_twin(real_scheduler, session)
    pipe.transformer = make_transformer_twin(real_transformer, session, adapter.attention_kwargs)
    pipe.scheduler = session.scheduler
    if controlnet is not None:
        pipe.controlnet = make_controlnet_twin(controlnet, session)
    return pipe


def restore(pipe: Any) -> Any:
    """Put the pipeline's own transformer, scheduler and ControlNet back; what was exchanged meanwhile stays.

    A pipeline that was made from an accelerated one gets the real ones too; the other stays accelerated. Raises
    StateError if there is nothing to restore.
    """
    sessions = [_session_behind(getattr(pipe, name, None)) for name in _SWAPPED]
    _refuse_running(pipe)
    for name in _SWAPPED:
        _refuse_wrapped(name, getattr(pipe, name, None))
    if not any(sessions):
        raise StateError("pipe must be accelerated first: rapid3rt.accelerate(pipe)")
    for i, session in enumerate(sessions):
        if session is not None:
            setattr(pipe, _SWAPPED[i], _real_behind(getattr(pipe, _SWAPPED[i]), session, i))
    for session in sessions:
        if session is not None and session.pipe is pipe:
            session.close()
    return pipe


def report(pipe: Any) -> Report:
    """What the last call of an accelerated pipeline did, per image. Raises StateError before the first call."""
    return _session(pipe).report()


def model_id(transformer: Any) -> str:
    """Name of a transformer by its class and configuration: what traces and policy folders are made for."""
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(transformer).__name__}-{digest[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A policy before any run: what it is, what its actions cost, whether it needs a budget or speed to save work.

    policy None: evenly spaced steps, second-order where that is stable, as many as the budget or speed gives.
    """

    policy: Policy | None
    name: str
    costs: ActionCosts
    wants_dial: bool = False
    notes: tuple[str, ...] = ()


def _resolve(policy: str | os.PathLike[str] | Policy, model: str, family: str) -> _Source:
    if isinstance(policy, os.PathLike):
        policy = str(Path(policy).absolute())
    if not isinstance(policy, str):
        if isinstance(policy, type) or not isinstance(policy, Policy):
            got = (
                f"the class {policy.__name__}"
                if isinstance(policy, type)
                else type(policy).__name__
            )
            raise ValueError(
                f"policy must be a name or have begin, decide_compute and decide_step, got {got}"
            )
        return _Source(
            policy=policy,
            name=getattr(policy, "name", type(policy).__name__),
            costs=getattr(policy, "costs", ActionCosts()),
        )
    if policy == "auto":
        return _automatic(model)
    folder = _folder(policy)
    if folder is None:
        parsed = parse(policy)
        bundled = bundled_policy(model)
        if bundled is None:
            return _Source(policy=parsed, name=policy, costs=ActionCosts())
        known = PolicyFolder.load(bundled)
        if isinstance(parsed, Controller) and known.schedule is not None:
            # Its step sizes are factors on a grid: the one that was searched for this model.
            parsed = Controller(parsed.tol, family=known.schedule, order=known.schedule.order)
        return _Source(policy=parsed, name=policy, costs=known.costs)
    loaded = PolicyFolder.load(folder)
    if loaded.family != family:
        raise ValueError(
            f"policy {policy!r} must be for a {family} model, got one for {loaded.family}"
        )
    notes = (
        ()
        if loaded.model == model
        else (f"the policy was calibrated on {loaded.model}, this model is {model}",)
    )
    name = f"{'learned' if loaded.heads is not None else 'schedule family'} {folder.name}"
    return _Source(
        policy=loaded_policy(loaded, name),
        name=policy,
        costs=loaded.costs,
        wants_dial=loaded.schedule is not None,
        notes=notes,
    )


def loaded_policy(folder: PolicyFolder, name: str) -> ScheduleFamily | LearnedPolicy:
    """What a policy folder holds, ready to run."""
    if folder.heads is None:
        assert folder.schedule is not None
        return ScheduleFamily(folder.schedule, name=name)
    return LearnedPolicy(
        folder.heads,
        folder.schedule,
        order=folder.order,
        name=name,
        calibration=folder.calibration,
        costs=folder.costs,
    )


def _automatic(model: str) -> _Source:
    """The bundled policy of this model, else the best rule that needs no learning."""
    bundled = bundled_policy(model)
    if bundled is not None:
        loaded = PolicyFolder.load(bundled)
        what = "searched schedule family" if loaded.heads is None else "learned policy"
        policy = loaded_policy(loaded, f"{what} (bundled)")
        return _Source(policy=policy, name=policy.name, costs=loaded.costs, wants_dial=True)
    note = (
        "no policy is bundled for this model: evenly spaced steps, second-order where stable; "
        "rapid3rt.calibrate does better"
    )
    return _Source(
        policy=None,
        name="steps/trim/auto",
        costs=ActionCosts(),
        wants_dial=True,
        notes=(note,),
    )


def _choose(
    source: _Source, budget: int | None, speed: float | None, is_usual: bool, ticks: int
) -> Choice:
    """The policy of one run. ticks: of the call's whole grid; a strength may leave fewer to the run.

    is_usual: whether the speed is nobody's wish, so that the nearest one that the policy can do will do.
    """
    if budget is not None and budget > ticks:
        raise ValueError(f"budget must be 1 to {ticks} (the steps of this call), got {budget}")
    policy = _limit(source.policy, budget, speed, ticks)
    if is_usual and isinstance(policy, LearnedPolicy):
        policy = policy.limited(speed=speed, takes_nearest=True)
    allocates = getattr(policy, "allocates", False)
    # A policy of the user's own does not plan for a cap: when it is spent, the session lets the image reuse.
    is_capped = budget is not None or (speed is not None and speed > 1)
    reuses = (policy is source.policy and is_capped) or getattr(policy, "reuses", True)
    limit = partial(_cap, source.notes, budget, speed, allocates)
    return Choice(policy=policy, name=source.name, reuses=reuses, limit=limit)


def _cap(
    notes: tuple[str, ...], budget: int | None, speed: float | None, allocates: bool, ticks: int
) -> tuple[int | None, tuple[str, ...]]:
    """The hard cap of a run of so many ticks, and the notes of its report."""
    if budget is not None and budget > ticks:
        return ticks, (*notes, f"budget={budget} is more than the {ticks} steps that are left here")
    if speed is None or speed == 1:
        return budget, notes
    if allocates:
        note = (
            f"speed={speed:g} is a mean of {ticks / speed:.3g} evaluations, more for images that need more; a budget "
            "gives every image the same"
        )
        return None, (*notes, note)
    cap = evaluations_at(ticks, speed)
    note = f"speed={speed:g} became budget={cap} of {ticks} steps: this policy has no calibration table"
    return cap, (*notes, note)


def _limit(
    policy: Policy | None, budget: int | None, speed: float | None, ticks: int | None = None
) -> Policy:
    """Fit a policy to a budget or speed. Raises ValueError where the combination has no meaning."""
    if policy is None:
        if ticks is None or speed == 1 or budget == ticks:
            return Dense()
        return BudgetedDense(budget, speed=speed, order=AUTO)
    if budget is not None:
        return (
            policy if isinstance(policy, Dense) and budget == ticks else with_budget(policy, budget)
        )
    if speed is not None:
        return with_speed(policy, speed)
    return policy


def _check_dial(budget: int | None, speed: float | None) -> tuple[int | None, float | None]:
    if budget is not None and speed is not None:
        raise ValueError(
            f"budget and speed must not both be given, got budget={budget}, speed={speed}"
        )
    if budget is not None:
        budget = check_count("budget", budget)
    if speed is not None:
        speed = check_number("speed", speed, lambda s: s >= 1, "a finite number of at least 1")
    return budget, speed


def find_adapter(pipe: Any) -> Adapter:
    """The adapter of a pipeline's transformer. UnsupportedError: there is none, or it refuses this variant."""
    transformer = getattr(pipe, "transformer", None)
    adapter = next(
        (a for a in ADAPTERS if transformer is not None and a.supports(transformer)), None
    )
    families = ", ".join(a.family for a in ADAPTERS)
    if adapter is None:
        raise UnsupportedError(
            f"transformer must be of a supported family ({families}), got {type(transformer).__name__} "
            f"in {type(pipe).__name__}; use it as it is: nothing has been changed"
        )
    return adapter


def find_controlnet(pipe: Any, adapter: Adapter) -> Any:
    """The pipeline's ControlNet, None where it has none. UnsupportedError: it is not of the transformer's family."""
    controlnet, classes = getattr(pipe, "controlnet", None), adapter.controlnet.classes
    if controlnet is not None and not isinstance(controlnet, classes):
        names = ", ".join(c.__name__ for c in classes)
        required = f"one of {names}" if classes else f"None on {adapter.family}"
        raise UnsupportedError(f"controlnet must be {required}, got {type(controlnet).__name__}")
    return controlnet


def _folder(policy: str) -> Path | None:
    """A local folder, or a snapshot of a hub id `org/name`; None for rule names, which win over a folder."""
    if is_rule(policy) or not policy:
        return None
    path = Path(policy).expanduser()
    if path.is_dir():
        return path
    is_path = policy.startswith((".", "/", "~")) or policy.count("/") > 1 or path.exists()
    if is_path:
        found = "a file" if path.exists() else "not there"
        raise ValueError(
            f"policy must be a rule or a folder that exists, got {policy!r}, which is {found}"
        )
    if "/" not in policy:
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(policy, allow_patterns=list(PATTERNS)))
    except Exception as error:
        raise ValueError(
            f"policy {policy!r} is neither a folder here nor on the hub ({error})"
        ) from error


def bundled_policy(model: str) -> Path | None:
    """Folder of the policy that the package carries for a model, None where there is none."""
    for config in sorted(BUNDLED_POLICIES.glob("*/policy/config.json")):
        if json.loads(config.read_text())["model"] == model:
            return config.parent
    return None


def _session_behind(component: Any) -> Session | None:
    """The session of a twin, also of one that `torch.compile` wrapped; None for what is no twin."""
    session: Session | None = session_of(getattr(component, "_orig_mod", component))
    return session


def _real_behind(component: Any, session: Session, which: int) -> Any:
    """What a twin stands for. A deep copy of a twin holds copied weights, so it becomes the real class itself."""
    twin, real = getattr(component, "_orig_mod", component), session.real[which]
    if twin is session.scheduler or twin.__dict__ is real.__dict__:
        return real
    twin.__class__ = real_class(twin)
    return twin


def _session(pipe: Any) -> Session:
    for name in _SWAPPED:
        session = _session_behind(getattr(pipe, name, None))
        if session is not None and session.pipe is pipe:
            return session
    raise StateError("pipe must be accelerated first: rapid3rt.accelerate(pipe)")


def _refuse_twins(pipe: Any) -> None:
    for name in _SWAPPED:
        if _session_behind(getattr(pipe, name, None)) is not None:
            raise StateError(
                f"pipe must not be accelerated already, nor have the {name} of an accelerated pipeline; call "
                "rapid3rt.restore(pipe) first"
            )


def _refuse_running(pipe: Any) -> None:
    if pipeline_call(pipe) is not None:
        raise StateError(
            "pipe must not be running, got a call from inside its own, such as a callback's; accelerate and restore "
            "between calls"
        )


def _refuse_wrapped(name: str, component: Any) -> None:
    """A twin inside a module of another library could be called, and restored, by nobody."""
    if not isinstance(component, torch.nn.Module) or _session_behind(component) is not None:
        return
    if any(session_of(module) is not None for module in component.modules()):
        raise StateError(
            f"the {name} of an accelerated pipeline must not be wrapped, got {type(component).__name__} around it; put "
            f"pipe.{name} back as it was after rapid3rt.accelerate, restore, and wrap it then"
        )


def device_of(pipe: Any) -> torch.device:
    """Where the transformer runs; its weights may be elsewhere while they are offloaded."""
    device: torch.device = getattr(pipe, "_execution_device", None) or pipe.transformer.device
    return device


__all__ = ["accelerate", "model_id", "report", "restore"]

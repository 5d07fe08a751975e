# SPDX-License-Identifier: Apache-2.0
"""Train policy heads: `python -m training.run RECIPE --out DIR [--field value]`.

    python -m training.run tiny-sd3 --out runs/tiny-sd3
    accelerate launch --num-processes 8 -m training.run flux-dev --policy DIR --prompts FILE --out runs/flux
    torchrun --nproc-per-node 2 -m training.run tiny-sd3 --threads 1 --out runs/tiny-sd3

`DIR/policy/` is what `accelerate(pipe, policy=...)` takes, `DIR/metrics.jsonl` has a row per iteration,
`DIR/checkpoints/` is what the same command goes on from. Every field of a recipe can be given; `--dry-run` shows them
all and what the run will cost.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from rapid3rt.calibrate.command import make_folder, stop
from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.learned import Dial, Heads, HeadsConfig
from training.allocation import fit_head, planned_steps, read_conditioning, read_pairs
from training.bank import REFERENCE_STEPS
from training.checkpoint import Checkpoints, alone, differences, random_state, set_random_state
from training.clone import clone
from training.config import Recipe, as_json
from training.describe import describe
from training.discriminator import Discriminator, DiscriminatorConfig, vae_features
from training.grpo import Trainer
from training.logs import Logs
from training.machine import set_threads
from training.pictures import Row, Sample
from training.ranks import Ranks
from training.recipes import RECIPES
from training.rewards import WeightedSum, make_reward, read_options
from training.seeds import seed_of
from training.subject import BUNDLED, Subject, load_subject, user_path
from training.validation import FURTHER_DIALS, Gains, Validation, no_excess
from training.ways import folder_digest

_FREE = (
    "iterations",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "rollout_batch",
    "calibration_pairs",
)
"""Fields that a run may change when it goes on."""
_REWARD_OPTIONS = {"scene": {"continuous": True}}
_SHOWN = 4
_PATIENCE = 5
"""Iterations in a row without any reward after which a run stops: a server may be away for a while."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What is asked for besides the recipe."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    out: Path
    """Folder of the run."""
    banks: Path = Path("runs/banks")
    """Where reference banks are kept, by model; runs share them."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint; `never` refuses a folder that holds one."""
    threads: int = 0
    """CPU threads, 0: as torch chooses."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    dry_run: bool = False
    """Print the resolved recipe and what it will cost, and stop."""
    reward_options: tuple[str, ...] = ()
    """Of the rewards in `quality`, as REWARD.OPTION=VALUE: `http.url=http://host:8000/score psnr.to=full`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    command = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        set_threads(command.threads)
        if command.dry_run:
            print(describe(command.recipe))
        else:
            train(command)
    except (ValueError, OSError, ImportError, UnsupportedError, StateError) as error:
        raise SystemExit(f"training.run: {error}") from None


def parse(arguments: Sequence[str]) -> Command:
    """Recipe and overrides. A name or field that is not known ends the program, naming the nearest."""
    known = ", ".join(RECIPES)
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(
            f"usage: python -m training.run RECIPE --out DIR [--field value]\nrecipes: {known}"
        )
    name, *rest = arguments
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1, 0.0)[0]
        raise SystemExit(f"recipe must be one of {known}, got {name!r}; the nearest is {near!r}")
    default = Command(recipe=RECIPES[name](), out=Path("runs") / name)
    try:
        return tyro.cli(Command, prog=f"training.run {name}", args=rest, default=default)
    except ValueError as error:
        raise SystemExit(f"training.run {name}: {error}") from None


def train(command: Command) -> Path:
    """Run a recipe to its end; returns the policy folder."""
    recipe, ranks = command.recipe, Ranks.join()
    ranks.require_equal("recipe", json.dumps(as_json(recipe)))
    with ExitStack() as held:
        if ranks.is_main:
            make_folder(command.out)
            if (command.out / "policy").exists() and not (command.out / "policy").is_dir():
                raise ValueError(f"out must hold no file named policy, got '{command.out}'")
            held.enter_context(alone(command.out))
        contents = ranks.main_first(lambda: _contents(command))
        checkpoints = ranks.main_first(lambda: _open_checkpoints(command, contents))
        try:
            return _train(command, ranks, checkpoints, contents, held)
        except KeyboardInterrupt:
            if not ranks.is_main:
                raise SystemExit(130) from None
            stop(
                f"training.run: stopped; the same command goes on after iteration {checkpoints.latest() or 0}"
            )


def _train(
    command: Command,
    ranks: Ranks,
    checkpoints: Checkpoints,
    contents: Mapping[str, Any],
    held: ExitStack,
) -> Path:
    """All that `train` does once the folder is its own. contents: of `_contents`. held: closes the log in the end."""
    recipe = command.recipe
    quality = _make_quality(recipe, command.reward_options)
    # Before the bank: a tracker that is missing must not show hours later.
    logs = held.enter_context(
        Logs(command.out, tracker=command.tracker, is_main=ranks.is_main, total=recipe.iterations)
    )
    subject = load_subject(recipe, command.banks / recipe.model.replace("/", "--"), ranks)
    for note in subject.notes:
        logs.say(note)
    heads = make_heads(recipe, subject).to(ranks.device)
    if subject.calibration is not None:  # what is wrong with it must not show when all is trained
        subject.calibration.converged()
        if heads.allocation is not None:
            read_conditioning(subject.calibration)
    trainer = None
    if heads.config.sampled:
        trainer = Trainer(
            recipe,
            subject,
            heads,
            ranks,
            quality=quality,
            discriminator=_make_discriminator(recipe, subject),
        )
    family = subject.searched.schedule
    validation = Validation(
        bank=subject.validation,
        family=family,
        order=recipe.order,
        costs=subject.searched.costs,
        ranks=ranks,
    )
    if trainer is None:
        best, fitted = 0, _warm_start(heads, subject, recipe, ranks, logs)
    else:
        best, fitted = _iterate(recipe, trainer, validation, checkpoints, contents, logs)
    calibration: tuple[Dial, ...] = ()
    gains: Gains = {}
    if subject.calibration is not None:
        logs.say("calibrating the dials")
        further = [dial for dial in FURTHER_DIALS if dial <= recipe.num_inference_steps]
        fresh = replace(validation, bank=subject.calibration)
        calibration, gains = fresh.calibrate(
            heads, recipe.dials, further, _plan_excess(heads, subject, recipe)
        )
        _tell_gains(logs, gains)
    folder = finish(recipe, subject, heads, calibration, gains, fitted, best)
    if ranks.is_main:
        folder.save(command.out / "policy")
    ranks.wait()
    logs.say(f"policy: {command.out / 'policy'}")
    return command.out / "policy"


def _tell_gains(logs: Logs, gains: Gains) -> None:
    """What every dial gained by what was learned, and where that is left out."""
    kinds = {"allocation": "plans of images' own", "sampled": "with the sampled heads"}
    for what, by_dial in gains.items():
        for dial, gain in by_dial.items():
            logs.say(
                f"dial {dial:g}: {kinds[what]}: {gain.ratio:.2f} of the error without at equal cost, below 1 in "
                f"{gain.surely:.0%} of redraws{'; left out here' * (not gain.is_sure)}"
            )


def _plan_excess(heads: Heads, subject: Subject, recipe: Recipe) -> Callable[[float], float]:
    """Of a dial: by how many steps the plans of the calibration pairs exceed those of all pairs, in the mean.

    Captions alone decide on plans, so the training pairs can say what is usual too. 0 without an allocation.
    """
    bank, head = subject.calibration, heads.allocation
    if bank is None or head is None:
        return no_excess
    own, others = read_conditioning(bank), read_conditioning(subject.training)
    every = torch.cat([own, others])

    def excess(dial: float) -> float:
        plans = (planned_steps(head, x, dial, recipe.num_inference_steps) for x in (own, every))
        mine, usual = (float(plan.double().mean()) for plan in plans)
        return mine - usual

    return excess


def _iterate(
    recipe: Recipe,
    trainer: Trainer,
    validation: Validation,
    checkpoints: Checkpoints,
    contents: Mapping[str, Any],
    logs: Logs,
) -> tuple[int, dict[str, float]]:
    """All iterations, from the newest checkpoint on. Leaves the heads as they were best, and says when that was.

    Iteration 0, the heads before the first update, is a candidate as any other.
    """
    ranks, heads = trainer.ranks, trainer.heads
    start, fitted = _resume(checkpoints, trainer, logs)
    logs.rewind(start)

    def keep(done: int, score: float | None) -> None:
        if ranks.is_main:
            state = {"trainer": trainer.state(), "random": random_state(), "fitted": fitted}
            checkpoints.save(done, {**state, **contents}, score=score)
        ranks.wait()

    if checkpoints.latest() is None:
        fitted = _warm_start(heads, trainer.subject, recipe, ranks, logs)
        judged, first = validation.judge(validation.measure(heads, dials_of(recipe)))
        logs.say("before training: " + ", ".join(f"{k} {v:.3g}" for k, v in judged.items()))
        if not math.isfinite(first):
            raise ValueError(
                f"score before training must be finite, got {first}: validation images of the untrained heads, or "
                "their references, hold NaN; use another --dtype"
            )
        keep(0, first)
    missing = 0
    for iteration in range(start, recipe.iterations):
        done = iteration + 1
        try:
            metrics = trainer.iterate(iteration)
        except FloatingPointError as error:
            raise ValueError(f"iteration {done}: {error}") from None
        missing = missing + 1 if _all_missing(metrics, recipe) else 0
        if missing:
            logs.say(f"iteration {done}: no image has a reward, so nothing is learned")
        if missing == min(_PATIENCE, recipe.iterations):
            raise ValueError(
                f"rewards must be there for some images, got none in {missing} iterations in a row, the last is "
                f"{done}; see what the reward says, then give the same command again"
            )
        score: float | None = None
        if done % recipe.evaluate_every == 0 or done == recipe.iterations:
            judged, score = validation.judge(validation.measure(heads, dials_of(recipe)))
            metrics |= judged
        logs.row(done, metrics)
        logs.difficulty(done, trainer.difficulty)
        _tell(logs, trainer, done, score is not None)
        if done % recipe.checkpoint_every == 0 or score is not None:
            keep(done, score)
    best = checkpoints.best()
    if best is None:
        raise ValueError(
            f"a checkpoint must have a finite score on the validation pairs, got none in '{checkpoints.folder}'; train "
            "anew with another --dtype and --out"
        )
    trainer.load_state(checkpoints.load(best)["state"]["trainer"])
    logs.say(f"the best heads are those of iteration {best}")
    return best, fitted


def _all_missing(metrics: Mapping[str, float], recipe: Recipe) -> bool:
    return metrics["policy/missing_members"] == recipe.groups * recipe.members


def dials_of(recipe: Recipe) -> list[float | None]:
    """Of training; heads without a prior have none."""
    return list(recipe.dials) if recipe.prior else [None]


def make_heads(recipe: Recipe, subject: Subject) -> Heads:
    """Untrained heads that fit the pipeline. Raises `ValueError` for a head that would have nothing to choose."""
    levels = len(subject.searched.costs.levels)
    if "sparse" in recipe.heads and levels < 2:
        raise ValueError(
            f"heads must not hold 'sparse' where the policy knows one sparsity level, got {recipe.heads!r}; leave it "
            "out, or calibrate a policy that knows more"
        )
    transformer = subject.pipe.transformer
    family = subject.searched.family
    inner = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    config = HeadsConfig(
        family=family,
        channels=int(transformer.config.in_channels),
        conditioning=int(inner),
        heads=recipe.heads,
        levels=levels,
        width=recipe.head_width,
        side=recipe.head_side,
        has_prior=recipe.prior,
        dials=tuple(float(dial) for dial in recipe.dials),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.seed, "heads"))
        return Heads(config)


def _make_discriminator(recipe: Recipe, subject: Subject) -> Discriminator | None:
    if not recipe.omega:
        return None
    seed = seed_of(recipe.seed, "discriminator")
    return Discriminator(vae_features(subject.pipe), DiscriminatorConfig(), seed=seed)


def _make_quality(recipe: Recipe, words: Sequence[str] = ()) -> WeightedSum | None:
    """The rewards q of the paper's form, the scene score in the form to train on. words: as `read_options` takes."""
    names = [name for name, _ in recipe.quality] if recipe.reward == "paper" else []
    options = read_options(words, names)
    if not names:
        return None
    return WeightedSum(
        {
            make_reward(name, **{**_REWARD_OPTIONS.get(name, {}), **options.get(name, {})}): weight
            for name, weight in recipe.quality
        }
    )


def _contents(command: Command) -> dict[str, Any]:
    """What may not change between two sittings besides the recipe. A server may move, so its options are left out."""
    policy = command.recipe.policy
    words = [word for word in command.reward_options if not word.startswith("http.")]
    return {
        "policy": BUNDLED if policy == BUNDLED else folder_digest(user_path(policy)),
        "reward_options": sorted(words),
    }


def _open_checkpoints(command: Command, contents: Mapping[str, Any]) -> Checkpoints:
    """The run's checkpoints. Raises `ValueError` where they are of another recipe, or there although none may be."""
    recipe = command.recipe
    checkpoints = Checkpoints(
        command.out / "checkpoints",
        fingerprint={name: x for name, x in as_json(recipe).items() if name not in _FREE},
        keep_last=recipe.keep_checkpoints,
    )
    newest = checkpoints.latest()
    if newest is None:
        return checkpoints
    if command.resume == "never":
        raise ValueError(
            f"out must hold no checkpoints with --resume never, got {str(command.out)!r}"
        )
    if newest > recipe.iterations:
        raise ValueError(
            f"iterations must be at least {newest}, which '{command.out}' has, got {recipe.iterations}"
        )
    state = checkpoints.load()["state"]
    there = {name: state.get(name, now) for name, now in contents.items()}  # older ones note none
    differing = list(differences(there, contents))
    if differing:
        raise ValueError(
            f"content of a run must be that of its checkpoints, got another {'; another '.join(differing)}; put back "
            "what was there, or give another --out"
        )
    return checkpoints


def _resume(checkpoints: Checkpoints, trainer: Trainer, logs: Logs) -> tuple[int, dict[str, float]]:
    """The iteration to go on with, and what the warm start said."""
    if checkpoints.latest() is None:
        return 0, {}
    loaded = checkpoints.load()
    for warning in loaded["warnings"]:
        logs.say(warning)
    state: Mapping[str, Any] = loaded["state"]
    trainer.load_state(state["trainer"])
    set_random_state(state["random"])
    logs.say(f"going on after iteration {loaded['iteration']}")
    return loaded["iteration"], dict(state["fitted"])


def _warm_start(
    heads: Heads, subject: Subject, recipe: Recipe, ranks: Ranks, logs: Logs
) -> dict[str, float]:
    """Fit the allocation head to the bank, or clone the searched schedule. Returns what came of it."""
    family, head = subject.searched.schedule, heads.allocation
    fitted: dict[str, float] = {}
    if family is not None and head is not None:
        pairs = read_pairs(subject.training, family)
        fitted = fit_head(head, pairs, recipe.num_inference_steps)
    elif family is not None and not recipe.prior and recipe.warm_start:
        fitted = clone(
            heads,
            subject.training,
            family,
            dial=recipe.teacher_dial,
            order=recipe.order,
            steps=recipe.warm_start,
            seed=recipe.seed,
        )
    ranks.copy_main(heads)
    for name, value in fitted.items():
        logs.say(f"{name} {value:.4g}")
    return fitted


def _tell(logs: Logs, trainer: Trainer, iteration: int, with_pictures: bool) -> None:
    """What is wrong with the discriminator; pictures of some groups beside what their noise converges to."""
    if trainer.discriminator is not None and trainer.discriminator.alarm:
        logs.say(f"iteration {iteration}: {trainer.discriminator.alarm}")
    rollout = trainer.rollout
    if rollout is None or not with_pictures:
        return
    bank, rows = trainer.subject.training, []
    for i, group in enumerate(rollout.groups[:_SHOWN]):
        target = ((bank.converged()[group.pair] + 1) / 2).clamp(0, 1)
        plain = Sample(image=target, nfe=float(REFERENCE_STEPS), label="converged")
        members = tuple(
            Sample(image=((image + 1) / 2).clamp(0, 1), nfe=float(nfe))
            for image, nfe in zip(rollout.images[i][:_SHOWN], rollout.nfe[i], strict=False)
        )
        rows.append(Row(prompt=bank.prompts[group.pair], plain=plain, accelerated=members))
    logs.pictures(iteration, rows)


def finish(
    recipe: Recipe,
    subject: Subject,
    heads: Heads,
    calibration: tuple[Dial, ...],
    gains: Gains,
    fitted: Mapping[str, float],
    best: int | None,
) -> PolicyFolder:
    """The policy as users get it."""
    searched = subject.searched
    provenance = {
        "recipe": as_json(recipe),
        "iteration": best,
        "warm_start": {name: value for name, value in fitted.items() if math.isfinite(value)},
        "gains": {
            what: {f"{dial:g}": asdict(gain) for dial, gain in by_dial.items()}
            for what, by_dial in gains.items()
        },
        "validation_pairs": len(subject.validation),
        "calibration_pairs": 0 if subject.calibration is None else len(subject.calibration),
        "searched": dict(searched.provenance.get("searched", searched.provenance)),
    }
    return PolicyFolder(
        model=searched.model,
        schedule=searched.schedule if recipe.prior else None,
        costs=searched.costs,
        provenance=provenance,
        heads=heads.cpu(),
        order=recipe.order,
        calibration=calibration,
        latent_grid=subject.grid,
    )


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What is trained on suits the calls that it is trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import small_world
import torch

from rapid3rt.policies.allocation import Allocation, detail
from rapid3rt.policies.fitted import Fit
from rapid3rt.policies.schedule import ScheduleFamily, WarpFamily
from rapid3rt.types import Run
from training.bank import accelerated
from training.grpo import Trainer
from training.rollout import Group
from training.run import make_heads
from training.subject import Subject, leave_out_misfit


def fitted_at(subject: Subject, guidance: float) -> WarpFamily:
    """The small family with steps that were fitted at a guidance scale."""
    runs: list[Run] = []

    class Spy(ScheduleFamily):
        def begin(self, run: Run) -> None:
            runs.append(run)
            super().begin(run)

    with accelerated(subject.pipe, Spy(small_world.FAMILY, budget=1)):
        subject.training.images(range(1))
    rows = tuple((k, ((0.0,) * 4,) * k) for k in range(3, 9))
    tokens = runs[0].resolution[0] * runs[0].resolution[1]
    fit = Fit(weights=rows, tokens=tokens, guidance=guidance)
    return replace(small_world.FAMILY, shift=runs[0].shift, fit=fit)


def test_steps_that_were_fitted_for_other_calls_are_left_out(tmp_path: Path) -> None:
    subject = small_world.make_subject(tmp_path)
    family = fitted_at(subject, 3.5)
    subject.searched.schedule = family
    assert leave_out_misfit(subject.searched, subject.training) == ()
    assert subject.searched.schedule is family
    assert family.fit is not None
    subject.searched.schedule = replace(family, fit=replace(family.fit, guidance=7.0))
    (note,) = leave_out_misfit(subject.searched, subject.training)
    assert "(here: guidance 3.5, not 7)" in note
    assert subject.searched.schedule == replace(family, fit=None)
    subject.searched.schedule = None
    assert leave_out_misfit(subject.searched, subject.training) == ()


def test_a_price_is_by_the_plans_that_the_family_makes_itself(tmp_path: Path) -> None:
    """A step head alone, on a family that gives each image what its detail asks for."""
    recipe = replace(small_world.DIAL, pairs=8)
    subject = small_world.make_subject(tmp_path, recipe)
    seen: list[torch.Tensor] = []

    class Spy(ScheduleFamily):
        def decide_step(self, state, velocity):  # type: ignore[no-untyped-def]
            seen.append(detail(state.latents, velocity, state.sigma))
            return super().decide_step(state, velocity)

    with accelerated(subject.pipe, Spy(small_world.FAMILY, budget=6)):
        subject.training.images(range(8))
    mean, strength = float(seen[0].mean()), 0.3 / float(seen[0].std())
    table = tuple((u, mean, strength, 0.0) for u in (0.1, 0.9))
    allocation = Allocation(table=table, dial=((1.0, 1.0), (8.0, 8.0)))
    subject.searched.schedule = replace(small_world.FAMILY, allocation=allocation)
    trainer = Trainer(recipe, subject, make_heads(recipe, subject), small_world.make_ranks())
    plans = trainer._plan_all()["6"]
    assert len(plans.unique()) > 1
    group = [Group(number=i, pair=i, dial=6) for i in range(8)]
    assert trainer.rollouts.collect(group, 1, sample=False).nfe.flatten().tolist() == plans.tolist()

# SPDX-License-Identifier: Apache-2.0
"""What is trained on suits the calls that it is trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import small_world
import torch

from rapid3rt.policies.allocation import Allocation, detail
from rapid3rt.policies.fitted import Fit
from rapid3rt.policies.schedule import ScheduleFamily
from training.bank import accelerated
from training.grpo import Trainer
from training.rollout import Group
from training.run import make_heads
from training.subject import first_run, leave_out_misfit


def test_steps_that_were_fitted_for_other_calls_are_left_out(tmp_path: Path) -> None:
    subject = small_world.make_subject(tmp_path)
    run = first_run(subject.training)
    assert (run.guidance, run.images) == (3.5, 1)
    rows = tuple((k, ((0.0,) * 4,) * k) for k in range(3, 9))
    fit = Fit(weights=rows, tokens=run.resolution[0] * run.resolution[1], guidance=3.5)
    family = replace(small_world.FAMILY, shift=run.shift, fit=fit)
    searched = replace(subject.searched, schedule=family)
    assert leave_out_misfit(searched, run) == ()
    assert searched.schedule is family
    searched.schedule = replace(family, fit=replace(fit, guidance=7.0))
    (note,) = leave_out_misfit(searched, run)
    assert "(here: guidance 3.5, not 7)" in note
    assert searched.schedule == replace(family, fit=None)
    searched.schedule = None
    assert leave_out_misfit(searched, run) == ()


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

# SPDX-License-Identifier: Apache-2.0
"""Whatever is put together in one pipeline call, every member gets its own image, numbers and decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_world
import torch

import rapid3rt
from rapid3rt.policies.learned import LearnedPolicy
from training.rollout import Group, Rollout, Rollouts
from training.seeds import seed_of
from training.subject import Subject

DIAL, PAPER = small_world.DIAL, small_world.PAPER
GROUPS = (
    Group(number=7, pair=2, dial=6),
    Group(number=8, pair=0, dial=4),
    Group(number=9, pair=2, dial=4),
    Group(number=10, pair=5, dial=6),
)
MEMBERS = 3


def make(subject: Subject, recipe=DIAL, heads=None, **changes) -> Rollouts:
    values = {"batch": recipe.rollout_batch, "seed": recipe.seed, **changes}
    return Rollouts(
        subject.training,
        small_world.make_trained(recipe, subject) if heads is None else heads,
        family=small_world.FAMILY if recipe.prior else None,
        order=recipe.order,
        costs=small_world.COSTS,
        **values,
    )


def of_paper(groups=GROUPS) -> list[Group]:
    return [replace(group, dial=None) for group in groups]


def by_member(rollout: Rollout) -> dict[tuple[int, int], tuple[torch.Tensor, float, float, float]]:
    """(group number, member) to image, error, E and NFE."""
    return {
        (group.number, g): (
            rollout.images[p, g],
            float(rollout.error[p, g]),
            float(rollout.steps[p, g]),
            float(rollout.nfe[p, g]),
        )
        for p, group in enumerate(rollout.groups)
        for g in range(rollout.error.shape[1])
    }


def actions(rollout: Rollout, head: str) -> dict[tuple[int, int, int], float]:
    """(group number, member, tick) to what was decided."""
    decisions, members = rollout.decisions[head], rollout.error.shape[1]
    return {
        (rollout.groups[int(m) // members].number, int(m) % members, int(t)): float(a)
        for m, t, a in zip(decisions.member, decisions.tick, decisions.action, strict=True)
    }


@pytest.fixture(scope="module")
def together(subject: Subject) -> Rollout:
    return make(subject).collect(GROUPS, MEMBERS)


@pytest.mark.parametrize(
    ("order", "batch"), [((0, 1, 2, 3), 2), ((3, 1, 0, 2), 5), ((2, 0, 3, 1), 64)]
)
def test_order_and_cuts_leave_every_member_its_own(
    subject: Subject, together: Rollout, order: tuple[int, ...], batch: int
) -> None:
    groups = [GROUPS[i] for i in order]
    other = make(subject, batch=batch).collect(groups, MEMBERS)
    mine, theirs = by_member(together), by_member(other)
    assert mine.keys() == theirs.keys()
    for key, (image, error, steps, nfe) in mine.items():
        assert theirs[key][3] == nfe
        assert theirs[key][2] == pytest.approx(steps, abs=1e-5)
        assert theirs[key][1] == pytest.approx(error, rel=0.02)
        apart = (theirs[key][0] - image).abs().mean()
        others = [(value[0] - image).abs().mean() for k, value in mine.items() if k != key]
        assert float(apart) < 0.02 * float(min(others))
    ours, them = actions(together, "step"), actions(other, "step")
    assert ours.keys() == them.keys()
    for key, action in ours.items():
        assert them[key] == pytest.approx(action, abs=2e-3), key


def test_the_numbers_are_of_the_images(subject: Subject, together: Rollout) -> None:
    converged = subject.training.converged()
    for p, group in enumerate(GROUPS):
        for g in range(MEMBERS):
            error = (together.images[p, g] - converged[group.pair]).square().mean()
            assert float(together.error[p, g]) == pytest.approx(float(error), rel=1e-5)
    assert together.images.shape == (4, MEMBERS, 3, 32, 32)
    assert len({float(e) for e in together.error.flatten()}) == 4 * MEMBERS


@pytest.mark.parametrize(("p", "g"), [(0, 0), (1, 2), (3, 1)])
def test_a_member_alone_is_the_member_of_the_batch(
    subject: Subject, together: Rollout, p: int, g: int
) -> None:
    """By a call of the pipeline that knows nothing of groups: its prompt, its noise, its seed, its dial."""
    pipe, group, recorded = subject.pipe, GROUPS[p], []
    seed = seed_of(DIAL.seed, group.number, g, "actions")
    policy = LearnedPolicy(
        small_world.make_trained(DIAL, subject),
        small_world.FAMILY,
        order=DIAL.order,
        dial=group.dial,
        costs=small_world.COSTS,
        seeds=lambda run: [seed],
        record=recorded.append,
    )
    rapid3rt.accelerate(pipe, policy)
    noise = torch.Generator().manual_seed(seed_of(11, group.pair, "noise"))
    image = pipe(
        subject.training.prompts[group.pair],
        num_inference_steps=8,
        generator=noise,
        output_type="pt",
        **subject.training.call,
    ).images[0]
    report = rapid3rt.report(pipe).images[0]
    rapid3rt.restore(pipe)
    assert report.nfe == together.nfe[p, g]
    assert report.equivalent_steps == pytest.approx(float(together.steps[p, g]))
    torch.testing.assert_close(image * 2 - 1, together.images[p, g], rtol=0, atol=5e-3)
    alone = [float(d.action[0]) for d in recorded if d.live[0]]
    batch = [a for (n, m, _), a in actions(together, "step").items() if (n, m) == (group.number, g)]
    assert alone == pytest.approx(batch, abs=2e-3)


def test_a_sampled_run_is_the_same_every_time(subject: Subject, together: Rollout) -> None:
    torch.manual_seed(5)  # whatever else draws
    again = make(subject).collect(GROUPS, MEMBERS)
    assert torch.equal(again.images, together.images)
    assert torch.equal(again.steps, together.steps)
    for name, decisions in together.decisions.items():
        for field in ("observation", "scalars", "prior", "action", "member", "tick", "log_prob"):
            assert torch.equal(getattr(again.decisions[name], field), getattr(decisions, field))


def test_rollouts_do_not_touch_the_global_generator(subject: Subject) -> None:
    before = torch.get_rng_state()
    make(subject).collect(GROUPS[:1], 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_groups_of_one_number_differ_in_another_run(subject: Subject, together: Rollout) -> None:
    other = make(subject, seed=1).collect(GROUPS, MEMBERS)
    ours, theirs = actions(together, "step"), actions(other, "step")
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 20
    assert sum(ours[key] == theirs[key] for key in shared) < len(shared) / 10


def test_costs_are_those_of_the_actions(subject: Subject) -> None:
    """E and NFE of three heads, counted again from what each member decided."""
    rollout = make(subject, PAPER).collect(of_paper(), MEMBERS)
    levels, reuse = small_world.COSTS.levels, small_world.COSTS.reuse
    steps, nfe = torch.zeros(12), torch.zeros(12)
    sparse, cache = rollout.decisions["sparse"], rollout.decisions["cache"]
    for member, level in zip(sparse.member, sparse.action, strict=True):  # of every compute
        nfe[member] += 1
        steps[member] += levels[int(level)]
    for member, action in zip(cache.member, cache.action, strict=True):
        steps[member] += reuse * int(action)
    assert rollout.nfe.flatten().tolist() == nfe.tolist()
    assert rollout.steps.flatten().tolist() == pytest.approx(steps.tolist(), abs=1e-5)
    assert int(cache.action.sum()) > 3
    assert len(set(sparse.action.tolist())) > 1


def test_served_heads_take_the_mode(subject: Subject) -> None:
    rollouts = make(subject)
    served = rollouts.collect(GROUPS[:2], 2, sample=False)
    assert not served.decisions
    # GEMM rounding is all that can tell members apart.
    assert float((served.images[:, 0] - served.images[:, 1]).abs().max()) < 5e-3


def test_no_groups_are_no_images(subject: Subject) -> None:
    rollout = make(subject).collect([], MEMBERS)
    assert rollout.images.shape == (0, MEMBERS, 3, 32, 32)
    assert rollout.error.shape == rollout.nfe.shape == (0, MEMBERS)
    assert not rollout.decisions


def test_decisions_come_in_one_order(together: Rollout) -> None:
    step = together.decisions["step"]
    keys = list(zip(step.member.tolist(), step.tick.tolist(), strict=True))
    assert keys == sorted(set(keys))


def test_nothing_is_left_of_a_rollout(subject: Subject) -> None:
    """The pipeline is its own again, also when a policy fails in the middle of a run."""
    rollouts, pipe = make(subject), subject.pipe
    rollouts.collect(GROUPS[:1], 2)
    with torch.no_grad():
        rollouts.heads.by_name["step"].decide.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be"):
        rollouts.collect(GROUPS[:1], 2)
    assert type(pipe.transformer).__name__ == "SD3Transformer2DModel"
    rapid3rt.accelerate(pipe, "dense")
    rapid3rt.restore(pipe)

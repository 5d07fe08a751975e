# SPDX-License-Identifier: Apache-2.0
"""The learned policy without a model: it starts as its prior, samples every image alone, stores what it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rapid3rt.policies.allocation import Allocation
from rapid3rt.policies.fitted import Fit
from rapid3rt.policies.heads import AllocationHead
from rapid3rt.policies.learned import (
    SCALARS,
    Dial,
    Heads,
    HeadsConfig,
    LearnedPolicy,
    setting_for,
)
from rapid3rt.policies.prior import SPREAD, step_logits
from rapid3rt.policies.sampling import beta_mode
from rapid3rt.policies.schedule import ScheduleFamily, WarpFamily
from rapid3rt.types import AUTO, COMPUTE, FITTED
from training.trajectory import Recorder

ALLOCATION = Allocation(
    table=((0.2, 0.3, 0.4, 0.0), (0.9, 0.1, 0.3, 0.0)), dial=((5.0, 5.0), (14.0, 14.0))
)
FAMILY = WarpFamily(
    family="sd3",
    num_ticks=28,
    shift=3.0,
    order=AUTO,
    knots=((0.3, 0.2), (0.7, 0.8)),
    allocation=ALLOCATION,
)
DIAL = HeadsConfig(family="sd3", channels=4, conditioning=8, width=8, side=4)
PAPER = HeadsConfig(
    family="sd3",
    channels=4,
    conditioning=8,
    width=8,
    heads=("cache", "sparse", "step"),
    has_prior=False,
)


def make_policy(config=DIAL, limits=None, trained=False, **options):
    torch.manual_seed(0)
    heads = Heads(config)
    if trained:
        for name, head in heads.by_name.items():
            last = head.hardness if name == "allocation" else head.decide
            nn.init.normal_(last.weight, std=0.3)
    given = {"dial": 7.0} if limits is None else limits
    family = FAMILY if config.has_prior else None
    return LearnedPolicy(
        heads, family, order=AUTO, **(given if config.has_prior else {}), **options
    )


@pytest.mark.parametrize("limits", [{"dial": 7.0}, {"budget": 6}, {"dial": 12.5}, {}])
def test_untrained_it_is_its_prior(sim, limits):
    run, world = sim.run(6), sim.world(6)
    steps = replace(DIAL, heads=("step",))
    learned = sim.drive(make_policy(steps, limits=limits), run, world)
    same = {"speed": 28 / limits["dial"]} if "dial" in limits else limits
    searched = sim.drive(ScheduleFamily(FAMILY, **same), run, world)
    assert learned.nfe == searched.nfe
    for image in range(6):
        ours, theirs = (w.column("next_sigma", image) for w in (learned, searched))
        # Both end at 0; between, the table of sigma over u is linear between 1,025 points.
        assert ours == pytest.approx(theirs, abs=2e-5)
    if limits == {"dial": 7.0}:
        assert len(set(learned.nfe)) > 1


def test_a_sampled_step_spreads_about_the_prior():
    ratio = torch.tensor([0.5, 0.9, 0.99])
    alpha, beta = (1 + step_logits(ratio).exp()).unbind(1)
    assert beta_mode(alpha, beta).tolist() == pytest.approx(ratio.tolist(), abs=1e-5)
    total = alpha + beta
    spread = (alpha * beta / (total.square() * (total + 1))).sqrt() / ratio
    assert float(spread[0]) == pytest.approx(SPREAD, rel=0.25)
    assert bool((spread < 1.3 * SPREAD).all())


@pytest.mark.parametrize("config", [DIAL, PAPER], ids=["dial", "paper"])
def test_an_image_is_sampled_by_its_own_seed(sim, config):
    seeds = [11, 12, 13, 14]
    world = sim.world(4)
    together = sim.drive(
        make_policy(config, trained=True, seeds=lambda run: seeds), sim.run(4), world
    )
    for image in (0, 2):
        one = make_policy(config, trained=True, seeds=lambda run, i=image: [seeds[i]])
        alone = sim.drive(one, sim.run(1), world.take([image]))
        assert alone.column("action", 0) == together.column("action", image)
        assert alone.column("level", 0) == together.column("level", image)
        expected = together.column("next_sigma", image)
        assert alone.column("next_sigma", 0) == pytest.approx(expected, abs=1e-5)
    other = make_policy(config, trained=True, seeds=lambda run: [21, 22, 23, 24])
    assert sim.drive(other, sim.run(4), world).next_sigma != together.next_sigma


@pytest.mark.parametrize("config", [DIAL, PAPER], ids=["dial", "paper"])
def test_a_stored_decision_gives_the_probability_that_it_had(sim, config):
    stored = []
    policy = make_policy(config, trained=True, seeds=lambda run: [1, 2, 3], record=stored.append)
    walk = sim.drive(policy, sim.run(3), sim.world(3))
    assert {decision.head for decision in stored} == set(config.sampled)
    losses = []
    for decision in stored:
        log_prob, entropy = policy.heads.evaluate(decision)
        assert bool(log_prob.isfinite().all())
        assert bool((log_prob[~decision.live] == 0).all())
        assert bool((entropy[~decision.live] == 0).all())
        if decision.head != "step":
            assert bool((log_prob <= 0).all())
        losses.append(log_prob.sum())
        assert decision.scalars.shape == (3, 2 * len(SCALARS))
    torch.stack(losses).sum().backward()
    still = [n for n, p in policy.heads.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.startswith("by_name.allocation") for name in still)
    steps = [decision for decision in stored if decision.head == "step"]
    for image in range(3):
        ratios = [float(d.action[image]) for d in steps if d.live[image]]
        sigmas = [row[image] for row in walk.sigma if row[image] is not None]
        nexts = [row[image] for row in walk.next_sigma if row[image] is not None]
        for sigma, following, ratio in zip(sigmas, nexts, ratios, strict=False):
            assert following == pytest.approx(sigma * ratio if sigma * ratio >= 0.01 else 0.0)


def test_void_and_forced_decisions_are_not_live(sim):
    stored = []
    policy = make_policy(PAPER, trained=True, seeds=lambda run: [5, 6, 7, 8], record=stored.append)
    walk = sim.drive(policy, sim.run(4, budget=3), sim.world(4), cap=3)
    assert max(walk.nfe) <= 3
    assert any(action != COMPUTE for row in walk.action for action in row if action is not None)
    caches = {d.tick: d for d in stored if d.head == "cache"}
    sparse = {d.tick: d for d in stored if d.head == "sparse"}
    assert not caches[0].live.any()
    for tick, decision in sparse.items():
        for image in range(4):
            action = walk.action[tick][image] if tick < len(walk.action) else None
            assert bool(decision.live[image]) == (action == COMPUTE)
    dial = []
    policy = make_policy(limits={"budget": 5}, seeds=lambda run: [1, 2], record=dial.append)
    walk = sim.drive(policy, sim.run(2), sim.world(2))
    steps = [d for d in dial if d.head == "step"]
    assert [d.live.tolist() for d in steps][:5] == [[True, True]] * 4 + [[False, False]]
    assert walk.nfe == [5, 5]


@pytest.mark.parametrize("config", [PAPER, replace(DIAL, heads=("cache", "step"))])
def test_the_step_that_ends_a_run_is_nobodys_choice(sim, config):
    """Reuse leaves images with ticks for all; the session sends them to 0 at the last one."""
    stored, ticks = [], 4
    policy = make_policy(config, trained=True, seeds=lambda run: range(32), record=stored.append)
    walk = sim.drive(policy, sim.run(32, ticks=ticks), sim.world(32))
    ends = [row for row in walk.next_sigma if any(x is not None for x in row)]
    assert len(ends) == ticks
    assert {x for x in ends[-1] if x is not None} == {0.0}
    steps = {d.tick: d for d in stored if d.head == "step"}
    assert steps[ticks - 2].live.any()
    assert not steps[ticks - 1].live.any()


def test_what_is_left_counts_the_coming_evaluation(sim):
    stored = []
    config = replace(DIAL, heads=("cache", "sparse", "step"))
    policy = make_policy(config, {"budget": 6}, seeds=lambda run: [1, 2], record=stored.append)
    sim.drive(policy, sim.run(2), sim.world(2))
    place, known = SCALARS.index("left / planned"), len(SCALARS)
    computed = torch.zeros(2)
    for decision in stored:
        left = (6 * decision.scalars[:, place]).round()
        if decision.head != "step" and decision.tick == 0:
            assert not decision.scalars[:, known + place].any()
        elif bool((computed < 6).all()):
            assert left.tolist() == (6 - computed).tolist()
        if decision.head == "cache":
            reuses = (decision.action == 1) & decision.live
        if decision.head == "step":
            computed += (~reuses).float()


def test_every_image_steps_by_the_weights_of_its_own_plan(sim):
    """Row j of k says so itself."""
    tables = tuple((k, tuple((k, j, 0.0, 0.0) for j in range(k))) for k in range(5, 15))
    family = replace(FAMILY, fit=Fit(weights=tables, tokens=36, guidance=4.0))
    policy = make_policy()
    head = policy.heads.by_name["allocation"]
    nn.init.normal_(head.hardness.weight, std=0.3)
    nn.init.ones_(head.strength)
    policy = LearnedPolicy(policy.heads, family, order=AUTO, dial=7.0)
    walk = sim.drive(policy, sim.run(6, guidance=4.0), sim.world(6))
    assert len(set(walk.nfe)) > 2
    for image, k in enumerate(walk.nfe):
        known = k >= 5
        assert walk.column("order", image) == [FITTED if known else AUTO] * k
        if known:
            assert walk.column("weights", image) == [[k, j, 0.0, 0.0] for j in range(k)]
    other = sim.drive(policy, sim.run(6, guidance=7.0), sim.world(6))
    assert {order for image in range(6) for order in other.column("order", image)} == {AUTO}
    (note,) = policy.notes
    assert "(here: guidance 7, not 4)" in note
    assert "all images get the same number" in note
    assert other.nfe == [7] * 6  # and what was learned with the weights is left alone too


def test_the_allocation_head_stretches_plans_within_their_limits(sim):
    policy = make_policy()
    head = policy.heads.by_name["allocation"]
    evaluations = {}
    for log_stretch in (-9.0, 0.0, 9.0):
        with torch.no_grad():
            head.offset.fill_(log_stretch)
        evaluations[log_stretch] = sim.drive(policy, sim.run(6), sim.world(6)).nfe
    assert sum(evaluations[-9.0]) < sum(evaluations[0.0]) < sum(evaluations[9.0])
    assert min(evaluations[-9.0]) >= 3  # half of the mean of 7, and steps are whole
    assert max(evaluations[9.0]) <= 14  # twice


def test_untrained_allocation_gives_all_images_the_dial(sim):
    assert sim.drive(make_policy(), sim.run(6), sim.world(6)).nfe == [7] * 6


def test_the_allocation_head_reads_the_conditioning_and_the_dial():
    head = AllocationHead(3, (5, 10))
    conditioning = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    dial = torch.full((2,), 7.5)
    assert head(conditioning, dial).tolist() == [0.0, 0.0]
    with torch.no_grad():
        head.mean.copy_(torch.tensor([2.0, 2.0, 2.0]))
        head.hardness.weight.copy_(torch.tensor([[0.0, 0.0, 1.0]]))
        head.strength.copy_(torch.tensor([0.1, 0.3]))
        head.offset.copy_(torch.tensor([0.5, 0.7]))
    assert head(conditioning, dial).tolist() == pytest.approx([0.8, 0.4])
    assert head(conditioning, dial * 4).tolist() == pytest.approx([1.0, 0.4])  # beyond: the end's


DIALS = (
    Dial(dial=5, equivalent_steps=6, evaluations=6, error=4e-3),
    Dial(dial=8, equivalent_steps=9, evaluations=8.9, error=2e-3),
    Dial(dial=14, equivalent_steps=14, evaluations=13.8, error=1e-3),
)


def test_a_speed_is_read_from_the_calibration(sim):
    assert setting_for(DIALS, 6) == 5
    assert setting_for(DIALS, 7.5) == pytest.approx(6.5)
    assert setting_for(DIALS, 14) == 14
    policy = make_policy(calibration=DIALS).limited(speed=28 / 7.5)
    assert policy.allocates
    sim.drive(policy, sim.run(2), sim.world(2))
    assert policy.prior.mean == pytest.approx(6.5)
    with pytest.raises(ValueError, match=r"speed must ask for 6\.00 to 14\.00 equivalent steps"):
        sim.drive(policy.limited(speed=28 / 5.9), sim.run(2), sim.world(2))


def test_a_budget_stays_a_budget(sim):
    policy = make_policy(trained=True, calibration=DIALS).limited(budget=6)
    assert not policy.allocates
    assert sim.drive(policy, sim.run(4), sim.world(4)).nfe == [6] * 4


def test_serving_is_deterministic(sim):
    walks = [sim.drive(make_policy(trained=True), sim.run(3), sim.world(3)) for _ in range(2)]
    assert walks[0].next_sigma == walks[1].next_sigma


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": ("steps",)}, "heads must be some of cache, sparse, allocation, step"),
        ({"heads": ("step", "step")}, "each once"),
        ({"heads": ()}, "heads must be some of"),
        ({"has_prior": False}, "heads must not hold 'allocation' without a prior"),
    ],
)
def test_wrong_heads_are_named(change, message):
    values = {"family": "sd3", "channels": 4, "conditioning": 8, **change}
    with pytest.raises(ValueError, match=message):
        HeadsConfig(**values)


def test_a_policy_of_another_family_or_without_its_prior_is_refused(sim):
    with pytest.raises(ValueError, match="family must be 'sd3', for which learned was made"):
        sim.drive(make_policy(PAPER), sim.run(1, family="flux"), sim.world(1))
    with pytest.raises(ValueError, match="family must be given"):
        LearnedPolicy(Heads(DIAL), None, order=AUTO)
    with pytest.raises(ValueError, match="family must not be given"):
        LearnedPolicy(Heads(PAPER), FAMILY, order=AUTO)


class HostReads(TorchDispatchMode):
    """Notes every op that would make a GPU wait for its answer."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.READS or is_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [DIAL, PAPER], ids=["dial", "paper"])
def test_decisions_are_taken_and_recorded_without_a_host_read(sim, config):
    recorder = Recorder(None, [0, 1, 2])
    policy = make_policy(config, trained=True, seeds=lambda run: [1, 2, 3], record=recorder.record)
    recorder._heads = policy.heads
    reads = []

    def watched(decide):
        def decided(*args):
            with HostReads() as mode:
                decision = decide(*args)
            reads.extend(mode.seen)
            return decision

        return decided

    policy.decide_compute = watched(policy.decide_compute)
    policy.decide_step = watched(policy.decide_step)
    sim.drive(policy, sim.run(3), sim.world(3))
    assert reads == []
    assert {part.head for part in recorder.decisions()} == set(config.sampled)

# SPDX-License-Identifier: Apache-2.0
"""The update against autograd on the same formulas, and against everything that must not change it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from training import loss
from training.trajectory import Decisions, join
from training.update import Batch, update

COEFFICIENT = 3e-3


def make_batch(walk, advantage=None, weight=None):
    """Advantages that differ between members; weights as the trainer gives them."""
    shape = walk.rollout.error.shape
    generator = torch.Generator().manual_seed(7)
    default = torch.randn(shape, generator=generator).flatten()
    ticks = walk.recipe.num_inference_steps
    return Batch(
        decisions=walk.rollout.decisions,
        advantage=default if advantage is None else advantage,
        weight=torch.full((shape.numel(),), 1 / (shape.numel() * ticks))
        if weight is None
        else weight,
    )


def run(walk, ranks, batch=None, heads=None, coefficient=COEFFICIENT, **changes):
    """One update of a copy. Returns heads, metrics and the gradient of the last epoch, before it was clipped."""
    recipe = replace(walk.recipe, **{"inner_epochs": 1, "gradient_norm": 1e9, **changes})
    heads = copy.deepcopy(walk.heads if heads is None else heads)
    trained = [p for name in heads.config.sampled for p in heads.by_name[name].parameters()]
    optimiser = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    coefficients = dict.fromkeys(heads.config.sampled, coefficient)
    batch = make_batch(walk) if batch is None else batch
    metrics = update(heads, optimiser, batch, recipe, coefficients, ranks)
    return heads, metrics, torch.cat([p.grad.flatten() for p in trained])


def surrogate_gradient(walk, batch, recipe, bonus=0.0):
    """By autograd on the whole formula at once, with the log-probabilities of the rollout as old ones."""
    heads = copy.deepcopy(walk.heads)
    total = torch.zeros(())
    clip = {"clip_low": recipe.clip_low, "clip_high": recipe.clip_high}
    sums = torch.zeros(len(batch.advantage)), torch.zeros(len(batch.advantage))
    for decisions in batch.decisions.values():
        new, entropy = decisions.score(heads)
        old, member = decisions.log_prob, decisions.member
        sums = sums[0].index_add(0, member, new), sums[1].index_add(0, member, old)
        if recipe.ratio == "decision":
            each = loss.clipped_surrogate(
                new, old, batch.advantage[member], batch.weight[member], **clip
            )
            total = total + each.loss
        total = total - bonus * entropy.mean()
    if recipe.ratio == "trajectory":
        total = total + loss.clipped_surrogate(*sums, batch.advantage, batch.weight, **clip).loss
    total.backward()
    return torch.cat(
        [p.grad.flatten() for n in heads.config.sampled for p in heads.by_name[n].parameters()]
    )


@pytest.fixture(params=["dial", "paper"])
def walk(request):
    return request.getfixturevalue(f"{request.param}_walk")


def test_the_first_ratio_is_exactly_one(walk, ranks):
    _, metrics, _ = run(walk, ranks)
    assert metrics["policy/first_ratio_error"] == 0.0


def test_a_rollout_of_other_heads_is_refused(walk, ranks):
    other = copy.deepcopy(walk.heads)
    with torch.no_grad():
        other.by_name["step"].decide.bias += 0.1
    with pytest.raises(RuntimeError, match="log-probabilities of step must be those of the rollou"):
        run(walk, ranks, heads=other)


def test_every_parameter_of_every_head_moves(walk, ranks):
    heads, _, _ = run(walk, ranks)
    before = dict(walk.heads.named_parameters())
    still = [n for n, p in heads.named_parameters() if torch.equal(p, before[n])]
    assert still == []


@pytest.mark.parametrize("ratio", ["decision", "trajectory"])
def test_the_gradient_is_that_of_the_formula(walk, ranks, ratio):
    batch, recipe = make_batch(walk), replace(walk.recipe, ratio=ratio)
    _, _, gradient = run(walk, ranks, batch, ratio=ratio)
    expected = surrogate_gradient(walk, batch, recipe, COEFFICIENT)
    assert float(expected.abs().max()) > 1e-5
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6 * float(expected.norm()))


@pytest.mark.parametrize("micro_batch", [1, 7, 10_000])
def test_slices_do_not_change_the_gradient(walk, ranks, micro_batch):
    _, _, whole = run(walk, ranks)
    _, metrics, sliced = run(walk, ranks, micro_batch=micro_batch)
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-6 * max(1, float(whole.norm())))
    assert (
        float((sliced - whole).norm() / whole.norm()) < 1e-5
    )  # a slice of one row rounds its own way
    assert metrics["policy/first_ratio_error"] == 0.0


def test_members_keep_their_own_advantages(walk, ranks):
    """Members dealt anew, decisions and advantages alike, change nothing; advantages alone change everything."""
    batch = make_batch(walk)
    order = torch.randperm(len(batch.advantage), generator=torch.Generator().manual_seed(3))
    parts = [replace(d, member=order.argsort()[d.member]) for d in batch.decisions.values()]
    dealt = replace(
        batch,
        decisions=join(parts),
        advantage=batch.advantage[order],
        weight=batch.weight[order],
    )
    _, _, gradient = run(walk, ranks, batch, coefficient=0.0)
    _, _, same = run(walk, ranks, dealt, coefficient=0.0)
    assert float((same - gradient).norm() / gradient.norm()) < 1e-5
    wrong = replace(batch, advantage=batch.advantage[order])
    _, _, other = run(walk, ranks, wrong, coefficient=0.0)
    assert float((other - gradient).norm() / gradient.norm()) > 0.1


def only(decisions: Decisions, members) -> Decisions:
    kept = torch.isin(decisions.member, torch.tensor(members))
    names = [n for n in decisions.__dataclass_fields__ if n != "head"]
    tensors = {name: getattr(decisions, name)[kept] for name in names}
    return Decisions(head=decisions.head, **tensors)


@pytest.mark.parametrize("ratio", ["decision", "trajectory"])
def test_what_weighs_nothing_is_as_if_it_were_not_there(walk, ranks, ratio):
    """A member that is missing or of a dead group, here all of the first group, pulls at no weight."""
    members = walk.recipe.members
    batch = make_batch(walk)
    weight = batch.weight.clone()
    weight[:members] = 0
    advantage = batch.advantage.clone()
    advantage[:members] = 5.0
    dead = replace(batch, weight=weight, advantage=advantage)
    rest = list(range(members, len(weight)))
    without = replace(dead, decisions={n: only(d, rest) for n, d in batch.decisions.items()})
    _, _, gradient = run(walk, ranks, dead, coefficient=0.0, ratio=ratio)
    _, _, expected = run(walk, ranks, without, coefficient=0.0, ratio=ratio)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def test_dead_groups_count_as_decisions(walk, ranks):
    """They are masked, not dropped: entropy means and the normaliser are of all."""
    members = walk.recipe.members
    weight = make_batch(walk).weight.clone()
    weight[:members] = 0
    _, alive, _ = run(walk, ranks)
    _, dead, _ = run(walk, ranks, replace(make_batch(walk), weight=weight))
    for name in walk.heads.config.sampled:
        assert dead[f"entropy/{name}"] == alive[f"entropy/{name}"]
    nothing = replace(make_batch(walk), weight=torch.zeros_like(weight))
    heads, metrics, gradient = run(walk, ranks, nothing, coefficient=0.0)
    assert float(gradient.abs().max()) == 0.0
    assert metrics["policy/gradient_norm"] == 0.0
    before = dict(walk.heads.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in heads.named_parameters())


def test_epochs_end_where_the_policy_has_moved_too_far(walk, ranks):
    _, metrics, _ = run(walk, ranks, inner_epochs=4, learning_rate=1e-5)
    assert metrics["policy/epochs"] == 4
    assert 0 < metrics["policy/kl"] < 0.02
    _, metrics, _ = run(walk, ranks, inner_epochs=4, learning_rate=0.3)
    assert metrics["policy/epochs"] == 1
    assert metrics["policy/kl"] > 0.02


def test_clipping_is_told(walk, ranks):
    _, metrics, _ = run(walk, ranks, inner_epochs=2, kl_stop=1e9, learning_rate=1e-7)
    assert metrics["policy/clip_fraction"] == 0.0
    _, metrics, _ = run(walk, ranks, inner_epochs=2, kl_stop=1e9, learning_rate=0.05)
    assert metrics["policy/clip_fraction"] > 0.02


def test_gradients_are_clipped(walk, ranks):
    _, metrics, gradient = run(walk, ranks, gradient_norm=1e-3)
    assert float(gradient.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert metrics["policy/gradient_norm"] > 1e-3


def silent(walk):
    batch = make_batch(walk)
    return replace(batch, advantage=torch.zeros_like(batch.advantage))


def entropies(walk, heads):
    with torch.no_grad():
        return {n: float(d.score(heads)[1].mean()) for n, d in walk.rollout.decisions.items()}


def test_the_bonus_raises_entropy_by_the_gradient_of_its_mean(walk, ranks):
    heads, _, gradient = run(walk, ranks, silent(walk), coefficient=0.5)
    after, before = entropies(walk, heads), entropies(walk, walk.heads)
    assert all(after[name] > before[name] for name in before)
    expected = surrogate_gradient(walk, silent(walk), walk.recipe, 0.5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6 * float(expected.norm()))


def divergence(walk, heads):
    """Mean KL to the untrained policy by the decisions' own samples."""
    means = []
    for decisions in walk.rollout.decisions.values():
        with torch.no_grad():
            new, start = decisions.score(heads)[0], decisions.score_untrained(heads)[0]
        means.append(float(loss.k3(start, new).mean()))
    return sum(means)


def test_the_pull_to_the_prior_is_the_gradient_of_the_divergence(walk, ranks):
    """Samples are of the present policy, so d = prior - present: its mean is KL(present || prior)."""
    heads, _, gradient = run(walk, ranks, silent(walk), coefficient=0.0, prior_kl=0.25)
    probe = copy.deepcopy(walk.heads)
    total = torch.zeros(())
    for decisions in walk.rollout.decisions.values():
        d = decisions.score_untrained(probe)[0].detach() - decisions.score(probe)[0]
        total = total + 0.25 * (d.exp() - 1 - d).mean()
    total.backward()
    expected = torch.cat(
        [p.grad.flatten() for n in probe.config.sampled for p in probe.by_name[n].parameters()]
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6 * float(expected.norm()))
    assert divergence(walk, heads) < divergence(walk, walk.heads)


def test_a_head_without_decisions_does_not_stop_the_others(paper_walk, ranks):
    batch = make_batch(paper_walk)
    batch = replace(batch, decisions={n: d for n, d in batch.decisions.items() if n != "cache"})
    heads, metrics, _ = run(paper_walk, ranks, batch, inner_epochs=2)
    assert "entropy/cache" not in metrics
    before = dict(paper_walk.heads.named_parameters())
    moved = {n.split(".")[1] for n, p in heads.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"sparse", "step"}


def test_without_any_decision_nothing_happens(dial_walk, ranks):
    batch = replace(make_batch(dial_walk), decisions={})
    heads, metrics, _ = run(dial_walk, ranks, batch, inner_epochs=2)
    before = dict(dial_walk.heads.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in heads.named_parameters())
    assert metrics["policy/gradient_norm"] == 0.0


def test_momentum_moves_a_head_without_decisions_alike_after_a_stop(paper_walk, ranks):
    """A run that goes on has no gradients yet: a head that is silent in its first iteration must move all the same."""
    from training.checkpoint import load_optimiser_state, optimiser_state

    recipe = replace(paper_walk.recipe, inner_epochs=1)
    full = make_batch(paper_walk)
    silent_cache = replace(
        full, decisions={n: d for n, d in full.decisions.items() if n != "cache"}
    )
    coefficients = dict.fromkeys(paper_walk.heads.config.sampled, COEFFICIENT)
    ends = []
    for stops in (False, True):
        heads = copy.deepcopy(paper_walk.heads)
        make = lambda: torch.optim.AdamW(heads.parameters(), lr=1e-6, weight_decay=0.0)  # noqa: B023, E731
        optimiser = make()
        update(heads, optimiser, full, recipe, coefficients, ranks)
        if stops:
            state = optimiser_state(optimiser)
            optimiser = make()
            load_optimiser_state(optimiser, state)
            for parameter in heads.parameters():
                parameter.grad = None
        update(heads, optimiser, silent_cache, recipe, coefficients, ranks)
        ends.append([p.clone() for p in heads.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_gradient_that_is_no_number_is_an_error(dial_walk, ranks):
    batch = make_batch(dial_walk)
    broken = replace(batch, advantage=torch.full_like(batch.advantage, math.nan))
    with pytest.raises(
        FloatingPointError, match=r"gradient norm .* got nan; lower --learning-rate"
    ):
        run(dial_walk, ranks, broken)


def test_a_good_action_becomes_more_likely(walk, ranks):
    """The sign: with one member better than the others, what it did is what the heads do more."""
    batch = make_batch(walk)
    advantage = torch.zeros_like(batch.advantage)
    advantage[1] = 1.0
    heads, _, _ = run(walk, ranks, replace(batch, advantage=advantage), coefficient=0.0)
    gain = 0.0
    for decisions in walk.rollout.decisions.values():
        mine = decisions.member == 1
        with torch.no_grad():
            new, old = decisions.score(heads)[0], decisions.score(walk.heads)[0]
        gain += float((new - old)[mine].sum())
    assert gain > 0

# SPDX-License-Identifier: Apache-2.0
"""The discriminator as a whole: it learns, pays, alarms, refuses garbage, and goes on from a checkpoint bit by bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load, save

from rapid3rt.errors import StateError
from training.discriminator import Discriminator, DiscriminatorConfig
from training.metrics import checked

WIDTH = 6


class Pixels:
    """The mean of each third of the columns of a picture, and its square: features whose values a test can choose."""

    name = "pixels"
    width = WIDTH

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        thirds = images.mean((1, 2)).unflatten(1, (3, -1)).mean(2)
        return torch.cat([thirds, thirds.square()], 1)


FAST = DiscriminatorConfig(hidden=16, capacity=64, batch=16, learning_rate=1e-2, first_steps=4)


def noise(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator) + shift


def make(config: DiscriminatorConfig = FAST, seed: int = 5, **fields: object) -> Discriminator:
    return Discriminator(Pixels(), dataclasses.replace(config, **fields), seed=seed)


def play(discriminator: Discriminator, rounds: range, shift: float = 1.0) -> list[dict[str, float]]:
    """Every round: 8 new pairs at 3 and 10 evaluations, and an update."""
    told = []
    for number in rounds:
        fake, real = noise(8, 2 * number, shift), noise(8, 2 * number + 1)
        discriminator.add(fake, real, torch.tensor([3, 10] * 4))
        told.append(discriminator.update())
    return told


# Learning


def test_it_learns_to_tell_and_pays_full_pictures_more():
    discriminator = make()
    told = play(discriminator, range(60))
    assert told[-1]["auc"] > 0.9
    assert told[-1]["loss"] < told[0]["loss"]
    rewards = discriminator.score(torch.cat([noise(50, 900, 1.0), noise(50, 901)]))
    assert rewards.dtype == torch.float32
    assert float(rewards[50:].mean() - rewards[:50].mean()) > 0.5
    assert float(rewards.abs().max()) <= 3.0


def test_diagnostics_are_complete_and_bins_are_those_that_have_pairs():
    told = play(make(), range(1))[0]
    per_bin = {"auc@3", "auc@10", "paired@3", "paired@10"}
    rest = {"accuracy", "auc", "paired", "logit_real", "logit_fake", "clipped", "loss"}
    rest |= {"gradient_penalty", "skipped", "running_mean", "running_std", "saturated", "blind"}
    assert told.keys() == per_bin | rest
    assert all(isinstance(value, float) and math.isfinite(value) for value in told.values())
    checked({f"discriminator/{name}": value for name, value in told.items()})


def test_new_pairs_are_judged_before_they_are_learned():
    """Where nothing can be told, a head learns old pairs by heart and knows nothing of new ones."""
    discriminator = make(r1_weight=0.0)
    discriminator.add(noise(16, 1), noise(16, 2), torch.full((16,), 5))
    told = [discriminator.update() for _ in range(60)]
    assert told[0]["auc"] < 0.7
    assert told[-1]["auc"] > 0.9
    fresh = [one["auc"] for one in play(discriminator, range(20), shift=0.0)]
    assert sum(fresh) / 20 == pytest.approx(
        0.5, abs=0.12
    )  # 20 AUCs of 8 pairs: standard error 0.033


def test_batches_above_the_accuracy_are_not_learned_from():
    discriminator = make()
    play(discriminator, range(40), shift=8.0)
    before = discriminator.state_dict()
    told = play(discriminator, range(40, 41), shift=8.0)[0]
    after = discriminator.state_dict()
    assert told["skipped"] == 1.0
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k.startswith("head/"))
    eager = make(skip_above=1.0)
    assert play(eager, range(40), shift=8.0)[-1]["skipped"] == 0.0


def test_r1_keeps_logits_flat():
    plain, flat = (make(r1_weight=weight) for weight in (0.0, 10.0))
    told = [play(one, range(40))[-1] for one in (plain, flat)]
    assert told[1]["gradient_penalty"] < 0.3 * told[0]["gradient_penalty"]


def test_rare_evaluations_are_drawn_as_often_as_common_ones():
    """Only the one pair of 3 evaluations differs; among 40 that do not it is half of every batch and is learned."""
    discriminator = make()
    same = noise(40, 1)
    discriminator.add(same, same, torch.full((40,), 10))
    discriminator.add(noise(1, 2) + 3, noise(1, 3), torch.tensor([3]))
    for _ in range(30):
        told = discriminator.update()
    assert told["auc@3"] == 1.0
    assert told["auc@10"] == 0.5


# Alarms


def test_pictures_that_differ_plainly_saturate_it():
    discriminator = make()
    told = play(discriminator, range(60), shift=8.0)
    assert told[0]["saturated"] == 0.0
    assert (told[-1]["saturated"], told[-1]["blind"]) == (1.0, 0.0)
    assert discriminator.alarm.startswith("the discriminator is saturated")


def test_pictures_that_do_not_differ_blind_it():
    discriminator = make()
    for number in range(25):
        same = noise(8, number)
        discriminator.add(same, same, torch.full((8,), 3))
        told = discriminator.update()
        assert told["auc"] == told["paired"] == 0.5
    assert (told["saturated"], told["blind"]) == (0.0, 1.0)
    assert discriminator.alarm.startswith("the discriminator is blind")


def test_no_alarm_where_it_works():
    discriminator = make()
    told = play(discriminator, range(40), shift=0.7)
    assert {one["saturated"] + one["blind"] for one in told} == {0.0}
    assert discriminator.alarm == ""


# Reward


def test_equal_pictures_are_paid_equally_and_finitely():
    discriminator = make()
    images = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)).repeat(8, 1, 1, 1)
    features = discriminator.encode(images)
    discriminator.add(features, features, torch.full((8,), 5))
    discriminator.update()
    rewards = discriminator.reward(images)
    assert rewards.shape == (8,)
    assert bool(rewards.isfinite().all())
    assert len(rewards.unique()) == 1


def test_nothing_is_paid_before_anything_was_learned():
    assert make().score(noise(3, 1)).tolist() == [0, 0, 0]


def test_the_first_update_learns_longer():
    """Else the rewards of the first iterations would be those of a random head, scaled to full size."""
    short, long = make(learning_rate=1e-3), make(learning_rate=1e-3, first_steps=200)
    for one in (short, long):
        play(one, range(1), shift=2.0)
        fake, real = noise(50, 900, 2.0), noise(50, 901)
    early, late = (float((one.score(real) - one.score(fake)).mean()) for one in (short, long))
    assert late > 1.0 > early


def test_rewards_stay_as_they_are_until_the_next_update():
    discriminator = make()
    play(discriminator, range(3))
    probe = noise(5, 77)
    before = discriminator.score(probe)
    discriminator.add(noise(8, 78), noise(8, 79), torch.full((8,), 5))
    assert torch.equal(discriminator.score(probe), before)
    told = discriminator.update()
    assert not torch.equal(discriminator.score(probe), before)
    assert told["running_std"] > 0


def test_pictures_are_seen_as_they_are_saved():
    discriminator = make()
    images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    saved = (images * 255).round().to(torch.uint8).float() / 255
    assert torch.equal(discriminator.encode(images), discriminator.encode(saved))
    assert discriminator.encode(images[:0]).shape == (0, WIDTH)


def test_training_and_scoring_read_the_same_features():
    """What `add` stored is what `encode` gave, to the bit."""
    discriminator = make()
    features = discriminator.encode(torch.rand(4, 3, 6, 6))
    discriminator.add(features, features, torch.full((4,), 5))
    assert torch.equal(discriminator.state_dict()["buffer/fake"].float(), features)


# Resume


def revive(discriminator: Discriminator) -> Discriminator:
    """Through the bytes of a file, into a new object."""
    again = make()
    again.load_state_dict(load(save(discriminator.state_dict())))
    return again


def same(one: Discriminator, other: Discriminator) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


@pytest.mark.parametrize("stop", [0, 1, 7, 20])
def test_a_stop_changes_no_bit(stop):
    """20 rounds overwrite the buffer of 64 pairs more than twice."""
    through, stopped = make(), make()
    told = play(through, range(20))
    first = play(stopped, range(stop))
    revived = revive(stopped)
    assert same(stopped, revived)
    assert first + play(revived, range(stop, 20)) == told
    assert same(through, revived)
    if stop < 20:
        assert not same(through, stopped)  # a loaded state shares no memory with the saved one


def test_a_stop_between_add_and_update_changes_no_bit():
    through = make()
    play(through, range(3))
    through.add(noise(8, 50, 1.0), noise(8, 51), torch.full((8,), 4))
    revived = revive(through)
    assert through.update() == revived.update()
    assert same(through, revived)


def test_loading_replaces_whatever_was_there():
    fresh, used = make(), make()
    play(used, range(12))
    used.load_state_dict(fresh.state_dict())
    assert play(used, range(3)) == play(fresh, range(3))
    assert same(used, fresh)


def test_what_the_caller_does_to_a_state_changes_nothing():
    discriminator = make()
    play(discriminator, range(3))
    state = discriminator.state_dict()
    reference = revive(discriminator)
    other = make()
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert same(discriminator, reference)
    assert same(other, reference)


def test_seeds_and_the_global_generator():
    torch.manual_seed(1)
    one, before = make(), torch.get_rng_state()
    told = play(one, range(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert play(make(), range(3)) == told
    assert play(make(seed=6), range(3)) != told


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(seed=6), "seed must be that of the saved discriminator, 5, got 6"),
        (lambda: make(capacity=32), "capacity must be .* 64, got 32"),
        (lambda: make(hidden=8), "hidden must be .* 16, got 8"),
    ],
)
def test_states_of_another_discriminator_are_refused_before_anything_changes(other, message):
    discriminator = make()
    play(discriminator, range(2))
    into = other()
    play(into, range(1))
    before = into.state_dict()
    with pytest.raises(ValueError, match=message):
        into.load_state_dict(discriminator.state_dict())
    assert all(torch.equal(v, into.state_dict()[k]) for k, v in before.items())


def test_states_of_other_features_and_incomplete_ones_are_refused():
    discriminator, other = make(), make()
    other.features.name = "others"
    with pytest.raises(ValueError, match=r"features must be .* others, got pixels"):
        discriminator.load_state_dict(other.state_dict())
    state = discriminator.state_dict()
    del state["head/mix.weight"]
    with pytest.raises(ValueError, match=r"state must hold head/mix\.weight"):
        discriminator.load_state_dict(state)


# Garbage


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_features_that_float16_cannot_hold_are_refused_with_their_row(value):
    discriminator = make()
    broken = noise(4, 1)
    broken[2, 3] = value
    with pytest.raises(
        ValueError, match=r"fake_features must be finite in float16, got .* in row 2"
    ):
        discriminator.add(broken, noise(4, 2), torch.full((4,), 3))
    with pytest.raises(ValueError, match="real_features must be finite"):
        discriminator.add(noise(4, 2), broken, torch.full((4,), 3))
    with pytest.raises(StateError, match="empty buffer"):
        discriminator.update()
    play(discriminator, range(1))
    with pytest.raises(ValueError, match="features must be finite"):
        discriminator.score(broken)


@pytest.mark.parametrize(
    ("fake", "real", "nfe", "message"),
    [
        (noise(4, 1)[:, :5], noise(4, 1), [3] * 4, r"fake_features must be of shape \(B, 6\)"),
        (noise(4, 1)[0], noise(4, 1), [3] * 4, "fake_features must be of shape"),
        (noise(4, 1), noise(3, 1), [3] * 4, r"real_features must have the shape .* \(4, 6\), got"),
        (noise(4, 1), noise(4, 1), [3] * 3, r"nfe must be of shape \(4,\), got \(3,\)"),
        (noise(4, 1), noise(4, 1), [3.5] * 4, "nfe must be whole numbers of at least 1, got 3.5"),
        (noise(4, 1), noise(4, 1), [3, 0, 3, 3], "nfe must be whole numbers .*, got 0"),
        (noise(4, 1), noise(4, 1), [3, math.nan, 3, 3], "nfe must be whole numbers .*, got nan"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(fake, real, nfe, message):
    with pytest.raises(ValueError, match=message):
        make().add(fake, real, torch.tensor(nfe))


def test_evaluations_may_be_floats():
    counted, told = make(), make()
    for one, dtype in ((counted, torch.int32), (told, torch.float32)):
        one.add(noise(4, 1), noise(4, 2), torch.tensor([3, 5, 8, 14], dtype=dtype))
    assert same(counted, told)


def test_tokens_work_and_must_stay_as_many():
    discriminator = make()
    tokens = noise(24, 1).view(8, 3, WIDTH)
    discriminator.add(tokens + 1, tokens, torch.full((8,), 3))
    discriminator.update()
    assert discriminator.score(tokens).shape == (8,)
    assert revive(discriminator).score(tokens).tolist() == discriminator.score(tokens).tolist()
    with pytest.raises(ValueError, match=r"features must be of the shape of those before"):
        discriminator.score(tokens[:, :2])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 6, 6), r"shape \(B, 3, H, W\)"),
        (torch.zeros(2, 4, 6, 6), r"shape \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 0, 6), r"shape \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), "floats"),
        (torch.full((2, 3, 6, 6), math.nan), r"in 0\.\.1"),
        (torch.full((2, 3, 6, 6), -0.5), r"in 0\.\.1, got values of -0\.5"),
    ],
)
def test_pictures_that_are_none_are_refused(images, message):
    with pytest.raises(ValueError, match=f"images must be .*{message}"):
        make().encode(images)


def test_calls_out_of_order_are_refused():
    discriminator = make()
    with pytest.raises(StateError, match="update must come after add"):
        discriminator.update()
    discriminator.add(noise(0, 1), noise(0, 1), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(StateError, match="update must come after add"):
        discriminator.update()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match="seed must be in"):
        make(seed=seed)


def test_one_pair_is_enough():
    discriminator = make()
    discriminator.add(noise(1, 1), noise(1, 2), torch.tensor([4]))
    told = discriminator.update()
    assert math.isfinite(told["loss"])
    assert float(discriminator.score(noise(1, 1)).abs()) <= 3.0

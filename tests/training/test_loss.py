# SPDX-License-Identifier: Apache-2.0
"""The trainer's formulas against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training import loss

NAN = math.nan


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_the_discount_is_the_mean_of_its_powers():
    for steps in (1, 2, 5, 28):
        powers = [0.9**j for j in range(steps)]
        weight = loss.compute_discount(tensor(steps), 0.9)
        assert float(weight) == pytest.approx(sum(powers) / steps, rel=1e-5)
    assert loss.compute_discount(tensor(0.0, 7.0), 1.0).tolist() == [1.0, 1.0]
    assert float(loss.compute_discount(tensor(0.0), 0.9)) == 1.0


def test_the_papers_reward_falls_with_steps_only_where_quality_is_positive():
    def reward(quality, steps):
        return float(
            loss.paper_reward(tensor(quality), tensor(0.5), tensor(steps), discount=0.97, omega=1.0)
        )

    assert reward(1.0, 10) < reward(1.0, 9)
    assert reward(-2.0, 10) > reward(-2.0, 9)  # the defect that METHOD names
    assert reward(1.0, 1) == pytest.approx(1.5)


def test_the_dial_reward_prices_steps_unless_all_fail():
    rewards = loss.dial_reward(
        torch.tensor([[1.0, 2.0], [9.0, 10.0]]),
        torch.tensor([[8.0, 4.0], [8.0, 4.0]]),
        scale=tensor(2.0, 2.0),
        price=tensor(3.0, 3.0),
        dial=tensor(8.0, 8.0),
        failure=4.0,
    )
    assert rewards[0].tolist() == pytest.approx([-0.5 - 3.0, -1.0 - 1.5])
    assert rewards[1].tolist() == pytest.approx([-4.5, -5.0])  # the cheaper one gains nothing


def test_a_root_of_the_error_weighs_large_ones_less_and_has_the_same_slope_at_the_scale():
    given = {"scale": tensor(4.0), "price": tensor(2.0), "dial": tensor(8.0), "failure": 4.0}
    steps = torch.full((1, 3), 8.0)
    root = loss.dial_reward(torch.tensor([[1.0, 4.0, 16.0]]), steps, power=0.5, **given)
    assert root[0].tolist() == pytest.approx([-1.0 - 2, -2.0 - 2, -4.0 - 2])
    for power in (0.25, 0.5, 1.0):
        near = torch.tensor([[3.99, 4.01]])
        low, high = loss.dial_reward(near, steps[:, :2], power=power, **given)[0].tolist()
        assert (high - low) / 0.02 == pytest.approx(-1 / 4, rel=1e-3)


def test_one_image_without_a_value_does_not_hide_that_the_others_fail():
    rewards = loss.dial_reward(
        torch.tensor([[NAN, 20.0]]),
        torch.tensor([[8.0, 4.0]]),
        scale=tensor(2.0),
        price=tensor(3.0),
        dial=tensor(8.0),
        failure=4.0,
    )
    assert math.isnan(float(rewards[0, 0]))
    assert float(rewards[0, 1]) == pytest.approx(-10.0)


def test_missing_members_are_in_no_mean_and_no_spread():
    rewards = torch.tensor([[1.0, 3.0, NAN], [NAN, NAN, 5.0], [2.0, 2.0, 2.0]])
    assert loss.group_std(rewards).tolist() == pytest.approx([1.0, 0.0, 0.0])
    advantages = loss.advantages(rewards, scale=None)
    assert advantages.tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    divided = loss.advantages(rewards, scale=tensor(0.5, 1.0, 1.0))
    assert divided[0].tolist() == [-2.0, 2.0, 0.0]


def test_leaving_one_out_is_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 4.0, 7.0, NAN]])
    left_out = loss.advantages(rewards, scale=None, leave_one_out=True)
    by_hand = [1.0 - 5.5, 4.0 - 4.0, 7.0 - 2.5, 0.0]
    assert left_out[0].tolist() == pytest.approx(by_hand)


def test_advantages_are_clipped():
    rewards = torch.tensor([[0.0, 1e6]])
    assert loss.advantages(rewards, scale=tensor(1.0)).tolist() == [[-5.0, 5.0]]


def test_a_group_is_dead_by_its_spread_against_its_dial():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 1.2], [1.0, NAN]])
    assert loss.dead_groups(rewards, tensor(1.0, 1.0, 1.0)).tolist() == [True, False, True]
    assert loss.dead_groups(rewards, tensor(1.0, 3.0, 1.0)).tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2 * 1.28, 0.0),  # above the upper clip a good action gains no more
        (1.5, -2.0, -3.0, -3.0),  # but a bad one is still pushed down
        (0.5, -2.0, -2 * 0.8, 0.0),
        (0.5, 2.0, 1.0, 1.0),
    ],
)
def test_the_clipped_surrogate(ratio, advantage, gain, slope):
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    surrogate = loss.clipped_surrogate(
        new, tensor(0.0), tensor(advantage), tensor(1.0), clip_low=0.2, clip_high=0.28
    )
    assert float(surrogate.loss.detach()) == pytest.approx(-gain, rel=1e-5)
    surrogate.loss.backward()
    assert float(new.grad) == pytest.approx(-slope, rel=1e-5)
    assert bool(surrogate.clipped) == (slope == 0.0)


def test_weightless_decisions_are_in_nothing():
    new = torch.tensor([0.3, 9.0], requires_grad=True)
    surrogate = loss.clipped_surrogate(
        new, tensor(0.0, 0.0), tensor(1.0, 1.0), tensor(0.5, 0.0), clip_low=0.2, clip_high=0.28
    )
    assert float(surrogate.loss.detach()) == pytest.approx(-0.5 * 1.28)
    assert float(surrogate.divergence) == pytest.approx(math.exp(0.3) - 1.3, rel=1e-5)


def test_k3_is_the_divergence_in_the_mean():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mean = (p * loss.k3(q.log(), p.log())).sum()
    assert float(mean) == pytest.approx(float((p * (p / q).log()).sum()))
    assert float(loss.k3(tensor(0.0), tensor(0.0))) == 0.0
    assert bool(loss.k3(tensor(100.0), tensor(0.0)).isfinite())


def test_entropy_is_paid_for_below_its_floor_and_within_bounds():
    up = loss.adapt_entropy(0.01, entropy=0.2, floor=0.4)
    assert up == pytest.approx(0.01 * math.exp(0.5 * 0.2))
    assert loss.adapt_entropy(0.01, entropy=0.9, floor=0.4) < 0.01
    assert loss.adapt_entropy(0.01, entropy=-900.0, floor=0.4) == 0.1
    assert loss.adapt_entropy(0.01, entropy=900.0, floor=0.4) == 1e-4
    assert loss.adapt_entropy(0.01, entropy=NAN, floor=0.4) == 0.01


def test_prices_follow_the_dial():
    assert loss.adapt_price(1.0, mean_steps=9.0, dial=6.0) == pytest.approx(1.5)
    assert loss.adapt_price(0.1, mean_steps=3.0, dial=6.0) == 0.0
    assert loss.adapt_price(7.9, mean_steps=60.0, dial=6.0) == 8.0


def test_a_group_beyond_float32_is_dead_and_moves_nothing():
    rewards = tensor([1e38, -1e38, 3e38, 0.0], [1.0, 2.0, 3.0, 4.0])
    scale = tensor(1.0, 1.0)
    assert loss.dead_groups(rewards, scale).tolist() == [True, False]
    assert loss.advantages(rewards, scale=None).isfinite().all()
    assert loss.advantages(tensor([3e38, 3e38, 3e38]), scale=tensor(1.0)).isfinite().all()

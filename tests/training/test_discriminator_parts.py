# SPDX-License-Identifier: Apache-2.0
"""The formulas of the discriminator by hand, its buffer against a plain list, its alarms both ways."""

from __future__ import annotations

import math

import pytest
import torch

from training.discriminator.alarms import MESSAGES, Alarms
from training.discriminator.buffer import PairBuffer
from training.discriminator.config import DiscriminatorConfig
from training.discriminator.diagnostics import (
    accuracy,
    auc,
    bin_of,
    by_nfe,
    paired,
)
from training.discriminator.head import Head, cross_entropy, r1
from training.discriminator.scale import RewardScale


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# Diagnostics


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [
        (t(3, 4), t(1, 2), 1.0),
        (t(1, 2), t(3, 4), 0.0),
        (t(1, 1, 1), t(1, 1), 0.5),
        (t(2, 3), t(1, 2, 4), (1 + 0.5 + 0 + 1 + 1 + 0) / 6),
        (t(5), t(5), 0.5),
        (t(math.inf), t(-math.inf, math.inf), 0.75),
    ],
)
def test_auc_counts_ordered_pairs_and_half_the_ties(real, fake, expected):
    assert auc(real, fake) == pytest.approx(expected, abs=1e-12)


def test_auc_equals_the_count_over_all_pairs():
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.randint(0, 9, (n,), generator=generator).float() for n in (57, 91))
    difference = (real[:, None] - fake[None]).sign()
    assert auc(real, fake) == pytest.approx(float((difference.mean() + 1) / 2), abs=1e-6)


def test_one_class_without_pictures_has_no_auc():
    assert math.isnan(auc(t(), t(1, 2)))
    assert math.isnan(auc(t(1, 2), t()))
    assert math.isnan(paired(t(), t()))


def test_pairs_are_compared_row_by_row():
    assert paired(t(1, 5, 3, 2), t(0, 4, 4, 2)) == (1 + 1 + 0 + 0.5) / 4
    # Prompts differ more than pictures do: the overall order says little, that within pairs all.
    real = torch.arange(50.0)
    assert paired(real, real - 0.1) == 1.0
    assert auc(real, real - 0.1) == pytest.approx(0.51)


def test_accuracy_weighs_classes_alike_and_gives_nothing_for_zero():
    assert accuracy(t(1, 1, -1, 0), t(-1, 1)) == (0.5 + 0.5) / 2


def test_evaluations_fall_into_bins():
    edges = (3, 4, 6)
    assert bin_of(torch.tensor([1, 3, 4, 5, 6, 7, 28]), edges).tolist() == [0, 0, 1, 2, 2, 2, 2]
    real, fake = t(1, 1, 0, 2), t(0, 0, 1, 1)
    nfe = torch.tensor([9, 3, 9, 3])
    assert by_nfe(auc, real, fake, nfe, edges) == {3: 0.875, 6: 0.5}


# Loss


def test_smoothed_cross_entropy_is_that_of_smoothed_targets():
    real, fake = t(2.0, -1.0), t(0.5, -3.0)
    log = torch.nn.functional.logsigmoid
    by_hand = [-0.95 * log(x) - 0.05 * log(-x) for x in real]
    by_hand += [-0.05 * log(x) - 0.95 * log(-x) for x in fake]
    torch.testing.assert_close(cross_entropy(real, fake, 0.1), sum(by_hand) / 4)
    assert float(cross_entropy(t(0), t(0), 0.1)) == pytest.approx(math.log(2))


def test_smoothed_loss_is_least_at_the_targets_logit():
    best = math.log(0.95 / 0.05)
    losses = [float(cross_entropy(t(x), t(-x), 0.1)) for x in (best - 0.1, best, best + 0.1)]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5)])
def test_r1_is_the_squared_gradient_of_finite_differences(shape):
    head = Head(5, 8, torch.Generator().manual_seed(0)).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    penalty = r1(head(x), x)
    plain, h, total = x.detach(), 1e-6, 0.0
    for step in torch.eye(plain.numel(), dtype=torch.float64).view(-1, *shape) * h:
        with torch.no_grad():
            total += float((head(plain + step) - head(plain - step)).sum() / (2 * h)) ** 2
    assert penalty.item() == pytest.approx(total / 3, rel=1e-6)
    penalty.backward()  # the optimiser needs its gradient in the weights
    assert float(head.adapter.weight.grad.abs().sum()) > 0


def test_head_standardises_and_keeps_constant_features_small():
    head = Head(2, 4, torch.Generator().manual_seed(0))
    head.standardise(t(1, 7, 3, 7).view(2, 2))
    assert head.scale.tolist() == pytest.approx([1, 0.1 * math.sqrt(0.5)])
    torch.testing.assert_close(head.normalised(t(1, 7, 5, 7).view(2, 2)), t(-1, 0, 3, 0).view(2, 2))


def test_head_stays_finite_where_nothing_varies():
    head = Head(2, 4, torch.Generator().manual_seed(0))
    head.standardise(t(3, 7, 3, 7).view(2, 2))
    assert head.normalised(t(4, 9).view(1, 2)).tolist() == [[1, 2]]


def test_head_sees_one_token_as_it_sees_a_vector_and_no_order_of_tokens():
    head = Head(6, 8, torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(head(x[:, 0]), head(x[:, :1]))
    torch.testing.assert_close(head(x), head(x.flip(1)))


def test_head_of_a_million_parameters_is_refused():
    Head(7000, 128, torch.Generator())
    with pytest.raises(ValueError, match="hidden must leave the head below 1,000,000 parameters"):
        Head(8000, 128, torch.Generator())


def test_making_a_head_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Head(5, 8, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)


# Buffer


def fill(buffer: PairBuffer, numbers: range) -> None:
    """Pair i: fake (i, i), real (-i, -i), nfe i."""
    column = torch.arange(numbers.start, numbers.stop)
    rows = column[:, None].expand(-1, 2).half()
    buffer.add(rows, -rows, column)


def held(buffer: PairBuffer, index: torch.Tensor) -> list[int]:
    """Numbers of the pairs in some rows, after a look that pairs are still pairs."""
    fake, real, nfe = buffer.rows(index)
    assert torch.equal(fake, -real)
    assert torch.equal(fake[:, 0].long(), nfe)
    return nfe.tolist()


@pytest.mark.parametrize("sizes", [(3, 3, 3), (5, 1, 4), (7,), (2, 12), (1,) * 11, (5, 5)])
def test_ring_holds_the_last_pairs_and_pairs_stay_pairs(sizes):
    buffer, start = PairBuffer(5), 1
    for size in sizes:
        fill(buffer, range(start, start + size))
        start += size
        assert sorted(held(buffer, buffer.all_rows())) == list(range(max(1, start - 5), start))
        assert sorted(buffer.nfe().tolist()) == sorted(held(buffer, buffer.all_rows()))


def test_newest_generation_is_what_came_since_the_last_close():
    buffer = PairBuffer(5)
    assert held_numbers(buffer) == []
    fill(buffer, range(1, 3))
    fill(buffer, range(3, 4))
    assert held_numbers(buffer) == [1, 2, 3]
    buffer.close()
    assert held_numbers(buffer) == [1, 2, 3]
    fill(buffer, range(4, 4))
    assert held_numbers(buffer) == [1, 2, 3]
    fill(buffer, range(4, 8))
    assert held_numbers(buffer) == [4, 5, 6, 7]
    fill(buffer, range(8, 30))
    assert held_numbers(buffer) == [25, 26, 27, 28, 29]


def held_numbers(buffer: PairBuffer) -> list[int]:
    return held(buffer, buffer.newest()) if len(buffer) else []


def test_buffer_comes_back_from_its_state_at_any_fill():
    buffer = PairBuffer(5)
    for size in range(8):
        fill(buffer, range(10 * size, 10 * size + size))
        state = {k: v.clone() for k, v in buffer.state_dict().items()}
        again = PairBuffer(5)
        again.load_state_dict(state)
        for one in (buffer, again):
            fill(one, range(100, 102))
        assert buffer.state_dict().keys() == again.state_dict().keys()
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in buffer.state_dict().items())
        buffer.close()


# Scale and alarms


def test_rewards_are_centred_scaled_and_clipped():
    scale = RewardScale(0.75, 3.0)
    scale.move(t(0, 4))
    assert (scale.mean, scale.std) == (2.0, 2.0)
    assert scale.pay(t(2, 4, -2, 100, -100)).tolist() == [0, 1, -2, 3, -3]
    assert scale.clipped(t(2, 8, 100, -100)) == 0.75
    scale.move(t(10, 10))
    assert (scale.mean, scale.std) == (4.0, 1.5)


def test_equal_logits_pay_finite_rewards():
    scale = RewardScale(0.9, 3.0)
    assert scale.clipped(t(7)) == 0.0
    scale.move(t(1, 1))
    assert scale.pay(t(1, 1)).tolist() == [0, 0]
    assert scale.pay(t(2)).tolist() == [3]


@pytest.mark.parametrize(
    ("area", "clipped", "lowest", "kind"),
    [
        (1.0, 0.0, 1.0, "saturated"),
        (0.8, 1.0, 1.0, "clipped"),
        (0.5, 0.0, 0.5, "blind"),
        (0.8, 0.1, 0.9, ""),
    ],
)
def test_alarms_wait_for_many_updates_and_say_what_to_do(area, clipped, lowest, kind):
    alarms = Alarms(4, 0.99, 0.52)
    for count in range(1, 9):
        alarms.note(area=area, clipped=clipped, lowest=lowest)
        assert alarms.kind == (kind if count >= 4 else "")
    assert bool(MESSAGES[alarms.kind]) == bool(kind)


def test_alarms_end_when_things_are_well_again():
    alarms = Alarms(4, 0.99, 0.52)
    for _ in range(10):
        alarms.note(area=0.5, clipped=0.0, lowest=0.5)
    for _ in range(2):
        alarms.note(area=0.7, clipped=0.0, lowest=0.8)
    assert alarms.kind == ""


# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("betas", (0.5, 1.0)),
        ("betas", (0.5,)),
        ("label_smoothing", 1.0),
        ("r1_weight", -0.1),
        ("r1_weight", math.inf),
        ("skip_above", 1.5),
        ("hidden", 0),
        ("batch", 2.5),
        ("momentum", 1.0),
        ("clip", math.inf),
        ("nfe_bins", ()),
        ("nfe_bins", (3, 3)),
        ("nfe_bins", (0, 3)),
        ("patience", 0),
        ("first_steps", 0),
    ],
)
def test_senseless_fields_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must "):
        DiscriminatorConfig(**{field: value})

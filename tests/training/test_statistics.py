# SPDX-License-Identifier: Apache-2.0
"""Every formula against numbers worked out by hand, and what it does with garbage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from training.statistics import (
    Draws,
    Estimate,
    at_cost,
    bootstrap,
    derangement,
    difference,
    estimate,
    fitted_mean,
    holm,
    lookup,
    never_worse,
    oracle,
    p_value,
    power_law,
    reaching,
    thirds,
)


def one(*values: float) -> np.ndarray:
    """Points of a curve in a single draw, `[K, 1]`."""
    return np.array(values)[:, None]


def even(pairs: int, seeds: int = 1) -> Draws:
    """The sample itself."""
    return Draws(pairs=np.full((1, pairs), 1 / pairs), seeds=np.full((1, seeds), 1 / seeds))


# --- draws


def test_row_0_is_the_sample_and_every_row_sums_to_one() -> None:
    draws = bootstrap("abcd", seeds=3, draws=50)
    assert draws.pairs.shape == (51, 4)
    assert draws.seeds.shape == (51, 3)
    assert draws.pairs[0] == pytest.approx([0.25] * 4)
    assert draws.seeds[0] == pytest.approx([1 / 3] * 3)
    assert draws.pairs.sum(1) == pytest.approx(np.ones(51))
    assert draws.seeds.sum(1) == pytest.approx(np.ones(51))


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    draws = bootstrap(["a", "b", "a"], seeds=1, draws=200)
    assert (draws.pairs[:, 0] == draws.pairs[:, 2]).all()
    assert len(set(draws.pairs[:, 1])) > 1


def test_the_same_seed_gives_the_same_draws() -> None:
    a, b = (bootstrap(range(9), 2, 20, seed=4) for _ in range(2))
    assert (a.pairs == b.pairs).all()
    assert (a.seeds == b.seeds).all()
    assert (a.pairs != bootstrap(range(9), 2, 20, seed=5).pairs).any()


def test_the_interval_of_a_mean_has_the_width_of_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=(1, 900))
    spread = estimate(bootstrap(range(900), 1, 4000).mean(values))
    width = 2 * 1.96 * values.std() / 30
    assert spread.high - spread.low == pytest.approx(width, rel=0.06)
    assert spread.value == pytest.approx(values.mean())


def test_training_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1, 400)) + np.array([[-1.0], [0.0], [1.0]])
    draws = bootstrap(range(400), 3, 500)
    together = estimate(draws.mean(values))
    alone = estimate(bootstrap(range(400), 1, 500).mean(values[:1]))
    assert together.high - together.low > 5 * (alone.high - alone.low)
    assert together.value == pytest.approx(values.mean())


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_claim_falsely_as_seldom_as_was_said(seeds: int) -> None:
    rng, false, many = np.random.default_rng(0), 0, 300
    for i in range(many):
        values = 1 + rng.normal(scale=0.01, size=(seeds, 1))
        relative = difference(
            bootstrap(range(2), seeds, 400, seed=i).mean(values.repeat(2, 1)), np.ones(401)
        )
        span = estimate(relative)
        false += not span.low <= 0 <= span.high
    assert false / many < 0.05 + 3 * (0.05 * 0.95 / many) ** 0.5
    assert false > 0


def test_the_spread_over_seeds_is_that_of_student() -> None:
    values = np.array([[1.0], [2.0], [6.0]]).repeat(4, 1)
    span = estimate(bootstrap(range(4), 3, 40_000).mean(values))
    half = 4.303 * 7**0.5 / 3**0.5  # t of two degrees of freedom at 97.5 %, s of 1, 2 and 6
    assert (span.low, span.high) == pytest.approx((3 - half, 3 + half), rel=0.06)


def test_seeds_that_say_nothing_leave_no_nonsense() -> None:
    draws = bootstrap(range(4), 2, 200)
    wild = np.array([[1e-4], [1.0]]).repeat(4, 1)
    relative = difference(draws.mean(wild), np.ones(201))
    assert relative.min() == -1
    costs = np.stack([draws.mean(wild), 2 * draws.mean(wild)])
    assert np.isfinite(at_cost(1.0, costs, costs)).all()


def test_what_has_no_training_seed_is_the_same_in_every_one() -> None:
    draws = bootstrap("ab", seeds=3, draws=10)
    once, thrice = np.array([[1.0, 3.0]]), np.array([[1.0, 3.0]] * 3)
    assert draws.mean(once) == pytest.approx(draws.mean(thrice))
    with pytest.raises(ValueError, match=r"values must have 1 or 3 seeds, got 2"):
        draws.mean(thrice[:2])


def test_worst_tenth_of_twenty_is_the_mean_of_the_largest_two() -> None:
    values = np.arange(20.0)[None]
    assert even(20).worst(values)[0] == pytest.approx(18.5)


def test_worst_tenth_takes_part_of_a_pair() -> None:
    # A tenth of 15 pairs is one and a half: (14 + 13 / 2) / 1.5.
    assert even(15).worst(np.arange(15.0)[None])[0] == pytest.approx((14 + 6.5) / 1.5)


def test_worst_tenth_is_taken_seed_by_seed() -> None:
    values = np.zeros((2, 10))
    values[0, 3], values[1, 7] = 4.0, 2.0
    assert even(10, seeds=2).worst(values)[0] == pytest.approx(3.0)


def test_worst_tenth_follows_the_weights() -> None:
    draws = Draws(pairs=np.array([[0.05, 0.95]]), seeds=np.ones((1, 1)))
    assert draws.worst(np.array([[8.0, 2.0]]))[0] == pytest.approx((8 + 2) / 2)


def test_within_a_stratum_weights_are_scaled() -> None:
    draws = Draws(pairs=np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]), seeds=np.ones((2, 1)))
    inside = draws.within(np.array([False, True, True]))
    assert inside.pairs[0] == pytest.approx([0.375, 0.625])
    assert inside.pairs[1] == pytest.approx([0.5, 0.5])  # a draw without any
    with pytest.raises(ValueError, match="at least one pair, got none"):
        draws.within(np.zeros(3, bool))


@pytest.mark.parametrize(("n", "seeds", "draws"), [(0, 1, 9), (3, 0, 9), (3, 1, 0)])
def test_nothing_to_draw_is_an_error(n: int, seeds: int, draws: int) -> None:
    with pytest.raises(ValueError, match="pairs, seeds and draws must be at least 1"):
        bootstrap(range(n), seeds, draws)


# --- numbers with intervals


def test_an_estimate_is_the_first_draw_and_quantiles_of_the_rest() -> None:
    got = estimate(np.array([7.0, *range(1001)]))
    assert (got.value, got.low, got.high) == (7.0, 25.0, 975.0)


def test_an_accuracy_that_some_draws_never_reach_has_an_open_end() -> None:
    got = estimate(np.array([12.0, *[12.0] * 90, *[math.inf] * 10]))
    assert got.high == math.inf
    assert got.to_dict() == {"value": 12.0, "low": 12.0, "high": None}


@pytest.mark.parametrize("draws", [[1.0], [1.0, math.nan], []])
def test_an_estimate_needs_redraws_without_nan(draws: list[float]) -> None:
    with pytest.raises(ValueError, match="redraws of it without NaN"):
        estimate(np.array(draws))


def test_p_value_counts_the_smaller_side() -> None:
    draws = np.array([-1.0, *[-1.0] * 97, *[1.0] * 2])
    assert p_value(draws) == pytest.approx(2 * 3 / 100)
    assert p_value(-draws) == p_value(draws)


def test_p_value_is_never_zero_nor_above_one() -> None:
    assert p_value(np.array([5.0] * 1000)) == pytest.approx(2 / 1000)
    assert p_value(np.zeros(100)) == 1.0  # a way against itself


def test_rounding_is_no_difference() -> None:
    theirs = np.array([2.0, 4.0, 0.3])
    got = difference(np.array([1.0, 5.0, 0.1 + 0.2]), theirs)
    assert got.tolist() == [-0.5, 0.25, 0.0]


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_never_worse_looks_at_the_upper_bound() -> None:
    assert never_worse(Estimate(value=-0.1, low=-0.2, high=0.02))
    assert not never_worse(Estimate(value=-0.1, low=-0.2, high=0.021))


# --- curves


def test_between_two_points_a_curve_is_a_power() -> None:
    # 16 at 4 and 4 at 8 is 256 / k^2.
    costs, errors = one(4, 8), one(16, 4)
    assert at_cost(4.0, costs, errors)[0] == pytest.approx(16)
    assert at_cost(math.sqrt(32), costs, errors)[0] == pytest.approx(8)
    assert at_cost(16.0, costs, errors)[0] == pytest.approx(1)  # beyond the end it goes on


def test_each_piece_and_each_draw_has_its_own_power() -> None:
    costs = np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    errors = np.array([[8.0, 1.0], [4.0, 1.0], [1.0, 1.0]])
    got = at_cost(np.array([math.sqrt(8), 3.0]), costs, errors)
    assert got == pytest.approx([2.0, 1.0])


def test_a_curve_must_rise_in_cost() -> None:
    with pytest.raises(ValueError, match="two or more that rise, got"):
        at_cost(5.0, one(6, 5), one(1, 2))
    with pytest.raises(ValueError, match="two or more that rise, got"):
        at_cost(5.0, one(6), one(1))


def test_a_redraw_in_which_points_change_places_stays_finite() -> None:
    costs = np.array([[5.0, 5.1], [5.05, 5.05], [8.0, 8.0]])
    errors = np.array([[2.0, 2.0], [1.9, 1.9], [1.0, 1.0]])
    assert np.isfinite(at_cost(5.08, costs, errors)).all()
    assert np.isfinite(at_cost(4.0, costs, errors)).all()


def test_the_cost_of_an_accuracy_inverts_the_curve() -> None:
    costs, errors = one(4, 8, 16), one(16, 4, 3)
    assert reaching(16.0, costs, errors)[0] == pytest.approx(4)
    assert reaching(8.0, costs, errors)[0] == pytest.approx(math.sqrt(32))
    assert reaching(at_cost(11.0, costs, errors), costs, errors)[0] == pytest.approx(11)
    assert reaching(20.0, costs, errors)[0] == pytest.approx(4)  # a bound
    assert reaching(2.0, costs, errors)[0] == math.inf


def test_the_first_time_that_a_curve_comes_down_counts() -> None:
    assert reaching(2.0, one(1, 2, 4, 8), one(4, 1, 4, 1))[0] == pytest.approx(math.sqrt(2))


# --- the oracle


def test_a_power_law_is_recovered() -> None:
    ks = [4, 6, 8, 11, 16]
    a, p = np.array([0.5, -3.0]), np.array([2.0, 0.7])
    errors = np.exp(a - np.log(ks)[:, None] * p)
    got_a, got_p = power_law(ks, errors)
    assert got_a == pytest.approx(a)
    assert got_p == pytest.approx(p)


def test_a_fit_of_two_points_by_hand() -> None:
    a, p = power_law([2, 8], np.array([[8.0], [2.0]]))
    assert p[0] == pytest.approx(1)
    assert a[0] == pytest.approx(math.log(16))


@pytest.mark.parametrize("ks", [[6], [6, 6], [4, 6, 8]])
def test_a_fit_needs_two_different_numbers(ks: list[int]) -> None:
    with pytest.raises(ValueError, match="ks must be two or more different ones"):
        power_law(ks, np.ones((2, 3)))


def test_the_oracle_by_hand() -> None:
    # m = c / k with c = 1 and 9, a mean of 4 and so 8 in all: the easy one takes 2, the hard one 6.
    a, p = np.log(np.array([1.0, 9.0])), np.ones(2)
    got = oracle(a, p, np.array([4.0]), even(2), least=1, most=8)
    assert got[0] == pytest.approx((1 / 2 + 9 / 6) / 2)
    assert fitted_mean(a, p, np.array([4.0]), even(2))[0] == pytest.approx(10 / 8)


def test_the_oracle_is_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(1)
    a, p = rng.normal(size=3), rng.uniform(0.5, 3, size=3)
    k = np.arange(2, 8)
    errors = np.exp(a[:, None] - p[:, None] * np.log(k))
    for total in range(6, 22):
        best = min(
            errors[0, i] + errors[1, j] + errors[2, n]
            for i in range(6)
            for j in range(6)
            for n in range(6)
            if k[i] + k[j] + k[n] <= total
        )
        got = oracle(a, p, np.array([total / 3]), even(3), least=2, most=7)
        assert got[0] == pytest.approx(best / 3)


def test_images_that_are_alike_leave_nothing_to_an_oracle() -> None:
    a, p = np.zeros(5), np.full(5, 2.0)
    got = oracle(a, p, np.array([6.0]), even(5), least=3, most=12)
    assert got[0] == pytest.approx(fitted_mean(a, p, np.array([6.0]), even(5))[0])


def test_the_oracle_spends_nothing_on_an_image_that_gets_worse() -> None:
    a, p = np.array([0.0, 0.0]), np.array([1.0, -1.0])
    got = oracle(a, p, np.array([4.0]), even(2), least=2, most=6)
    assert got[0] == pytest.approx((1 / 6 + 2) / 2)


def test_the_oracle_follows_the_weights() -> None:
    a, p = np.log(np.array([1.0, 9.0])), np.ones(2)
    draws = Draws(pairs=np.array([[0.5, 0.5], [1.0, 0.0]]), seeds=np.ones((2, 1)))
    got = oracle(a, p, np.array([4.0, 4.0]), draws, least=1, most=8)
    assert got[1] == pytest.approx(1 / 4)


def test_an_oracle_without_a_choice_is_an_error() -> None:
    a, p = np.zeros(2), np.ones(2)
    with pytest.raises(ValueError, match="least and most must rise from 1 on"):
        oracle(a, p, np.array([4.0]), even(2), least=6, most=5)
    with pytest.raises(ValueError, match="the mean be at least least"):
        oracle(a, p, np.array([4.0]), even(2), least=5, most=9)


def test_lookup_reads_every_image_in_its_own_row() -> None:
    errors = np.array([[16.0, 4.0], [4.0, 2.0]])
    got = lookup([4, 8], errors, np.array([math.sqrt(32), 8.0]))
    assert got == pytest.approx([8.0, 2.0])


def test_lookup_holds_its_ends() -> None:
    """The second image has a larger error at 8 than at 4: at 28 that must not have grown further."""
    errors = np.array([[16.0, 1.0], [4.0, 2.0]])
    assert lookup([4, 8], errors, np.array([2.0, 28.0])) == pytest.approx([16.0, 2.0])


# --- permutations and thirds


def test_a_derangement_leaves_nothing_in_its_place() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 40):
        drawn = derangement(n, rng)
        assert sorted(drawn) == list(range(n))
        assert (drawn != np.arange(n)).all()


def test_every_derangement_of_three_comes_up() -> None:
    rng = np.random.default_rng(0)
    assert len({tuple(derangement(3, rng)) for _ in range(50)}) == 2


@pytest.mark.parametrize("n", [0, 1])
def test_one_image_has_nobody_to_change_with(n: int) -> None:
    with pytest.raises(ValueError, match="n must be at least 2"):
        derangement(n, np.random.default_rng(0))


def test_thirds_by_hand() -> None:
    assert thirds(np.array([5.0, 1.0, 9.0, 2.0, 7.0, 3.0])).tolist() == [1, 0, 2, 0, 2, 1]
    assert thirds(np.array([1.0, 1.0, 1.0])).tolist() == [0, 1, 2]
    assert np.bincount(thirds(np.arange(10.0))).tolist() == [4, 3, 3]

# SPDX-License-Identifier: Apache-2.0
"""Comparisons of made-up studies whose answers are known: power-law errors, plans that adapt and plans that do not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from studies import DIALS, TABLES, N, best_plan, comparison, curve, hardness, measured, study

from rapid3rt.tiny.scenes import sample
from training import adaptivity
from training.comparison import OURS, SEARCHED, Comparison, verdicts


def expected_gain(mean: float) -> float:
    """Mean error of the best plan over that of equal ones, less 1."""
    c = hardness()
    return float((c / best_plan(c, mean) ** 2).mean() / (c / mean**2).mean() - 1)


# --- ways and rivals


def test_every_way_has_its_error_cost_and_worst_tenth() -> None:
    ways = comparison().ways()
    assert list(ways) == ["full", OURS, SEARCHED, "plain", "steps/trim", "prior"]
    point, c = ways["plain"]["6"], hardness()
    assert point["error"]["value"] == pytest.approx(4 * c.mean() / 36)
    assert point["error"]["low"] < point["error"]["value"] < point["error"]["high"]
    assert point["worst_tenth"]["value"] == pytest.approx(4 * np.sort(c)[-6:].mean() / 36)
    assert point["cost"]["value"] == pytest.approx(6)
    assert point["score_drop"]["value"] == pytest.approx(0)
    assert point["score_drop"]["not_inferior"]
    assert ways["full"]["error"]["value"] == pytest.approx(c.mean() / 100)


def test_a_fall_of_the_score_beyond_a_hundredth_is_inferior() -> None:
    base = study()
    worse = replace(base.ours[6.0], score=np.full((1, N), 0.98))
    ways = Comparison(replace(base, ours={**base.ours, 6.0: worse}), 50).ways()
    assert ways[OURS]["6"]["score_drop"]["value"] == pytest.approx(0.02)
    assert not ways[OURS]["6"]["score_drop"]["not_inferior"]


def test_a_rival_is_met_at_its_own_cost() -> None:
    # Against the same errors at 4 times the size, at every cost: 1/4 of the gain's rest.
    answer = comparison().against()["plain"]["6"]
    assert answer["cost"] == pytest.approx(6)
    assert answer["difference"]["value"] == pytest.approx((1 + expected_gain(6)) / 4 - 1)
    assert answer["better"]
    assert answer["never_worse"]
    assert not answer["worse"]


def test_equal_cost_means_equal_cost() -> None:
    # A rival that asked for 6 and spent 7 is met at 7.
    c = hardness()
    rivals = {"plain": {6.0: measured(c / 49, 7.0)}}
    answer = comparison(rivals=rivals).against()["plain"]["6"]
    assert answer["cost"] == pytest.approx(7)
    assert answer["difference"]["value"] == pytest.approx(expected_gain(7))


def test_searched_schedules_are_read_between_integers_at_the_cost_of_ours() -> None:
    c = hardness()
    ours = {k: measured(c / 6.4**2, 6.4 * k / 6) for k in (5.0, 6.0, 8.0)}
    answer = comparison(ours=ours).against()[SEARCHED]["6"]
    assert answer["cost"] == pytest.approx(6.4)
    assert answer["difference"]["value"] == pytest.approx(0, abs=1e-9)


def test_what_was_not_measured_there_is_said_and_not_guessed() -> None:
    c = hardness()
    rivals = {"plain": {5.0: measured(c, 3.0), 6.0: measured(c, 6.0)}}
    answers = comparison(rivals=rivals).against()["plain"]
    assert answers["5"]["note"] == "ours: measured at 4.00, 5.00, 6.00, 8.00, 12.00 only"
    assert "difference" not in answers["5"]
    assert answers["6"]["p_holm"] == answers["6"]["p"]  # corrected over those that were compared


def test_one_fixed_schedule_is_no_curve() -> None:
    schedules = {"fixed schedules": curve(hardness(), (6,))}
    answers = comparison(schedules=schedules).against()["fixed schedules"]
    assert answers["6"]["note"] == "the schedules: measured at 6.00 only"


def test_a_rule_at_the_end_of_its_range_is_measured_once_there() -> None:
    # Its cost does not come below 6, and at 5 and 6 it is the same; ours may have such an end too.
    c = hardness()
    stuck = {5.0: measured(c / 36, 6.0), 6.0: measured(c / 36, 6.0), 8.0: measured(c / 64, 8.0)}
    base = study()
    made = comparison(rivals={"controller": stuck}, ours={**base.ours, 5.0: base.ours[6.0]})
    answers = made.against()["controller"]
    assert answers["5"]["difference"] == answers["6"]["difference"]
    assert made.iso()["controller"]["measured_to"] == pytest.approx(8)
    alone = comparison(rivals={"controller": {5.0: stuck[5.0], 6.0: stuck[6.0]}})
    assert "controller" not in alone.iso()


def test_a_curve_that_falls_back_in_cost_is_read_by_cost() -> None:
    c = hardness()
    back = {4.0: measured(c / 36, 6.0), 6.0: measured(c / 16, 4.0), 8.0: measured(c / 64, 8.0)}
    costs, errors, _ = comparison().curve(back, N)
    assert costs[:, 0] == pytest.approx([4, 6, 8])
    assert errors[0, 0] == pytest.approx(c.mean() / 16)


def test_a_way_against_itself_is_never_better() -> None:
    same = comparison(rivals={"prior": {float(k): study().ours[k] for k in DIALS}})
    for answer in same.against()["prior"].values():
        assert answer["difference"] == {"value": 0, "low": 0, "high": 0}
        assert answer["p"] == 1
        assert not answer["better"]
        assert answer["never_worse"]


def test_p_values_are_corrected_over_dials() -> None:
    rng = np.random.default_rng(0)
    c = hardness()
    rivals = {
        "noisy": {float(k): measured(c * k**-2.0 * rng.lognormal(0, 0.4, N), k) for k in DIALS}
    }
    answers = comparison(rivals=rivals).against()["noisy"]
    assert all(answers[f"{k}"]["p_holm"] >= answers[f"{k}"]["p"] for k in DIALS)
    assert any(answers[f"{k}"]["p_holm"] > answers[f"{k}"]["p"] for k in DIALS)


def test_a_prefix_is_compared_with_the_same_pairs_of_ours() -> None:
    c = hardness()
    rivals = {"plain": {6.0: measured(c[:20] / 36, 6.0)}}
    full = study()
    ours = {k: measured(c / k**2, k) for k in full.ours}
    answer = comparison(rivals=rivals, ours=ours).against()["plain"]["6"]
    assert answer["ours"] == pytest.approx(c[:20].mean() / 36)
    assert answer["difference"]["high"] == pytest.approx(0, abs=1e-9)


def test_training_seeds_are_averaged_and_shown() -> None:
    c = hardness()
    ours = {k: measured(np.stack([c, 3 * c]) / k**2, k, seeds=2) for k in (4.0, 5.0, 6.0, 8.0)}
    made = comparison(ours=ours)
    point = made.ways()[OURS]["6"]
    assert point["error"]["value"] == pytest.approx(2 * c.mean() / 36)
    assert point["error_by_seed"] == pytest.approx([c.mean() / 36, 3 * c.mean() / 36])
    difference = made.against()["prior"]["6"]["difference"]
    assert difference["value"] == pytest.approx(1)
    # Once and three times as bad: two trainings leave nearly everything open.
    assert difference["low"] == pytest.approx(-1)
    assert difference["high"] > 5


def test_the_speed_up_at_the_accuracy_of_the_full_run() -> None:
    answers = comparison().iso()
    # Errors c / k^2 meet c / 100 at 10, 4 c / k^2 at 20, which plain was not measured at.
    assert answers[SEARCHED]["cost"]["value"] == pytest.approx(10)
    assert answers[SEARCHED]["speedup"]["value"] == pytest.approx(2.8)
    assert answers[OURS]["speedup"]["value"] > 2.8
    assert answers["plain"]["cost"]["value"] is None
    assert answers["plain"]["speedup"]["value"] == 0
    assert answers["plain"]["reached"] == 0
    assert answers["plain"]["measured_to"] == pytest.approx(8)


# --- adaptivity


def test_the_oracle_is_what_ours_does() -> None:
    answers = adaptivity.head_room(comparison())
    for dial in DIALS:
        answer = answers[f"{dial}"]
        assert answer["counts"]
        assert -answer["head_room"]["value"] == pytest.approx(expected_gain(dial), abs=0.03)
        assert answer["share"]["value"] == pytest.approx(1, abs=0.1)


def test_the_searched_family_wins_nothing_of_the_head_room() -> None:
    c = hardness()
    ours = {float(k): measured(c / k**2, k) for k in (4, 5, 6, 8)}
    answers = adaptivity.head_room(comparison(ours=ours))
    assert answers["6"]["share"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_share_of_next_to_nothing_is_not_given() -> None:
    c = hardness(0.05)
    alike = study(
        ours={float(k): measured(c / k**2, k) for k in (4, 5, 6, 8)},
        searched=curve(c, (4, 5, 6, 7, 8, 9, 11, 16)),
    )
    answer = adaptivity.head_room(Comparison(alike, 100))["6"]
    assert not answer["counts"]
    assert answer["share"] is None


def test_shuffled_plans_lose_what_adapting_won() -> None:
    base = study()
    c, plan = hardness(), base.ours[6.0].cost[0]
    taken = np.roll(plan, 1)
    made = comparison(shuffled={6.0: measured(c / taken**2, taken)})
    answer = adaptivity.shuffled(made)["6"]
    assert answer["gain"]["value"] == pytest.approx((c / taken**2).mean() - (c / plan**2).mean())
    assert answer["gains"]
    assert answer["p_holm"] == answer["p"]


def test_fewer_pairs_may_be_shuffled_than_measured() -> None:
    """The control is compared with the same pairs under their own plans."""
    base = study()
    c, own = hardness(), base.ours[6.0]
    other = measured(c[:40] / np.roll(own.cost[0, :40], 1) ** 2, own.cost[0, :40])
    answer = adaptivity.shuffled(comparison(shuffled={6.0: other}))["6"]
    assert answer["own"] == pytest.approx(own.error[:, :40].mean())
    assert answer["gain"]["value"] == pytest.approx(other.error.mean() - answer["own"])


def test_a_policy_that_treats_all_alike_gains_nothing_over_its_shuffle() -> None:
    c = hardness()
    ours = {float(k): measured(c / k**2, k) for k in (4, 5, 6, 8)}
    made = comparison(ours=ours, shuffled={6.0: measured(c / 36, 6.0)})
    answer = adaptivity.shuffled(made)["6"]
    assert answer["gain"]["value"] == pytest.approx(0)
    assert not answer["gains"]
    looked_up = adaptivity.shuffled_allocation(made)["6"]
    assert looked_up["relative_gain"]["value"] == pytest.approx(0)


def test_shuffled_numbers_alone_are_looked_up() -> None:
    looked_up = adaptivity.shuffled_allocation(comparison())["6"]
    c = hardness()
    plan = best_plan(c, 6).clip(min(TABLES), max(TABLES))  # what the tables know
    expected = c.mean() * (plan**-2.0).mean()  # independent of each other
    assert looked_up["own"] == pytest.approx((c / plan**2).mean(), rel=1e-6)
    assert looked_up["shuffled"] == pytest.approx(expected, rel=0.15)
    assert looked_up["relative_gain"]["low"] > 0


def test_a_policy_that_reuses_has_no_number_to_look_up() -> None:
    base = study()
    ours = {k: replace(way, dense=False) for k, way in base.ours.items()}
    assert adaptivity.shuffled_allocation(comparison(ours=ours)) == {}


def test_strata_are_met_at_their_own_cost() -> None:
    # Textured scenes are twice as dear and as hard as the fixed schedule would have it: within strata nothing is won.
    scenes = sample(N, 0)
    hard = np.array([scene.texture != "plain" for scene in scenes])
    k_of = {k: np.where(hard, 1.4 * k, 0.8 * k) for k in (4, 5, 6, 8)}
    c = np.ones(N)
    ours = {float(k): measured(c / spent**2, spent) for k, spent in k_of.items()}
    made = comparison(ours=ours, searched=curve(c, (3, 4, 5, 6, 7, 8, 9, 11, 16)))
    found = {(s["by"], s["name"]): s for s in adaptivity.strata(made)}
    plain = found["ground", "plain"]
    assert plain["pairs"] == (~hard).sum()
    assert plain["dials"]["5"]["cost"] == pytest.approx(4)
    assert plain["dials"]["6"]["difference"]["value"] == pytest.approx(0, abs=1e-9)
    assert {name for by, name in found if by == "objects"} == {"1", "2-3", "4-6"}
    assert sum(s["pairs"] for s in found.values() if s["by"] == "kind") == N
    assert all(row[0] > 0 for row in plain["curves"][OURS])


def test_a_stratum_of_a_few_pairs_says_nothing() -> None:
    found = adaptivity.strata(comparison())
    few = [s for s in found if s["pairs"] < 8]
    assert few
    assert all(set(s) == {"by", "name", "pairs"} for s in few)


def test_the_hardest_third_costs_more() -> None:
    answer = adaptivity.difficulty(comparison())
    plan, c = best_plan(hardness(), 6), hardness()
    order = np.argsort(c)
    expected = plan[order[40:]].mean() / plan[order[:20]].mean()
    assert answer["at"] == 6
    assert answer["dials"]["6"]["hardest_over_easiest"]["value"] == pytest.approx(expected)
    assert answer["thirds"] == sorted(answer["thirds"])
    bins = answer["dials"]["6"]["bins"]
    assert [b["cost"] for b in bins] == sorted(b["cost"] for b in bins)
    assert all(b["tenth"] <= b["cost"] <= b["ninth"] for b in bins)


def test_adaptive_means_better_than_searched_and_than_shuffled() -> None:
    base = study()
    c, plan = hardness(), base.ours[6.0].cost[0]
    taken = np.roll(plan, 1)
    made = comparison(shuffled={6.0: measured(c / taken**2, taken)})
    document = {
        "ways": made.ways(),
        "against": made.against(),
        **adaptivity.everything(made),
    }
    said = verdicts(document, DIALS)
    assert said["6"]["better_than_plain"]
    assert said["6"]["adaptive"] == said["6"]["better_than_searched"]
    assert said["5"]["adaptive"] is None  # nobody shuffled there
    json.dumps(document | {"verdicts": said}, allow_nan=False)


def test_variable_plans_that_only_repair_themselves_are_not_adaptive() -> None:
    # Better than its shuffle, no better than the searched family.
    c = hardness()
    ours = {float(k): measured(1.05 * c / k**2, k) for k in (4, 5, 6, 8)}
    made = comparison(ours=ours, shuffled={6.0: measured(1.4 * c / 36, 6.0)})
    document = {"ways": made.ways(), "against": made.against(), **adaptivity.everything(made)}
    said = verdicts(document, DIALS)["6"]
    assert said["better_than_shuffled"]
    assert said["adaptive"] is False
    assert not said["never_worse_than_searched"]


def test_an_error_of_zero_is_no_infinity() -> None:
    zero = measured(np.zeros(N), 6.0)
    answers = comparison(searched={**study().searched, 6.0: zero}).ways()
    assert math.isfinite(answers[SEARCHED]["6"]["error"]["value"])

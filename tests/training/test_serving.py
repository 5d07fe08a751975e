# SPDX-License-Identifier: Apache-2.0
"""From training to a user: the folder that a run leaves gives the pictures that validation judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_world
import torch

import rapid3rt
from rapid3rt.pipeline import model_id
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.learned import Dial, Heads, HeadsConfig, LearnedPolicy
from rapid3rt.policies.schedule import ScheduleFamily, WarpFamily
from rapid3rt.types import AUTO
from training.allocation import planned_steps, read_conditioning
from training.bank import Bank, accelerated
from training.ranks import Ranks
from training.run import _plan_excess, make_heads
from training.subject import Subject
from training.validation import FURTHER_DIALS, Validation, measure_gains, rising

# E as it would be measured: 8 ticks at a speed of 2 ask for 4, which is the dial 5 here.
CALIBRATION = (
    Dial(dial=3, equivalent_steps=2.5, evaluations=2.5, error=9e-3),
    Dial(dial=5, equivalent_steps=4.0, evaluations=4.0, error=4e-3),
    Dial(dial=6, equivalent_steps=5.0, evaluations=5.0, error=3e-3),
)


def save(subject: Subject, folder: Path, recipe=small_world.DIAL) -> Path:
    PolicyFolder(
        model=subject.searched.model,
        schedule=small_world.FAMILY if recipe.prior else None,
        costs=small_world.COSTS,
        provenance={},
        heads=small_world.make_trained(recipe, subject),
        order=recipe.order,
        calibration=CALIBRATION if recipe.prior else (),
    ).save(folder)
    return folder


def call(subject: Subject, policy, **dial) -> tuple[torch.Tensor, list[float], list[str]]:
    """Images, NFE and notes of the validation pairs."""
    bank = subject.validation
    with accelerated(bank.pipe, policy, **dial):
        images = bank.images(range(len(bank)))
        report = rapid3rt.report(bank.pipe)
    return images, [image.nfe for image in report.images], list(report.notes)


def validate(bank: Bank | None, ranks: Ranks) -> Validation:
    assert bank is not None
    family, costs = small_world.FAMILY, small_world.COSTS
    return Validation(bank=bank, family=family, order=AUTO, costs=costs, ranks=ranks)


def test_a_saved_policy_gives_the_pictures_of_validation(subject: Subject, tmp_path) -> None:
    served, nfe, _ = call(subject, save(subject, tmp_path), speed=2.0)
    heads = small_world.make_trained(small_world.DIAL, subject)
    policy = LearnedPolicy(heads, small_world.FAMILY, order=AUTO, dial=5.0, costs=small_world.COSTS)
    judged, counted, _ = call(subject, policy)
    assert nfe == counted
    assert torch.equal(served, judged)
    untrained, _, _ = call(subject, "steps:5/trim")
    assert not torch.allclose(served, untrained, atol=0.05)


@pytest.mark.slow
def test_validation_counts_what_was_served(subject: Subject, ranks: Ranks) -> None:
    heads = small_world.make_trained(small_world.DIAL, subject)
    validation = validate(subject.validation, ranks)
    (measured,) = validation.measure(heads, [5.0])
    policy = LearnedPolicy(heads, small_world.FAMILY, order=AUTO, dial=5.0)
    images, nfe, _ = call(subject, policy)
    errors = (images - subject.validation.converged()).square().mean((1, 2, 3))
    assert measured.error == pytest.approx(float(errors.mean()), rel=1e-4)
    assert measured.evaluations == pytest.approx(sum(nfe) / len(nfe))
    metrics, score = validation.judge([measured])
    prior = subject.validation.searched(small_world.FAMILY, 5).error.mean()
    assert metrics["quality/m_prior@5"] == pytest.approx(float(prior), rel=1e-3)
    ratio = metrics["quality/m@5"] / metrics["quality/m_prior@5"]
    assert score == pytest.approx(-torch.tensor(ratio).log().item(), rel=1e-4)


def test_untrained_heads_score_as_the_family(subject: Subject, ranks: Ranks) -> None:
    validation = validate(subject.validation, ranks)
    heads = make_heads(small_world.DIAL, subject)
    _, score = validation.judge(validation.measure(heads, [4.0, 6.0]))
    assert score == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_a_budget_is_kept_exactly(subject: Subject, tmp_path, budget: int) -> None:
    _, nfe, _ = call(subject, save(subject, tmp_path), budget=budget)
    assert nfe == [budget] * len(nfe)


@pytest.mark.parametrize("budget", [1, 3])
def test_a_budget_is_never_exceeded_without_a_prior(subject: Subject, tmp_path, budget) -> None:
    _, nfe, _ = call(subject, save(subject, tmp_path, small_world.PAPER), budget=budget)
    assert max(nfe) <= budget


def test_speed_one_is_the_plain_pipeline(subject: Subject, tmp_path) -> None:
    plain = subject.validation.images(range(3))
    for recipe in (small_world.DIAL, small_world.PAPER):
        folder = save(subject, tmp_path / recipe.name, recipe)
        served, nfe, _ = call(subject, folder, speed=1)
        assert nfe == [8, 8, 8]
        assert torch.equal(served, plain)


def test_a_speed_beyond_the_calibration_names_its_range(subject: Subject, tmp_path) -> None:
    folder = save(subject, tmp_path)
    for speed in (1.5, 4.0):
        with pytest.raises(ValueError, match=r"speed must ask for 2\.50 to 5\.00 equivalent steps"):
            call(subject, folder, speed=speed)
    call(subject, folder, speed=1.6)


def test_a_policy_of_another_family_is_refused_by_name(subject: Subject, tmp_path) -> None:
    config = HeadsConfig(family="flux", channels=4, conditioning=128, heads=("step",), width=8)
    family = WarpFamily(family="flux", num_ticks=8, shift=1.2, order=AUTO, knots=())
    PolicyFolder(
        model="Flux-x",
        schedule=family,
        costs=small_world.COSTS,
        provenance={},
        heads=Heads(config),
    ).save(tmp_path)
    with pytest.raises(ValueError, match="must be for a sd3 model, got one for flux"):
        rapid3rt.accelerate(subject.pipe, tmp_path, speed=2)


@pytest.mark.parametrize("change", [{"channels": 16}, {"conditioning": 96}])
@pytest.mark.parametrize("heads", [("step",), ("allocation",)])
def test_a_policy_of_another_model_of_the_family_is_refused(
    subject: Subject, tmp_path, change: dict[str, int], heads: tuple[str, ...]
) -> None:
    values = {"channels": 4, "conditioning": 128, **change}
    config = HeadsConfig(family="sd3", heads=heads, width=8, **values)
    PolicyFolder(
        model="SD3-x",
        schedule=small_world.FAMILY,
        costs=small_world.COSTS,
        provenance={},
        heads=Heads(config),
        calibration=CALIBRATION,
    ).save(tmp_path)
    name = next(iter(change))
    if heads == ("allocation",) and name == "channels":
        return  # it never looks at latents
    with pytest.raises(
        ValueError, match=rf"transformer must .* {next(iter(change.values()))}.* got"
    ):
        call(subject, tmp_path, speed=2)


def test_serving_leaves_the_generators_alone(subject: Subject, tmp_path) -> None:
    folder = save(subject, tmp_path)
    before = torch.get_rng_state()
    call(subject, folder, speed=2.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dial", [4.0, 6.0])
def test_heads_say_nothing_at_a_silent_dial(subject: Subject, dial: float) -> None:
    heads = small_world.make_trained(small_world.DIAL, subject)
    spoken = replace(heads.config, silent=())

    def images(silent: tuple[float, ...], told: str = "", **limit: float) -> torch.Tensor:
        heads.config = replace(spoken, silent=silent)
        policy = LearnedPolicy(heads, small_world.FAMILY, order=AUTO, **limit)
        made, _, notes = call(subject, policy)
        assert told in "\n".join(notes)
        assert told or not notes
        return made

    other = 10.0 - dial
    untrained = LearnedPolicy(
        make_heads(small_world.DIAL, subject), small_world.FAMILY, order=AUTO, dial=dial
    )
    silent = f"step: is silent at {dial:g} evaluations in the mean"
    assert torch.equal(images((dial,), silent, dial=dial), call(subject, untrained)[0])
    by_budget = images((4.0, 6.0), silent, budget=int(dial))
    assert torch.equal(images((dial,), silent, budget=int(dial)), by_budget)
    assert torch.equal(images((other,), dial=dial), images((), dial=dial))
    assert not torch.equal(images((dial,), silent, dial=dial), images((), dial=dial))
    between = images((dial,), "step: counts 20%" if dial < 5 else "step: is silent", dial=5.0)
    assert not torch.equal(between, images((), dial=5.0))
    alone = images((4.0, 6.0), "step: is silent at 5", dial=5.0)
    assert torch.equal(between, alone) == (dial > 5)  # 5 is nearer to 6 than to 4 in log b


def test_how_much_of_the_heads_counts() -> None:
    config = HeadsConfig(
        family="sd3", channels=4, conditioning=8, dials=(4.0, 8.0, 16.0), silent=(8.0, 16.0)
    )
    shares = [config.share(b) for b in (1, 4, 4 * 2**0.25, 4 * 2**0.375, 32**0.5, 7, 8, 9, 16, 28)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0])
    assert replace(config, silent=()).share(6) == 1
    with pytest.raises(ValueError, match=r"silent must be some of the dials .*, got \(5\.0,\)"):
        replace(config, silent=(5.0,))
    with pytest.raises(ValueError, match="silent must be empty without a prior"):
        replace(config, heads=("step",), has_prior=False)


def made_rows(error: float, cost: float, spread: float, n: int = 64) -> torch.Tensor:
    """Errors that lie `spread` about their mean, in turn above and below."""
    signs = torch.tensor([1.0, -1.0]).repeat(n // 2)
    return torch.stack([error + spread * signs, torch.full((n,), cost), torch.full((n,), cost)], 1)


def test_heads_are_silenced_where_they_gain_nothing() -> None:
    prompts = [str(i) for i in range(64)]
    alone = {4.0: made_rows(4.0, 4.0, 0.0), 8.0: made_rows(2.0, 8.0, 0.0)}  # error 16 / cost

    def silent(rows: dict[float, torch.Tensor]) -> tuple[float, ...]:
        gains = measure_gains(alone, rows, prompts)
        return tuple(dial for dial, gain in gains.items() if not gain.is_sure)

    assert silent(alone) == (4.0, 8.0)
    assert silent({4.0: made_rows(3.9, 4.0, 0.1), 8.0: made_rows(2.1, 8.0, 0.1)}) == (8.0,)
    # Less error for more cost is no gain: at 5 the others have 3.2.
    assert silent({4.0: made_rows(3.4, 5.0, 0.1), 8.0: made_rows(3.1, 5.0, 0.1)}) == (4.0,)
    # The mean is below, but hangs on a few pairs.
    assert silent({4.0: made_rows(3.9, 4.0, 9.0), 8.0: made_rows(2.0, 8.0, 0.0)}) == (4.0, 8.0)
    # Dials that cost the same are compared as they are.
    same = {4.0: made_rows(4.0, 4.0, 0.0), 4.2: made_rows(4.0, 4.0, 0.0)}
    spoken = {4.0: made_rows(3.9, 4.0, 0.1), 4.2: made_rows(4.1, 4.0, 0.1)}
    gains = measure_gains(same, spoken, prompts)
    assert [gain.ratio for gain in gains.values()] == pytest.approx([3.9 / 4, 4.1 / 4])
    assert [gain.surely for gain in gains.values()] == [1, 0]
    dear = {4.0: made_rows(1.0, 5.0, 0.1), 4.2: made_rows(4.0, 4.0, 0.0)}
    assert [gain.surely for gain in measure_gains(same, dear, prompts).values()] == [0, 0]
    # Heads that change nothing are no better, however the curve is made of dials that hardly differ.
    close = {
        4.0: made_rows(4.0, 4.0, 0.1),
        4.1: made_rows(3.9, 4.001, 0.1),
        8.0: made_rows(2, 8, 0.1),
    }
    assert not any(gain.surely for gain in measure_gains(close, close, prompts).values())
    # Redraws of a few prompts are always the same.
    better = {4.0: made_rows(3.9, 4.0, 0.1), 8.0: made_rows(1.9, 8.0, 0.1)}
    assert all(gain.surely == 1 for gain in measure_gains(alone, better, prompts).values())
    few = measure_gains(alone, better, [str(i % 23) for i in range(64)])
    assert all(gain.surely == 0 for gain in few.values())


def test_one_lucky_dial_of_five_is_not_sure() -> None:
    """What gains nothing anywhere is used somewhere in a tenth of all cases, not in half of them."""
    source = torch.Generator().manual_seed(0)
    prompts, dials, used, alone_sure = [str(i) for i in range(96)], (4.0, 5.0, 6.0, 8.0, 12.0), 0, 0
    for _ in range(120):
        alone = {dial: made_rows(16 / dial, dial, 0.0, 96) for dial in dials}
        noise = torch.randn(5, 96, generator=source, dtype=torch.float64)
        spoken = {dial: rows.double().clone() for dial, rows in alone.items()}
        for rows, of_dial in zip(spoken.values(), noise, strict=True):
            rows[:, 0] += 0.1 * of_dial
        gains = measure_gains(alone, spoken, prompts).values()
        used += any(gain.is_sure for gain in gains)
        alone_sure += any(gain.surely >= 0.9 for gain in gains)
    assert used / 120 < 0.1 + 3 * (0.1 * 0.9 / 120) ** 0.5
    assert alone_sure / 120 > 0.3


def test_heads_that_fade_are_measured_where_they_do() -> None:
    config = HeadsConfig(family="sd3", channels=4, conditioning=8, dials=(4.0, 8.0, 16.0))
    assert config.bends() == ()
    config = replace(config, silent=(8.0,))
    assert config.bends() == pytest.approx((4 * 2**0.25, 4 * 2**0.5, 16 / 2**0.25, 16 / 2**0.5))
    assert [config.share(b) for b in config.bends()] == pytest.approx([1, 0, 1, 0], abs=1e-9)


@pytest.mark.slow
def test_a_calibration_is_of_the_heads_as_they_are_left(subject: Subject, ranks: Ranks) -> None:
    heads = small_world.make_trained(small_world.DIAL, subject)
    validation = validate(subject.calibration, ranks)
    rows = validation.rows(heads, 4.0)
    assert rows.shape == (4, 4)
    assert not rows[:, 3].any()  # nothing here plans for single images
    (low, middle, high), gains = validation.calibrate(heads, (4.0, 6.0), (5.0, 6.0))
    assert set(gains) == {"sampled"}
    assert heads.config.silent == (4.0, 6.0)  # four pairs are sure of nothing
    measured = validation.measure(heads, [4.0, 5.0, 6.0])
    assert [low, middle, high] == measured
    as_before, _ = validation.calibrate(heads, (4.0, 6.0), (), lambda dial: dial / 8)
    assert as_before == (low, high)


def make_allocation(subject: Subject, heads: tuple[str, ...] = ("allocation",)) -> Heads:
    """Heads whose plans differ between images at both dials."""
    made = make_heads(replace(small_world.DIAL, heads=heads, pairs=24), subject)
    head = made.allocation
    assert head is not None
    seen = read_conditioning(subject.training)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        head.mean.copy_(seen.mean(0))
        head.spread.copy_(seen.std(0).clamp(min=1e-6))
        torch.nn.init.normal_(head.hardness.weight, std=seen.shape[1] ** -0.5)
        head.strength.fill_(0.5)
        head.offset.fill_(0.05)
    return made


@pytest.mark.slow
def test_a_dial_whose_plans_were_levelled_is_the_family(subject: Subject, ranks: Ranks) -> None:
    heads = make_allocation(subject)
    validation = validate(subject.calibration, ranks)
    own = validation.rows(heads, 4.0)
    assert own[:, 3].all()
    assert len(own[:, 2].unique()) > 1
    head = heads.allocation
    assert head is not None
    other = validation.rows(heads, 6.0)
    head.level([4.0])
    levelled, family = validation.rows(heads, 4.0), validation._even_rows(4.0)
    assert torch.equal(levelled[:, 1:], family[:, 1:])
    assert levelled[:, 0].tolist() == pytest.approx(family[:, 0].tolist(), rel=1e-5)
    assert torch.equal(validation.rows(heads, 6.0), other)
    assert validation.rows(heads, 5.0)[:, 3].all()  # half as strong there
    policy = LearnedPolicy(heads, small_world.FAMILY, order=AUTO, dial=4.0)
    images, nfe, notes = call(subject, policy)
    assert set(nfe) == {4}
    assert any("allocation: all images get the same at 4 evaluations" in note for note in notes)
    plain = ScheduleFamily(replace(small_world.FAMILY, allocation=None), budget=4)
    assert torch.equal(images, call(subject, plain)[0])
    _, _, notes = call(subject, LearnedPolicy(heads, small_world.FAMILY, order=AUTO, dial=6.0))
    assert not any("allocation" in note for note in notes)
    _, gains = validation.calibrate(heads, (4.0, 6.0), ())
    assert head.is_level(5)  # four pairs are sure of nothing
    assert [gain.surely for gain in gains["allocation"].values()] == [0, 0]


def test_plans_are_levelled_where_they_gain_nothing(
    subject: Subject, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And heads are then held against what is left of the plans."""
    heads = make_allocation(subject, ("allocation", "step"))
    head = heads.allocation
    assert head is not None
    prompts = SimpleNamespace(prompts=[str(i) for i in range(64)])
    validation = replace(validate(subject.calibration, ranks), bank=prompts)

    def rows(_: Validation, heads: Heads, dial: float) -> torch.Tensor:
        error = 16 / dial  # the family's
        if not head.is_level(dial):
            error *= 0.5 if dial < 6 else 1.2
        error *= 1 - 0.1 * heads.config.share(dial)  # heads are better everywhere
        plans = torch.full((64, 1), float(not head.is_level(dial)))
        return torch.cat([made_rows(error, dial, 0.01), plans], 1)

    def even(_: Validation, dial: float) -> torch.Tensor:
        return torch.cat([made_rows(16 / dial, dial, 0.01), torch.zeros(64, 1)], 1)

    monkeypatch.setattr(Validation, "rows", rows)
    monkeypatch.setattr(Validation, "_even_rows", even)
    dials, gains = validation.calibrate(heads, (4.0, 6.0), (), lambda dial: dial / 8)
    assert [head.is_level(dial) for dial in (4, 5, 6, 8)] == [False, False, True, True]
    assert [gain.is_sure for gain in gains["allocation"].values()] == [True, False]
    assert [gain.ratio for gain in gains["allocation"].values()] == pytest.approx([0.5, 1.2])
    assert [gain.ratio for gain in gains["sampled"].values()] == pytest.approx([0.9, 0.9])
    assert heads.config.silent == ()
    # Plans that were taken exceed the usual ones; the same number for all does not.
    assert [dial.equivalent_steps for dial in dials] == pytest.approx([4 - 4 / 8, 6])
    assert [dial.evaluations for dial in dials] == pytest.approx([4 - 4 / 8, 6])
    assert [dial.error for dial in dials] == pytest.approx([8 / 4 * 0.9, 16 / 6 * 0.9])


@pytest.mark.slow
def test_a_calibration_stops_at_an_image_that_is_not_finite(
    subject: Subject, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = small_world.make_trained(small_world.DIAL, subject)
    validation = validate(subject.calibration, ranks)
    subject.calibration.converged()  # what the runs are held against is sound
    images = type(subject.calibration).images

    def with_nan(bank: Any, pairs: range) -> torch.Tensor:
        made = images(bank, pairs)
        made[-1, 0, 0, 0] = torch.nan
        return made

    monkeypatch.setattr(type(subject.calibration), "images", with_nan)
    with pytest.raises(ValueError, match=r"images at dial 4 must be finite, got .* for \d of 4"):
        validation.calibrate(heads, (4.0, 6.0), ())


def test_plans_of_the_calibration_are_held_against_all_plans(subject: Subject) -> None:
    none = _plan_excess(make_heads(small_world.DIAL, subject), subject, small_world.DIAL)
    assert none(6.0) == 0
    recipe = replace(small_world.DIAL, heads=("allocation",), pairs=24)
    heads = make_allocation(subject)
    excess = _plan_excess(heads, subject, recipe)
    assert subject.calibration is not None
    own, others = (read_conditioning(bank) for bank in (subject.calibration, subject.training))
    head = heads.by_name["allocation"]
    plans = [planned_steps(head, x, 6.0, 8).tolist() for x in (own, others)]
    usual = sum(map(sum, plans)) / sum(map(len, plans))
    assert excess(6.0) == pytest.approx(sum(plans[0]) / len(plans[0]) - usual)
    assert excess(6.0) != 0
    same = _plan_excess(heads, replace(subject, calibration=subject.training), recipe)
    assert same is not None
    assert same(6.0) == pytest.approx(0)


def test_a_calibration_pools_what_does_not_rise() -> None:
    dials = [
        Dial(dial=d, equivalent_steps=e, evaluations=e - 0.1, error=1 / d)
        for d, e in ((4, 4.0), (5, 6.0), (6, 5.0), (8, 8.0), (10, 8.0))
    ]
    pooled = rising(reversed(dials))
    assert [(p.dial, p.equivalent_steps) for p in pooled] == [(4, 4.0), (5.5, 5.5), (9, 8.0)]
    assert rising(dials[:1]) == (dials[0],)
    assert tuple(sorted(FURTHER_DIALS)) == FURTHER_DIALS


def test_the_note_says_for_which_model_it_was_made(subject: Subject, tmp_path) -> None:
    folder = save(subject, tmp_path)
    document = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        document.replace(model_id(subject.pipe.transformer), "SD3-another")
    )
    _, _, notes = call(subject, folder, speed=2.0)
    assert any("calibrated on SD3-another" in note for note in notes)

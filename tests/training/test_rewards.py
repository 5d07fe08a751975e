# SPDX-License-Identifier: Apache-2.0
"""Samples are checked once, rewards are made by name, and a sum is the sum of its terms."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rapid3rt.tiny import scenes as world
from rapid3rt.tiny.score import score
from training.rewards import (
    Reward,
    Samples,
    WeightedSum,
    known_rewards,
    make_reward,
    read_options,
)
from training.rewards.base import batches, pictures, score_members

NAN = math.nan
ROOT = Path(__file__).parents[2]


def grey(n: int = 3, **known: Any) -> Samples:
    images = torch.full((n, 3, 4, 4), 0.5)
    return Samples(images=images, prompts=["grey"] * n, **known)


class Constant:
    """A reward that gives what it was made with."""

    def __init__(self, name: str, values: Any) -> None:
        self.name, self.values = name, torch.as_tensor(values)

    def __call__(self, samples: Samples) -> torch.Tensor:
        return self.values


class TestSamples:
    def test_a_member_with_a_bad_pixel_is_marked_and_the_others_are_not(self) -> None:
        images = torch.rand(4, 3, 5, 6)
        images[1, 2, 4, 5], images[3, 0, 0, 0] = NAN, -math.inf
        samples = Samples(images=images, prompts=["a"] * 4)
        assert samples.finite.tolist() == [True, False, True, False]
        assert len(samples) == 4

    def test_an_empty_batch_is_a_batch(self) -> None:
        assert grey(0).finite.shape == (0,)

    @pytest.mark.parametrize("value", [1.2, -0.2])
    def test_out_of_range_is_an_error_that_says_by_how_much(self, value: float) -> None:
        images = torch.full((2, 3, 4, 4), 0.5)
        images[0, 0, 0, 0], images[1, 0, 0, 0] = NAN, value
        with pytest.raises(ValueError, match=rf"images must be in 0..1, got values of .*{value}"):
            Samples(images=images, prompts=["a", "b"])

    def test_the_rounding_of_a_decoder_is_in_range(self) -> None:
        Samples(images=torch.full((1, 3, 2, 2), 1.0005), prompts=["a"])

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "a float32 tensor, got torch.uint8"),
            (torch.zeros(1, 3, 4, 4, dtype=torch.float64), "a float32 tensor, got torch.float64"),
            ([[0.5]], "a float32 tensor, got list"),
            (torch.zeros(3, 4, 4), r"of shape \(n, 3, H, W\), got \(3, 4, 4\)"),
            (torch.zeros(1, 4, 4, 3), r"of shape \(n, 3, H, W\), got \(1, 4, 4, 3\)"),
            (torch.zeros(1, 3, 0, 4), r"of shape \(n, 3, H, W\), got \(1, 3, 0, 4\)"),
        ],
    )
    def test_what_is_no_batch_of_pictures_is_an_error(self, images: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"^images must be {message}$"):
            Samples(images=images, prompts=["a"])

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ("abc", "prompts must be a list of str, got 'abc'"),
            (["a", "b", None], "prompts must be a list of str, got "),
            (None, "prompts must be a list of str, got None"),
            (["a"], r"prompts must be as many as images \(3\), got 1"),
        ],
    )
    def test_prompts_are_one_text_per_image(self, prompts: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Samples(images=torch.zeros(3, 3, 4, 4), prompts=prompts)

    def test_scenes_are_one_per_image(self) -> None:
        with pytest.raises(ValueError, match=r"scenes must be as many as images \(3\), got 2"):
            grey(scenes=world.sample(2, 0))
        with pytest.raises(ValueError, match="scenes must be a list of Scene, got "):
            grey(scenes=["a", "b", "c"])

    @pytest.mark.parametrize("name", ["converged", "full"])
    def test_references_are_pictures_of_the_same_shape(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"{name} must be of the shape of images .* \(2, 3"):
            grey(**{name: torch.zeros(2, 3, 4, 4)})
        with pytest.raises(ValueError, match=rf"{name} must be in 0..1"):
            grey(**{name: torch.full((3, 3, 4, 4), 2.0)})


class TestScoreMembers:
    def test_only_usable_members_are_scored_and_others_are_nan(self) -> None:
        asked = []

        def score_(members: list[int]) -> torch.Tensor:
            asked.extend(members)
            return torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16, requires_grad=True)

        out = score_members(torch.tensor([False, True, False, True]), score_)
        assert asked == [1, 3]
        assert out.dtype == torch.float32
        assert not out.requires_grad
        assert out.nan_to_num(-1).tolist() == [-1, 1, -1, 2]

    def test_nothing_is_asked_where_no_member_is_usable(self) -> None:
        def never(_: list[int]) -> torch.Tensor:
            raise AssertionError

        assert score_members(torch.zeros(2, dtype=torch.bool), never).isnan().all()
        assert score_members(torch.zeros(0, dtype=torch.bool), never).shape == (0,)

    def test_an_infinite_score_is_no_score(self) -> None:
        values = torch.tensor([math.inf, -math.inf, NAN, 0.0])
        out = score_members(torch.ones(4, dtype=torch.bool), lambda m: values)
        assert out.isnan().tolist() == [True, True, True, False]

    def test_a_wrong_number_of_scores_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"scores must be one per image \(2\)"):
            score_members(torch.ones(2, dtype=torch.bool), lambda m: torch.zeros(1))

    def test_no_gradient_is_recorded(self) -> None:
        weight = torch.ones(1, requires_grad=True)
        seen = []
        score_members(
            torch.ones(1, dtype=torch.bool), lambda m: seen.append(2 * weight) or weight * 2
        )
        assert not seen[0].requires_grad


def test_batches_cover_every_member_once() -> None:
    assert batches([4, 5, 6, 7, 9], 2) == [[4, 5], [6, 7], [9]]
    assert batches([], 2) == []


def test_pictures_are_rounded_to_eight_bits() -> None:
    images = torch.zeros(1, 3, 1, 2)
    images[0, :, 0, 0] = torch.tensor([1.0004, 0.5, -0.0004])
    image = pictures(images)[0]
    assert (image.mode, image.size) == ("RGB", (2, 1))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 128, 0), (0, 0, 0)]


class TestRegistry:
    def test_an_unknown_name_lists_the_known_ones_nearest_first(self) -> None:
        with pytest.raises(
            ValueError, match=r"^reward must be one of pickscore, .*http.*got 'pikscore'$"
        ):
            make_reward("pikscore")

    def test_every_known_reward_has_a_line(self) -> None:
        assert {"scene", "mse", "features", "pickscore", "hpsv3", "http"} <= set(known_rewards())
        assert all(line and "\n" not in line for line in known_rewards().values())

    @pytest.mark.parametrize("name", known_rewards())
    def test_an_unknown_option_is_an_error_before_anything_is_loaded(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"option of reward '{name}' must be one of .*'tow'"):
            make_reward(name, tow="full")

    @pytest.mark.parametrize(("name", "option"), [("http", "url"), ("features", "encoder")])
    def test_a_missing_option_is_an_error(self, name: str, option: str) -> None:
        with pytest.raises(ValueError, match=f"option {option} of reward '{name}' must be given"):
            make_reward(name)

    def test_options_in_words_have_the_types_of_their_maker(self) -> None:
        words = [
            "http.url=http://h/a=b",
            "http.retries=3",
            "http.max_failures=9",
            "http.timeout_s=1.5",
        ]
        options = read_options(
            [*words, "scene.continuous=false", "psnr.to=full"], list(known_rewards())
        )
        assert options == {
            "http": {"url": "http://h/a=b", "retries": 3, "max_failures": 9, "timeout_s": 1.5},
            "scene": {"continuous": False},
            "psnr": {"to": "full"},
        }

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("url=x", r"must read REWARD\.OPTION=VALUE, got 'url=x'"),
            ("http.url", r"must read REWARD\.OPTION=VALUE"),
            ("ssim.to=full", "must be of http, scene, features, got"),
            ("http.port=3", "option of reward 'http' must be one of url, .*, got 'port'"),
            ("http.retries=few", "must hold a value of type int, got 'http.retries=few'"),
            ("scene.continuous=yes", "must hold a value of type bool"),
            ("features.encoder=x", "must be of options that a text can say"),
        ],
    )
    def test_a_word_that_says_no_option_is_an_error(self, word: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_options([word], ["http", "scene", "features"])

    def test_every_call_makes_another_object(self) -> None:
        assert make_reward("psnr") is not make_reward("psnr")
        assert make_reward("psnr") != make_reward("psnr")

    @pytest.mark.slow
    def test_the_registry_itself_loads_no_back_end(self) -> None:
        code = (
            "import sys, training.rewards as r; r.make_reward('mse'); "
            "print([m for m in sys.modules if m.startswith('training.rewards.')], 'imscore' in sys.modules)"
        )
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (
            out.stdout.strip() == "['training.rewards.base', 'training.rewards.fidelity'] False"
        ), out.stderr


class TestScene:
    @pytest.mark.parametrize("continuous", [False, True])
    def test_it_is_the_exact_score(self, continuous: bool) -> None:
        scenes = world.sample(4, seed=3)
        images = world.draw(scenes)
        images[1] = images[0]
        samples = Samples(images=images, prompts=[s.caption for s in scenes], scenes=scenes)
        got = make_reward("scene", continuous=continuous)(samples)
        assert got.dtype == torch.float32
        assert got.tolist() == score(images, scenes, continuous=continuous).tolist()
        assert got[1] < got[0]

    def test_a_broken_member_is_nan_and_keeps_its_place(self) -> None:
        scenes = world.sample(3, seed=3)
        images = world.draw(scenes)
        images[0, 0, 0, 0] = NAN
        samples = Samples(images=images, prompts=["a"] * 3, scenes=scenes)
        got = make_reward("scene")(samples)
        assert got.isnan().tolist() == [True, False, False]
        assert got[1:].tolist() == [1.0, 1.0]

    def test_it_needs_scenes(self) -> None:
        with pytest.raises(ValueError, match="scenes must be given for the reward 'scene'"):
            make_reward("scene")(grey())

    def test_the_forms_are_logged_apart(self) -> None:
        assert make_reward("scene", continuous=True).name == "scene_continuous"


class TestWeightedSum:
    def test_the_sum_by_hand(self) -> None:
        total = WeightedSum({Constant("a", [1.0, 2.0]): 0.5, Constant("b", [10.0, -4.0]): -1})
        assert total(grey(2)).tolist() == [-9.5, 5.0]
        assert {k: v.tolist() for k, v in total.terms(grey(2)).items()} == {
            "a": [1.0, 2.0],
            "b": [10.0, -4.0],
        }

    def test_what_has_no_value_in_a_term_has_no_sum(self) -> None:
        total = WeightedSum({Constant("a", [NAN, 2.0]): 1, Constant("b", [1.0, 1.0]): 1})
        assert total(grey(2)).isnan().tolist() == [True, False]

    def test_terms_may_be_names_and_sums(self) -> None:
        inner = WeightedSum({"mse": 2.0})
        samples = grey(2, converged=torch.zeros(2, 3, 4, 4))
        assert WeightedSum({inner: 1.0, "psnr": 1.0})(samples).tolist() == pytest.approx(
            [-2 + 10 * math.log10(4)] * 2
        )

    def test_terms_are_scored_once_and_combined_later(self) -> None:
        total = WeightedSum({Constant("a", [1.0, 2.0]): 3})
        assert total.combine({"a": torch.tensor([2.0, NAN])}).nan_to_num(0).tolist() == [6, 0]

    def test_two_terms_of_one_name_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="got 'psnr_to_converged' twice"):
            WeightedSum({make_reward("psnr"): 1, make_reward("psnr"): 1})

    @pytest.mark.parametrize("weight", [0, NAN, math.inf, "1e-3", None])
    def test_a_weight_is_a_number_that_counts(self, weight: Any) -> None:
        with pytest.raises(ValueError, match="weight of 'mse' must be finite and not 0, got"):
            WeightedSum({"mse": weight})

    def test_it_has_a_term_and_every_name_is_known(self) -> None:
        with pytest.raises(ValueError, match="terms must hold a reward at least"):
            WeightedSum({})
        with pytest.raises(ValueError, match="reward must be one of mse"):
            WeightedSum({"msee": 1.0})

    @pytest.mark.parametrize(
        "values", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(2, 1)]
    )
    def test_a_term_that_breaks_the_contract_is_named(self, values: torch.Tensor) -> None:
        term: Reward = Constant("mine", values)
        with pytest.raises(ValueError, match=r"reward 'mine' must give float32 \(2,\) on the CPU"):
            WeightedSum({term: 1.0})(grey(2))

    def test_an_empty_batch_has_empty_sums(self) -> None:
        assert WeightedSum({Constant("a", torch.zeros(0)): 1.0})(grey(0)).shape == (0,)

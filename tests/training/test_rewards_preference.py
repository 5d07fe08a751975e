# SPDX-License-Identifier: Apache-2.0
"""Scorers of imscore, which is not installed here: modules of its shape, with real weights in real folders."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin

from rapid3rt.errors import UnsupportedError
from training.rewards import Samples, make_reward

NAMES = {
    "imagereward": ("imscore.imreward.model", "ImageReward"),
    "hpsv2": ("imscore.hps.model", "HPSv2"),
    "hpsv3": ("imscore.hpsv3.model", "HPSv3"),
    "aesthetic": ("imscore.aesthetic.model", "LAIONAestheticScorer"),
}


class Scorer(torch.nn.Module, PyTorchModelHubMixin):
    """A scorer as imscore has them. This one: mean red times a weight, plus the length of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.dropout = torch.nn.Dropout(0.5)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert pixels.dtype == self.weight.dtype
        lengths = torch.tensor([len(p) for p in prompts])
        return self.dropout(self.weight * pixels[:, 0].mean((1, 2))) + lengths


class ColumnScorer(Scorer):
    """ImageReward gives [n, 1]."""

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return super().score(pixels, prompts)[:, None]


class TransformersScorer(torch.nn.Module):
    """HPSv3 is a model of transformers, with another `from_pretrained`."""

    missing: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))

    @classmethod
    def from_pretrained(cls, model: str, *, output_loading_info: bool) -> tuple[Any, Any]:
        assert output_loading_info
        assert model
        return cls(), {"missing_keys": list(cls.missing)}

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert len(prompts) == len(images)
        return torch.stack([self.weight * image[0].mean() for image in images])[:, None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(name: str, scorer_class: type) -> None:
        module, class_name = NAMES[name]
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        setattr(sys.modules[module], class_name, scorer_class)

    return put


@pytest.fixture
def weights(tmp_path: Path) -> str:
    scorer = Scorer()
    with torch.no_grad():
        scorer.weight.fill_(4.0)
    scorer.save_pretrained(tmp_path)
    return str(tmp_path)


def reds() -> Samples:
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0] = torch.tensor([0.0, 0.25, 0.5, 1.0])[:, None, None]
    return Samples(images=images, prompts=["", "a", "ab", "abc"])


class TestScores:
    @pytest.mark.parametrize("name", ["imagereward", "hpsv2", "aesthetic"])
    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("scorer_class", [Scorer, ColumnScorer])
    def test_the_scorer_scores(
        self, install: Any, weights: str, name: str, batch_size: int, scorer_class: type
    ) -> None:
        install(name, scorer_class)
        reward = make_reward(name, model=weights, batch_size=batch_size)
        assert reward.name == name
        got = reward(reds())
        assert got.dtype == torch.float32
        assert not got.requires_grad
        assert got.tolist() == [0.0, 2.0, 4.0, 7.0]

    def test_hpsv3_runs_in_float32(self, install: Any) -> None:
        install("hpsv3", TransformersScorer)
        got = make_reward("hpsv3", model="folder")(reds())
        assert got.tolist() == [0.0, 0.25, 0.5, 1.0]

    def test_a_member_without_a_value_is_nan(self, install: Any, weights: str) -> None:
        class Half(Scorer):
            def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
                scores = super().score(pixels, prompts)
                return torch.where(scores == 2.0, math.inf, scores)

        install("hpsv2", Half)
        samples = reds()
        samples.images[3, 0, 0, 0] = math.nan
        samples = Samples(images=samples.images, prompts=samples.prompts)
        got = make_reward("hpsv2", model=weights)(samples)
        assert got.isnan().tolist() == [False, True, False, True]

    def test_a_wrong_number_of_scores_is_an_error(self, install: Any, weights: str) -> None:
        class First(Scorer):
            def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
                return super().score(pixels, prompts)[:1]

        install("hpsv2", First)
        reward = make_reward("hpsv2", model=weights)
        with pytest.raises(ValueError, match=r"hpsv2 must give one score per image \(4\), got"):
            reward(reds())

    def test_two_rewards_share_no_weights(self, install: Any, weights: str) -> None:
        install("hpsv2", Scorer)
        first: Any = make_reward("hpsv2", model=weights)
        second: Any = make_reward("hpsv2", model=weights)
        first.scorer.weight.zero_()
        assert second(reds()).tolist() == [0.0, 2.0, 4.0, 7.0]


class TestLoading:
    @pytest.mark.parametrize("name", NAMES)
    def test_without_imscore_one_line_names_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "imscore", None)
        with pytest.raises(
            ImportError, match=rf"^reward '{name}' needs imscore .*: pip install 'rapid3rt\[rewa.*$"
        ):
            make_reward(name)

    def test_the_published_weights_are_the_default(self, install: Any) -> None:
        asked = []

        class Asked(Scorer):
            @classmethod
            def from_pretrained(cls, model: str, **options: Any) -> Scorer:
                asked.append((model, options))
                return cls()

        for name in ("imagereward", "hpsv2", "aesthetic"):
            install(name, Asked)
            make_reward(name)
        assert asked == [
            ("RE-N-Y/ImageReward", {"strict": True}),
            ("RE-N-Y/hpsv21", {"strict": True}),
            ("RE-N-Y/laion-aesthetic", {"strict": True}),
        ]

    def test_weights_that_are_missing_are_not_invented(self, install: Any, weights: str) -> None:
        class Larger(Scorer):
            def __init__(self) -> None:
                super().__init__()
                self.bias = torch.nn.Parameter(torch.zeros(1))

        install("hpsv2", Larger)
        with pytest.raises(UnsupportedError, match=r"reward 'hpsv2' does not run with imscore"):
            make_reward("hpsv2", model=weights)
        make_reward("hpsv2", model=weights, strict=False)

    def test_hpsv3_may_not_miss_weights_either(
        self, install: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        install("hpsv3", TransformersScorer)
        monkeypatch.setattr(TransformersScorer, "missing", ("rm_head.0.weight",))
        with pytest.raises(UnsupportedError, match=r"weights must hold rm_head.0.weight, got none"):
            make_reward("hpsv3")
        make_reward("hpsv3", strict=False)

    def test_what_another_version_lacks_shows_when_the_reward_is_made(
        self, install: Any, weights: str
    ) -> None:
        class Outdated(Scorer):
            def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
                raise AttributeError("no attribute 'visual'")

        install("hpsv3", Outdated)
        with pytest.raises(
            UnsupportedError, match=r"and transformers \d.*no attribute 'visual'; .*reward 'http'"
        ):
            make_reward("hpsv3", model=weights)

    def test_a_scorer_that_has_no_number_for_grey_is_refused(
        self, install: Any, weights: str
    ) -> None:
        class Nan(Scorer):
            def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
                return super().score(pixels, prompts) * math.nan

        install("aesthetic", Nan)
        with pytest.raises(UnsupportedError, match="score of a grey picture must be a number"):
            make_reward("aesthetic", model=weights)

    def test_a_wrong_batch_size_is_an_error_before_weights_are_loaded(self, install: Any) -> None:
        install("hpsv2", Scorer)
        with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
            make_reward("hpsv2", model="no/such", batch_size=0)

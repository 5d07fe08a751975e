# SPDX-License-Identifier: Apache-2.0
"""CLIP rewards on a real, tiny checkpoint: model, tokenizer and image processor of the classes of the large ones."""

from __future__ import annotations

import json
import math
import shutil
import string
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from training.rewards import Samples, WeightedSum, make_reward
from training.rewards.base import pictures

POSITIONS = 16
PROMPTS = ("a red circle", "blue", "cat on mat")
LONG = "abcdefghijklmnopqrstuvwxyz"


def build(folder: Path, seed: int = 0) -> Path:
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(vocab),
        "max_position_embeddings": POSITIONS,
        "bos_token_id": len(vocab) - 2,
        "eos_token_id": len(vocab) - 1,
        "pad_token_id": len(vocab) - 1,
    }
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    pixels = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )
    CLIPProcessor(
        image_processor=pixels, tokenizer=CLIPTokenizer(vocab=vocab, merges=[])
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("clip"))


def random_samples(n: int = 3, prompts: tuple[str, ...] = PROMPTS) -> Samples:
    generator = torch.Generator().manual_seed(1)
    return Samples(images=torch.rand(n, 3, 40, 48, generator=generator), prompts=prompts[:n])


def computed_directly(folder: Path, samples: Samples) -> Any:
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(
        text=list(samples.prompts),
        images=pictures(samples.images),
        padding=True,
        truncation=True,
        max_length=POSITIONS,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model.eval()(**inputs)


class TestScores:
    def test_pickscore_is_the_scaled_logit_of_the_model(self, folder: Path) -> None:
        samples = random_samples()
        reward = make_reward("pickscore", model=str(folder))
        expected = computed_directly(folder, samples).logits_per_image.diagonal()
        got = reward(samples)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)
        assert len(set(got.tolist())) == 3

    def test_clipscore_is_a_hundred_cosines(self, folder: Path) -> None:
        samples = random_samples()
        outputs = computed_directly(folder, samples)
        cosines = (outputs.image_embeds * outputs.text_embeds).sum(1)
        got = make_reward("clipscore", model=str(folder))(samples)
        torch.testing.assert_close(got, 100 * cosines, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_the_batch_size_does_not_matter(self, folder: Path, batch_size: int) -> None:
        samples = random_samples()
        whole = make_reward("pickscore", model=str(folder))(samples)
        split = make_reward("pickscore", model=str(folder), batch_size=batch_size)(samples)
        torch.testing.assert_close(split, whole)

    def test_prompts_belong_to_their_pictures(self, folder: Path) -> None:
        samples = random_samples()
        reward = make_reward("pickscore", model=str(folder))
        turned = Samples(images=samples.images.roll(1, 0), prompts=[PROMPTS[i] for i in (2, 0, 1)])
        torch.testing.assert_close(reward(turned).roll(-1), reward(samples))

    def test_a_broken_member_is_nan_and_leaves_the_others_alone(self, folder: Path) -> None:
        samples = random_samples()
        reward = make_reward("pickscore", model=str(folder))
        images = samples.images.clone()
        images[1, 0, 0, 0] = math.nan
        got = reward(Samples(images=images, prompts=PROMPTS))
        assert got.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(got[[0, 2]], reward(samples)[[0, 2]])

    def test_an_empty_batch_has_no_scores(self, folder: Path) -> None:
        assert make_reward("pickscore", model=str(folder))(random_samples(0)).shape == (0,)

    def test_a_narrow_type_keeps_the_scale(self, folder: Path) -> None:
        narrow: Any = make_reward("pickscore", model=str(folder), dtype="bfloat16")
        wide: Any = make_reward("pickscore", model=str(folder))
        assert narrow.model.dtype == torch.bfloat16
        assert narrow.factor == wide.factor
        assert narrow.factor != float(narrow.model.logit_scale.exp())
        torch.testing.assert_close(
            narrow(random_samples()), wide(random_samples()), atol=0.2, rtol=0
        )

    def test_nothing_is_trained(self, folder: Path) -> None:
        reward: Any = make_reward("pickscore", model=str(folder))
        assert not reward.model.training
        assert not any(p.requires_grad for p in reward.model.parameters())
        assert not reward(random_samples()).requires_grad

    def test_two_rewards_share_no_weights(self, folder: Path) -> None:
        first: Any = make_reward("pickscore", model=str(folder))
        second: Any = make_reward("pickscore", model=str(folder))
        before = second(random_samples())
        for parameter in first.model.parameters():
            parameter.zero_()
        assert torch.equal(second(random_samples()), before)

    def test_it_is_a_term_of_a_sum(self, folder: Path) -> None:
        reward = make_reward("pickscore", model=str(folder))
        samples = random_samples()
        assert torch.equal(WeightedSum({reward: 2.0})(samples), 2 * reward(samples))


class TestLongPrompts:
    def test_they_are_cut_with_one_warning_that_counts_them(self, folder: Path) -> None:
        reward: Any = make_reward("pickscore", model=str(folder))
        samples = random_samples(prompts=(LONG, "a", LONG[::-1]))
        with pytest.warns(RuntimeWarning, match="2 of 3 prompts have more than 16 tokens") as seen:
            got = reward(samples)
        assert [w.filename for w in seen] == [__file__]
        expected = computed_directly(folder, samples).logits_per_image.diagonal()
        torch.testing.assert_close(got, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reward(samples)
        assert reward.num_truncated == 4

    def test_a_prompt_that_just_fits_is_not_cut(self, folder: Path) -> None:
        fits = " ".join("abcdefghijklmn")  # 14 tokens between begin and end
        reward: Any = make_reward("pickscore", model=str(folder), long_prompts="error")
        reward(random_samples(prompts=(fits, "", "a")))
        with pytest.raises(ValueError, match="at most 16 tokens for the reward 'pickscore', got 1"):
            reward(random_samples(prompts=(f"{fits} o", "", "a")))
        assert reward.num_truncated == 0


class TestLoading:
    @pytest.mark.parametrize("options", [{}, {"model": "yuvalkirstain/PickScore_v1"}])
    def test_the_published_pickscore_has_the_processor_of_its_card(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, options: dict[str, str]
    ) -> None:
        asked = []

        def fetch(kind: Any, source: str, **options: Any) -> Any:
            asked.append(source)
            return load[kind](folder, **options)

        load = {kind: kind.from_pretrained for kind in (CLIPModel, CLIPProcessor)}
        for kind in load:
            monkeypatch.setattr(kind, "from_pretrained", classmethod(fetch))
        make_reward("pickscore", **options)
        assert asked == ["yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]

    @pytest.mark.parametrize("name", ["pickscore", "clipscore"])
    def test_a_model_that_is_not_there_is_an_error(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"^model must be a CLIPModel on the hub or in a fol"):
            make_reward(name, model=str(tmp_path))
        with pytest.raises(ValueError, match=r"^model must be a CLIPModel on the hub or in a fol"):
            make_reward(name, model=str(tmp_path / "none"))

    def test_a_processor_may_lie_elsewhere(self, folder: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folder / name, tmp_path)
        with pytest.raises(ValueError, match="processor must be a CLIPProcessor on the hub or in"):
            make_reward("pickscore", model=str(tmp_path))
        apart = make_reward("pickscore", model=str(tmp_path), processor=str(folder))
        together = make_reward("pickscore", model=str(folder))
        assert torch.equal(apart(random_samples()), together(random_samples()))

    def test_weights_that_are_missing_are_not_invented(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        config["vision_config"]["num_hidden_layers"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"model must be a whole CLIP model, got .* without "):
            make_reward("pickscore", model=str(tmp_path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
            ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
            ({"long_prompts": "cut"}, "long_prompts must be one of truncate, error, got 'cut'"),
        ],
    )
    def test_a_wrong_option_is_an_error(
        self, folder: Path, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            make_reward("pickscore", model=str(folder), **options)

# SPDX-License-Identifier: Apache-2.0
"""Fidelity by hand: MSE, PSNR, SSIM against its double loop, distance of features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from training.rewards import Samples, make_reward
from training.rewards.fidelity import ssim


def pair(image: torch.Tensor, reference: torch.Tensor, to: str = "converged") -> Samples:
    known: dict[str, Any] = {to: reference}
    return Samples(images=image, prompts=["a"] * len(image), **known)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def ssim_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Every window on its own, every variance as the mean of squared deviations."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a, b = (z[channel, top : top + 11, left : left + 11] for z in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (
                    (window * (a - mean_a) ** 2).sum(),
                    (window * (b - mean_b) ** 2).sum(),
                )
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + 0.0001)
                    * (2 * both + 0.0009)
                    / ((mean_a**2 + mean_b**2 + 0.0001) * (var_a + var_b + 0.0009))
                )
    return float(np.mean(values))


class TestPixels:
    def test_mse_counts_pixels_in_minus_one_to_one(self) -> None:
        image, reference = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.5)
        image[1] += 0.25
        assert make_reward("mse")(pair(image, reference)).tolist() == [0.0, -0.25]

    def test_psnr_by_hand(self) -> None:
        image, reference = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.5)
        image[0] += 0.1
        got = make_reward("psnr")(pair(image, reference)).tolist()
        assert got == pytest.approx([20.0, 120.0], abs=1e-4)

    def test_to_says_which_reference(self) -> None:
        image = torch.full((1, 3, 4, 4), 0.5)
        samples = Samples(
            images=image, prompts=["a"], converged=image, full=torch.zeros(1, 3, 4, 4)
        )
        assert make_reward("mse", to="converged")(samples).item() == 0
        assert make_reward("mse", to="full")(samples).item() == -1
        assert make_reward("mse", to="full").name == "mse_to_full"

    @pytest.mark.parametrize("name", ["mse", "psnr", "ssim"])
    def test_a_value_does_not_depend_on_the_batch(self, name: str) -> None:
        images, references = noise(5, 3, 33, 47), noise(5, 3, 33, 47, seed=1)
        reward = make_reward(name)
        together = reward(pair(images, references))
        apart = [reward(pair(images[i : i + 1], references[i : i + 1])) for i in range(5)]
        assert together.tolist() == torch.cat(apart).tolist()

    @pytest.mark.parametrize("name", ["mse", "psnr", "ssim"])
    def test_broken_pixels_cost_only_their_own_member(self, name: str) -> None:
        images, references = noise(4, 3, 12, 12), noise(4, 3, 12, 12, seed=1)
        clean = make_reward(name)(pair(images, references))
        images[0, 0, 0, 0] = math.nan
        references[2, 1, 3, 3], references[3, 0, 0, 0] = math.nan, math.inf
        got = make_reward(name)(pair(images, references))
        assert got.isnan().tolist() == [True, False, True, True]
        assert got[1] == clean[1]

    @pytest.mark.parametrize("name", ["mse", "psnr", "ssim"])
    def test_more_noise_is_worse(self, name: str) -> None:
        reference = noise(1, 3, 16, 16).expand(4, -1, -1, -1)
        size = torch.tensor([0.0, 0.05, 0.2, 0.5])[:, None, None, None]
        worse = reference.lerp(noise(4, 3, 16, 16, seed=1), size)
        got = make_reward(name)(pair(worse, reference)).tolist()
        assert got == sorted(got, reverse=True)
        assert len(set(got)) == 4


class TestSsim:
    def test_it_is_the_mean_over_all_windows(self) -> None:
        x, y = noise(3, 14, 13).double(), noise(3, 14, 13, seed=1).double()
        y = (x + 0.3 * y).clamp(0, 1)
        assert float(ssim(x, y)) == pytest.approx(ssim_by_loops(x.numpy(), y.numpy()), abs=1e-12)

    def test_two_flat_pictures_by_hand(self) -> None:
        got = make_reward("ssim")(
            pair(torch.full((1, 3, 11, 11), 0.25), torch.full((1, 3, 11, 11), 0.75))
        )
        assert got.item() == pytest.approx(
            (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), abs=1e-7
        )

    def test_equal_pictures_have_exactly_one(self) -> None:
        image = noise(2, 3, 20, 11)
        assert make_reward("ssim")(pair(image, image.clone())).tolist() == [1.0, 1.0]

    def test_a_picture_smaller_than_the_window_is_an_error(self) -> None:
        image = noise(1, 3, 10, 64)
        with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, got \(10, 64\)"):
            make_reward("ssim")(pair(image, image))


class TestFeatures:
    def test_the_distance_by_hand(self) -> None:
        def means(images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))[:, :2]

        image, reference = torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4)
        image[0, 0], reference[0, 1] = 1, 0.5  # a right angle
        image[1, 0], reference[1, 0] = 1, 0.25  # one direction
        image[2, 0], reference[2, :2] = 1, 0.5  # 45 degrees
        reference[3] = 1  # the image's feature is 0
        reward = make_reward("features", encoder=means, batch_size=2)
        got = reward(pair(image, reference)).tolist()
        assert got[:3] == pytest.approx([-1, 0, math.cos(math.pi / 4) - 1], abs=1e-7)
        assert math.isnan(got[3])

    def test_small_distances_do_not_cancel(self) -> None:
        def encoder(images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

        image = noise(1, 3, 8, 8)
        near = image.clone()
        near[0, 0, 0, 0] += 1e-4
        got = make_reward("features", encoder=encoder)(pair(near, image)).item()
        x, y = (z.double().flatten() for z in (near, image))
        assert got == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)) - 1, rel=1e-3)
        assert got < 0

    def test_broken_members_never_reach_the_encoder(self) -> None:
        seen = []

        def encoder(images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return images.mean((2, 3))

        images, references = noise(4, 3, 4, 4), noise(4, 3, 4, 4, seed=1)
        images[1, 0, 0, 0], references[2, 0, 0, 0] = math.nan, math.nan
        got = make_reward("features", encoder=encoder)(pair(images, references))
        assert got.isnan().tolist() == [False, True, True, False]
        assert all(bool(x.isfinite().all()) for x in seen)

    @pytest.mark.parametrize("shape", [(2,), (1, 4), (2, 4, 1)])
    def test_features_are_a_row_per_image(self, shape: tuple[int, ...]) -> None:
        reward = make_reward("features", encoder=lambda images: torch.ones(shape))
        with pytest.raises(ValueError, match=r"encoder must give features of shape \(2, d\)"):
            reward(pair(noise(2, 3, 4, 4), noise(2, 3, 4, 4)))

    def test_an_encoder_in_training_mode_is_refused(self) -> None:
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))
        with pytest.raises(ValueError, match="encoder must be in evaluation mode"):
            make_reward("features", encoder=encoder)
        make_reward("features", encoder=encoder.eval())


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim", "features"])
class TestReference:
    def options(self, name: str) -> dict[str, Any]:
        return {"encoder": lambda images: images.flatten(1)} if name == "features" else {}

    def test_it_must_be_known(self, name: str) -> None:
        samples = Samples(images=noise(1, 3, 12, 12), prompts=["a"])
        with pytest.raises(
            ValueError, match=f"full must be given for the reward '{name}_to_full', got None"
        ):
            make_reward(name, to="full", **self.options(name))(samples)

    def test_it_must_exist(self, name: str) -> None:
        with pytest.raises(ValueError, match="to must be one of converged, full, got 'half'"):
            make_reward(name, to="half", **self.options(name))

    def test_an_empty_batch_has_no_scores(self, name: str) -> None:
        empty = torch.zeros(0, 3, 12, 12)
        assert make_reward(name, **self.options(name))(pair(empty, empty)).shape == (0,)

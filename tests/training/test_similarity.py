# SPDX-License-Identifier: Apache-2.0
"""Per-image similarity by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.similarity import psnr, squared_error, ssim


def noise(seed: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_squared_error_and_psnr_by_hand() -> None:
    x = torch.zeros(2, 3, 16, 16)
    y = x.clone()
    y[1] += 0.2
    assert squared_error(x, y).tolist() == pytest.approx([0, 0.04])
    # Pixels span 2: 10 log10(4 / 0.04) = 20 dB. Equal images: 4 / 1e-12.
    assert psnr(x, y).tolist() == pytest.approx([10 * math.log10(4e12), 20])


def test_ssim_of_equal_images_is_one_and_of_flat_ones_is_luminance() -> None:
    x = noise(0)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    flat = torch.zeros(1, 3, 16, 16)
    c1 = 0.02**2
    want = (2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert ssim(flat + 0.5, flat + 0.25).item() == pytest.approx(want, rel=1e-6)


def test_ssim_by_the_definition_at_one_window() -> None:
    # An 11 x 11 image has a single window: the formula by weighted sums over it.
    x, y = noise(1)[:1, :1, :11, :11].double(), noise(2)[:1, :1, :11, :11].double()
    line = torch.exp(-0.5 * ((torch.arange(11.0, dtype=torch.float64) - 5) / 1.5) ** 2)
    weights = torch.outer(line, line) / line.sum() ** 2
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
    cov = (weights * (x - mx) * (y - my)).sum()
    c1, c2 = 0.02**2, 0.06**2
    want = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim(x, y).item() == pytest.approx(want.item())


def test_ssim_falls_with_noise_and_is_symmetric() -> None:
    x, rough = noise(0), noise(3)
    near, far = x + 0.05 * rough, x + 0.5 * rough
    assert (ssim(x, near) > ssim(x, far)).all()
    assert ssim(x, far).tolist() == pytest.approx(ssim(far, x).tolist())


def test_images_do_not_see_each_other() -> None:
    x, y = noise(0), noise(1)
    assert ssim(x, y)[1].item() == pytest.approx(ssim(x[1:], y[1:]).item())


@pytest.mark.parametrize("measure", [squared_error, psnr, ssim])
def test_one_image_against_many_is_an_error(measure: object) -> None:
    with pytest.raises(ValueError, match=r"one shape \(N, C, h, w\), got \(2, 3, 16, 16\) and \(1"):
        measure(noise(0), noise(0, 1))  # type: ignore[operator]


def test_images_below_the_window_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels on a side"):
        ssim(noise(0)[..., :8], noise(0)[..., :8])

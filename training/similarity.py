# SPDX-License-Identifier: Apache-2.0
"""How alike two images are: squared error, PSNR and SSIM, one number per image. Pixels in -1..1 everywhere.

Shape letters: N images, C colours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_RANGE = 2.0
_LEAST_ERROR = 1e-12
_WINDOW, _SIGMA = 11, 1.5
_STABILISERS = (0.01, 0.03)


def squared_error(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Mean over pixels and colours of the squared difference, float64 `[N]`. images, others: `[N, C, h, w]`.

    Raises `ValueError` for shapes that differ: broadcasting would compare one image with many.
    """
    _check(images, others)
    return (images.double() - others.double()).square().mean((1, 2, 3))


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, float64 `[N]`; 126 for equal images."""
    return 10 * torch.log10(_RANGE**2 / squared_error(images, others).clamp(min=_LEAST_ERROR))


def ssim(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), float64 `[N]`: 1 for equal images.

    Gaussian window of 11 pixels and sigma 1.5, K = 0.01 and 0.03, windows inside the image only, mean over colours.
    Raises `ValueError` for shapes that differ or images smaller than the window.
    """
    _check(images, others)
    if min(images.shape[2:]) < _WINDOW:
        got = tuple(images.shape)
        raise ValueError(f"images must have at least {_WINDOW} pixels on a side, got shape {got}")
    x, y = images.double(), others.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    c1, c2 = ((k * _RANGE) ** 2 for k in _STABILISERS)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * both + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian means over all windows that fit, along one axis and then the other."""
    at = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    weights = (-0.5 * (at / _SIGMA).square()).exp()
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, _WINDOW)
    across = F.conv2d(x, weights, groups=x.shape[1])
    return F.conv2d(across, weights.transpose(2, 3), groups=x.shape[1])


def _check(images: torch.Tensor, others: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape != others.shape:
        got = f"{tuple(images.shape)} and {tuple(others.shape)}"
        raise ValueError(f"images must be two batches of one shape (N, C, h, w), got {got}")

# SPDX-License-Identifier: Apache-2.0
"""How near a picture comes to what the generator would have made of the same noise.

The reference is the converged solution or the plain full run (METHOD.md, section 3). Pixel measures are computed image
by image in float64, so a value does not depend on the batch it was computed in, nor on a GPU's reduced-precision modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.rewards.base import Samples, batches, check_count, score_members

REFERENCES = ("converged", "full")
WINDOW, SIGMA = 11, 1.5
"""Pixels and standard deviation of the Gaussian window of SSIM."""
_C1, _C2 = 0.01**2, 0.03**2
_LEAST_ERROR = 4e-12

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Two float64 images `[3, H, W]` in 0..1 to one number, larger where they are more alike."""
Encoder = Callable[[torch.Tensor], torch.Tensor]
"""float32 images `[n, 3, H, W]` in 0..1 to features `[n, d]`."""


def mean_squared_error(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """m of METHOD.md, section 3: mean squared difference of pixels in -1..1. Takes images in 0..1, of one shape."""
    return 4 * (image - reference).square().mean()


def psnr(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio, 10 log10(4 / m) in dB; at most 120, so that equal images have a value."""
    return 10 * (4 / mean_squared_error(image, reference).clamp(min=_LEAST_ERROR)).log10()


def ssim(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity of two images `[3, H, W]` in 0..1, 1 where they are equal.

    With means mu, variances s^2 and covariance s_xy under a Gaussian window, (2 mu_x mu_y + C1) (2 s_xy + C2) /
    ((mu_x^2 + mu_y^2 + C1) (s_x^2 + s_y^2 + C2)), C1 = 0.01^2, C2 = 0.03^2 (Wang, Bovik, Sheikh and Simoncelli 2004,
    equation 13). Mean over channels and all places where the whole window lies in the image.

    Raises `ValueError` for an image smaller than the window.
    """
    size = tuple(image.shape[1:])
    if min(size) < WINDOW:
        raise ValueError(f"images must be of at least {WINDOW} x {WINDOW} pixels, got {size}")
    maps = torch.stack([image, reference, image**2, reference**2, image * reference])
    mu_x, mu_y, xx, yy, xy = _smooth(_smooth(maps, 2), 3)
    means = (2 * mu_x * mu_y + _C1) / (mu_x**2 + mu_y**2 + _C1)
    spreads = (2 * (xy - mu_x * mu_y) + _C2) / ((xx - mu_x**2) + (yy - mu_y**2) + _C2)
    similarity: torch.Tensor = (means * spreads).mean()
    return similarity


def _smooth(maps: torch.Tensor, axis: int) -> torch.Tensor:
    """Gaussian mean along an axis, where the whole window fits."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-0.5 * (offsets / SIGMA).square()).exp()
    size = maps.shape[axis] - WINDOW + 1
    total = torch.zeros_like(maps.narrow(axis, 0, size))
    for start, weight in enumerate((weights / weights.sum()).tolist()):
        total += weight * maps.narrow(axis, start, size)
    return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fidelity:
    """A measure of images against a reference, one of `REFERENCES`, as a reward. label: of the measure."""

    label: str
    measure: Measure
    to: str

    def __post_init__(self) -> None:
        _check_reference(self.to)

    @property
    def name(self) -> str:
        """Such as `mse_to_converged`."""
        return f"{self.label}_to_{self.to}"

    def __call__(self, samples: Samples) -> torch.Tensor:
        """NaN also where the reference is not finite. Raises `ValueError` where the samples have no such reference."""
        reference = _reference(samples, self.to, self.name)

        def measure(members: list[int]) -> torch.Tensor:
            pairs = ((samples.images[i].double(), reference[i].double()) for i in members)
            return torch.stack([self.measure(x, y.to(x.device)) for x, y in pairs])

        return score_members(samples.finite, measure)


class FeatureFidelity:
    """Minus the cosine distance of frozen features, 0 where they are equal, -2 at worst; NaN for a zero feature.

    encoder: takes float32 images `[n, 3, H, W]` in 0..1 on the samples' device, gives `[n, d]`; a module must be in
    evaluation mode, or its dropout would be noise within a group. to: one of `REFERENCES`. batch_size: of the encoder.
    """

    def __init__(self, *, encoder: Encoder, to: str = "converged", batch_size: int = 16) -> None:
        _check_reference(to)
        if getattr(encoder, "training", False):
            raise ValueError("encoder must be in evaluation mode, got one in training mode")
        self.encoder, self.to = encoder, to
        self.batch_size = check_count("batch_size", batch_size)

    @property
    def name(self) -> str:
        """Such as `features_to_converged`."""
        return f"features_to_{self.to}"

    def __call__(self, samples: Samples) -> torch.Tensor:
        """NaN also where the reference is not finite. Raises `ValueError` where the samples have no such reference."""
        reference = _reference(samples, self.to, self.name)

        def measure(members: list[int]) -> torch.Tensor:
            parts = batches(members, self.batch_size)
            return torch.cat([self._distance(samples.images[p], reference[p]) for p in parts])

        # What an encoder makes of NaN pixels need not be NaN.
        known = reference.isfinite().flatten(1).all(1).cpu()
        return -score_members(samples.finite & known, measure)

    def _distance(self, images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """1 - cos, as half the squared distance of the directions: near 0 the difference would cancel."""
        ours, theirs = (self._direction(x) for x in (images, reference.to(images.device)))
        return 0.5 * (ours - theirs).square().sum(1)

    def _direction(self, images: torch.Tensor) -> torch.Tensor:
        features = self.encoder(images)
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"encoder must give features of shape ({len(images)}, d), got {tuple(features.shape)}"
            )
        features = features.double()
        return torch.nn.functional.normalize(features, eps=0.0)


def make_mse(*, to: str = "converged") -> Fidelity:
    """Minus the mean squared error."""
    return Fidelity(label="mse", measure=lambda x, y: -mean_squared_error(x, y), to=to)


def make_psnr(*, to: str = "converged") -> Fidelity:
    """Peak signal-to-noise ratio in dB."""
    return Fidelity(label="psnr", measure=psnr, to=to)


def make_ssim(*, to: str = "converged") -> Fidelity:
    """Structural similarity."""
    return Fidelity(label="ssim", measure=ssim, to=to)


def _check_reference(to: str) -> None:
    if to not in REFERENCES:
        raise ValueError(f"to must be one of {', '.join(REFERENCES)}, got {to!r}")


def _reference(samples: Samples, to: str, name: str) -> torch.Tensor:
    reference: torch.Tensor | None = getattr(samples, to)
    if reference is None:
        raise ValueError(f"{to} must be given for the reward '{name}', got None")
    return reference

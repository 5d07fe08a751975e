# SPDX-License-Identifier: Apache-2.0
"""The error rule of all kernels, and poison for memory that must not be read."""

from __future__ import annotations

import torch

# Cosine distance that a result may have from the truth, by dtype.
_COSINE = {torch.float32: 1e-10, torch.bfloat16: 2e-5, torch.float16: 1e-6}


def assert_close(
    what: str, got: torch.Tensor, torch_result: torch.Tensor, truth: torch.Tensor
) -> None:
    """Hold a kernel to PyTorch: at most twice the error of the same-dtype result, plus a floor.

    The floor is the error of rounding the truth to the dtype and back around 0.3, twice. Infinities and NaN must stand
    where the truth has them, and the directions of both must agree.

    Parameters
    ----------
    what: op and case, for the message. got: the kernel's result. torch_result: PyTorch in the same dtype.
    truth: PyTorch in float64 (float32 for large cases). All of one shape.

    Raises
    ------
    AssertionError: names the first wrong indices and both values.
    """
    assert got.shape == truth.shape, (
        f"{what}: shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
    )
    if not got.numel():
        return
    wide = got.to(truth.dtype)
    finite = truth.isfinite()
    same = torch.where(finite, wide.isfinite(), (wide == truth) | (wide.isnan() & truth.isnan()))
    if not bool(same.all()):
        raise AssertionError(
            f"{what}: not finite in the wrong places: {_first(~same, wide, truth)}"
        )
    error = torch.where(finite, (wide - truth).abs(), 0.0)
    allowed = _largest(torch.where(finite, (torch_result.to(truth.dtype) - truth).abs(), 0.0))
    rounded = truth.to(got.dtype)
    floor = torch.where(finite, ((rounded + 0.3 - 0.3).to(truth.dtype) - truth).abs(), 0.0)
    bound = 2 * allowed + 2 * _largest(floor)
    if _largest(error) > bound:
        raise AssertionError(
            f"{what}: error above {bound:.3g}: {_first(error > bound, wide, truth)}"
        )
    a, b = wide[finite], truth[finite]
    norm = a.norm() * b.norm()
    distance = 1 - float((a * b).sum() / norm) if float(norm) > 0 else 0.0
    if distance > _COSINE.get(got.dtype, 1e-10):
        raise AssertionError(f"{what}: cosine distance {distance:.3g}")


def assert_same_bits(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Hold two tensors to the same bytes, NaN included.

    Raises
    ------
    AssertionError: names the first different indices and both values.
    """
    assert got.dtype is expected.dtype, f"{what}: {got.dtype} instead of {expected.dtype}"
    assert got.shape == expected.shape, (
        f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    )
    if not got.numel():
        return
    different = (_bytes(got) != _bytes(expected)).any(-1)
    if bool(different.any()):
        raise AssertionError(f"{what}: bits differ: {_first(different, got, expected)}")


def poison_(x: torch.Tensor, where: torch.Tensor | slice | int | None = None) -> torch.Tensor:
    """Fill a tensor, or a part of its first dimension, with NaN; integers with their largest value. Returns it."""
    value = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    x[slice(None) if where is None else where] = value
    return x


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


def _largest(x: torch.Tensor) -> float:
    return float(x.max())


def _first(wrong: torch.Tensor, got: torch.Tensor, expected: torch.Tensor) -> str:
    """The first few wrong places with both values."""
    places = [tuple(place) for place in wrong.nonzero()[:3].tolist()]
    shown = (
        f"{place} is {got[place].item()!r}, not {expected[place].item()!r}" for place in places
    )
    return f"{int(wrong.sum())} of {wrong.numel()} wrong: {'; '.join(shown)}"

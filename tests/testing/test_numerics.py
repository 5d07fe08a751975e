# SPDX-License-Identifier: Apache-2.0
"""The rules that judge kernels must themselves catch what they are for."""

from __future__ import annotations

import pytest
import torch

from rapid3rt.testing.cases import CASES
from rapid3rt.testing.numerics import assert_close, assert_same_bits, poison_
from rapid3rt.testing.timing import time_rivals


def test_the_error_of_pytorch_itself_is_accepted() -> None:
    truth = torch.randn(64, 64, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = truth.to(dtype)
        assert_close("rounding", rounded, rounded, truth)


def test_one_wrong_element_is_named() -> None:
    truth = torch.zeros(3, 4, dtype=torch.float64)
    got = truth.float()
    got[1, 2] = 0.5
    with pytest.raises(AssertionError, match=r"lookup: .*\(1, 2\) is 0.5, not 0.0"):
        assert_close("lookup", got, truth.float(), truth)


def test_one_wrong_tile_below_the_largest_error_is_caught() -> None:
    """A rival with one huge error must not excuse a tile that is wrong everywhere: the cosine tells."""
    truth = torch.randn(256, 64, dtype=torch.float64)
    rival = truth.float()
    rival[0, 0] += 10
    got = truth.float()
    got[64:96] = 0
    with pytest.raises(AssertionError, match="cosine distance"):
        assert_close("tile", got, rival, truth)


def test_infinities_and_nan_must_stand_where_they_belong() -> None:
    truth = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert_close("same", truth.float(), truth.float(), truth)
    for wrong in ([1.0, 0.0], [torch.nan, -torch.inf], [1.0, torch.inf]):
        with pytest.raises(AssertionError, match="not finite in the wrong places"):
            assert_close("moved", torch.tensor(wrong), truth.float(), truth)


def test_bits_tell_zeros_apart_and_nan_alike() -> None:
    nan = poison_(torch.empty(2))
    assert_same_bits("nan", nan, nan.clone())
    with pytest.raises(AssertionError, match=r"bits differ: 1 of 1 wrong"):
        assert_same_bits("zero", torch.tensor([0.0]), torch.tensor([-0.0]))


def test_poison_reaches_the_named_part_only() -> None:
    x = torch.zeros(3, 2, dtype=torch.int32)
    poison_(x, 1)
    assert x.tolist() == [[0, 0], [2**31 - 1] * 2, [0, 0]]


def test_a_case_makes_the_same_inputs_every_time() -> None:
    for case in CASES[::5]:
        first, second = case.arguments(torch.bfloat16), case.arguments(torch.bfloat16)
        for a, b in zip(first, second, strict=True):
            if isinstance(a, torch.Tensor):
                assert_same_bits(str(case), a, b)


def test_names_of_cases_are_unique() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)


def test_slower_rivals_take_longer() -> None:
    small, large = torch.randn(16, 16), torch.randn(512, 512)
    times = time_rivals(
        {"small": lambda: small @ small, "large": lambda: large @ large}, rounds=3, round_ms=2
    )
    assert times["small"].median_us < times["large"].median_us

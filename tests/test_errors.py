# SPDX-License-Identifier: Apache-2.0
"""The checks of numbers that policies, the runtime and the pipeline share."""

import math

import pytest

from rapid3rt.errors import check_count, check_number


def test_a_number_that_no_float_holds_is_refused():
    for value in (10**400, -(10**400), 10**5000, math.inf, -math.inf, math.nan, True, "2", None):
        with pytest.raises(ValueError, match=r"^speed must be at least 1, got "):
            check_number("speed", value, lambda s: s >= 1, "at least 1")


@pytest.mark.parametrize("value", [1, 2.5, 2**1023], ids=["1", "2.5", "2**1023"])
def test_a_number_comes_back_as_a_float(value):
    number = check_number("speed", value, lambda s: s >= 1, "at least 1")
    assert (type(number), number) == (float, value)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_what_counts_nothing_is_refused(value):
    with pytest.raises(
        ValueError, match=f"^steps must be an integer of at least 1, got {value!r}$"
    ):
        check_count("steps", value)


def test_a_count_comes_back():
    assert check_count("steps", 10**30) == 10**30

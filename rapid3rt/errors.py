# SPDX-License-Identifier: Apache-2.0
"""The three kinds of error that a caller can meet, and the checks of numbers that every room makes.

`ValueError` (built in): the caller's value is wrong. `UnsupportedError`: the request is valid, but nothing here can
serve it. `StateError`: calls came out of order. Messages read `<name> must <requirement>, got <value>`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from numbers import Integral, Real


class UnsupportedError(NotImplementedError):
    """A valid request that no backend, adapter or seam of this package can serve."""


class StateError(RuntimeError):
    """Calls out of order, or an object used after what it belongs to has ended."""


def check_number(
    name: str, value: float, accept: Callable[[float], bool], requirement: str
) -> float:
    """Return `value` as a float. Raises `ValueError` unless it is finite and `accept` takes it."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and isinstance(value, Integral) and abs(int(value)) > sys.float_info.max:
        msg = f"{name} must be {requirement}, got an integer beyond {sys.float_info.max:.1e}"
        raise ValueError(msg)
    if not number or not math.isfinite(value) or not accept(value):
        msg = f"{name} must be {requirement}, got {value!r}"
        raise ValueError(msg)
    return float(value)


def check_count(name: str, value: int) -> int:
    """Return `value` as an int. Raises `ValueError` unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        msg = f"{name} must be an integer of at least 1, got {value!r}"
        raise ValueError(msg)
    return int(value)

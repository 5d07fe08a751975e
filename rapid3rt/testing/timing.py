# SPDX-License-Identifier: Apache-2.0
"""Time rivals against each other in one process: interleaved rounds, so that a noisy machine troubles all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time of one call over all rounds. median_us: median; spread: (largest - smallest) / median."""

    median_us: float
    spread: float


def time_rivals(
    rivals: dict[str, Callable[[], object]],
    *,
    rounds: int = 7,
    round_ms: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each callable; the calls of a round are as many as fit into `round_ms`, at least one.

    Parameters
    ----------
    rivals: name to callable without arguments. rounds: interleaved rounds, after one that only warms up.
    round_ms: length of one callable's part of a round, in milliseconds.
    clock: seconds; `time.thread_time` for one thread on a machine that others keep busy.
    """
    calls = {name: _calls_per_round(call, round_ms, clock) for name, call in rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            samples[name].append(_time_calls(call, calls[name], clock) / calls[name] * 1e6)
    return {
        name: Timing(
            median_us=statistics.median(s), spread=(max(s) - min(s)) / statistics.median(s)
        )
        for name, s in samples.items()
    }


def _calls_per_round(
    call: Callable[[], object], round_ms: float, clock: Callable[[], float]
) -> int:
    call()
    once = min(_time_calls(call, 1, clock) for _ in range(3))
    return max(1, int(round_ms / 1e3 / max(once, 1e-7)))


def _time_calls(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Seconds for some calls, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = clock()
    for _ in range(count):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begin

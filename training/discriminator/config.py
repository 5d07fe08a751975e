# SPDX-License-Identifier: Apache-2.0
"""What decides how a discriminator learns and pays; sources of the defaults: METHOD.md, section 4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscriminatorConfig:
    """Everything but the features and the seed. Raises ValueError naming the field that makes no sense.

    learning_rate, betas: of Adam. label_smoothing: s of the targets 1 - s / 2 and s / 2. r1_weight: half of it
    multiplies the squared gradient on full pictures, in units of the features' spread. skip_above: accuracy on a batch
    from above which nothing is learned from it. hidden: width of the head. capacity: pairs in the buffer. batch: pairs
    per step. steps: per update. first_steps: in the first update, so that no reward comes from a head that knows
    nothing yet. momentum: of the running mean and standard deviation. clip: of rewards, either way.
    nfe_bins: upper edges of the bins of evaluations that diagnostics tell apart and batches draw from alike; what is
    above the last is in the last.
    patience: updates that alarms average over. saturated_at: AUC, or share of clipped rewards.
    blind_below: greater of AUC and share of pairs in the right order, in the bin of fewest evaluations.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.99)
    label_smoothing: float = 0.1
    r1_weight: float = 0.1
    skip_above: float = 0.9
    hidden: int = 128
    capacity: int = 4096
    batch: int = 64
    steps: int = 4
    first_steps: int = 400
    momentum: float = 0.9
    clip: float = 3.0
    nfe_bins: tuple[int, ...] = (3, 4, 5, 6, 8, 10, 14, 28)
    patience: int = 20
    saturated_at: float = 0.99
    blind_below: float = 0.52

    def __post_init__(self) -> None:
        for name in ("hidden", "capacity", "batch", "steps", "first_steps", "patience"):
            value = getattr(self, name)
            self._check(name, "be a whole number from 1 on", type(value) is int and value >= 1)
        for name in ("learning_rate", "clip"):
            self._check(name, "be above 0 and finite", 0 < getattr(self, name) < math.inf)
        for name in ("label_smoothing", "momentum"):
            self._check(name, "be in 0..1, 1 excluded", 0 <= getattr(self, name) < 1)
        for name in ("skip_above", "saturated_at", "blind_below"):
            self._check(name, "be in 0..1", 0 <= getattr(self, name) <= 1)
        self._check("r1_weight", "be at least 0 and finite", 0 <= self.r1_weight < math.inf)
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._check("betas", "be two numbers in 0..1, 1 excluded", two)
        rising = bool(self.nfe_bins) and all(a < b for a, b in pairwise((0, *self.nfe_bins)))
        self._check("nfe_bins", "be whole numbers that rise, from 1 on", rising)

    def _check(self, name: str, requirement: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name} must {requirement}, got {getattr(self, name)}")

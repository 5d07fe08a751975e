# SPDX-License-Identifier: Apache-2.0
"""Alarms: a discriminator that is never wrong teaches nothing within a group, one that sees nothing teaches noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch

MESSAGES = {
    "": "",
    "saturated": (
        "the discriminator is saturated: it tells nearly every accelerated picture from a full one, so its reward says "
        "little within a group; raise r1_weight, or lower learning_rate or steps"
    ),
    "clipped": (
        "the discriminator is saturated: nearly every reward is clipped, so the members of a group are paid alike; "
        "its logits run ahead of their running mean, so lower momentum, learning_rate or steps"
    ),
    "blind": (
        "the discriminator is blind: it cannot tell even pictures of the fewest evaluations from full ones; unless "
        "they really look the same its reward is noise, so set omega to 0 or use features that see the difference"
    ),
}


class Alarms:
    """Averages over about `patience` updates; silent until there were as many.

    saturated_at: AUC, or share of clipped rewards, that is too high. Accuracy is not asked to be near 1: learning stops
    above `skip_above`, so it stays thereabouts, however plain the difference.
    blind_below: the greater of AUC and share of pairs in order, in the bin of fewest evaluations, that is too low.
    """

    def __init__(self, patience: int, saturated_at: float, blind_below: float) -> None:
        self._patience, self._saturated_at, self._blind_below = patience, saturated_at, blind_below
        self._trend = torch.zeros(3, dtype=torch.float64)
        self._count = 0

    def note(self, *, area: float, clipped: float, lowest: float) -> None:
        """Take in one update. area: AUC. clipped: share of rewards. lowest: what `blind_below` is held against."""
        new = torch.tensor([area, clipped, lowest], dtype=torch.float64)
        self._count += 1
        # A plain mean at first, so that no starting value weighs in.
        self._trend += (new - self._trend) / min(self._count, self._patience)

    @property
    def kind(self) -> str:
        """A key of MESSAGES; empty where all is well."""
        area, clipped, lowest = self._trend.tolist()
        if self._count < self._patience:
            return ""
        if area >= self._saturated_at:
            return "saturated"
        if clipped >= self._saturated_at:
            return "clipped"
        return "blind" if lowest <= self._blind_below else ""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Averages and the number of updates behind them."""
        return {"trend": self._trend.clone(), "count": torch.tensor(self._count)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._trend, self._count = state["trend"].clone(), int(state["count"])

# SPDX-License-Identifier: Apache-2.0
"""From logits to rewards: centred, divided by a running spread, clipped (METHOD.md, section 3).

Not a probability: a saturated one pays every member of a group the same, and the group is dead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_LEAST_STD = 1e-3


class RewardScale:
    """d = clip((logit - mean) / std, -clip, clip). Mean and std stay as they are until `move`.

    momentum: what is kept of them at a move; the first takes all from what it is given.
    """

    def __init__(self, momentum: float, clip: float) -> None:
        self._momentum, self._clip = momentum, clip
        self.mean, self.std = 0.0, 1.0
        self.is_set = False

    def pay(self, logits: torch.Tensor) -> torch.Tensor:
        """Rewards of logits: float32 `[B]`."""
        centred = (logits - self.mean) / max(self.std, _LEAST_STD)
        return centred.clamp(-self._clip, self._clip)

    def clipped(self, logits: torch.Tensor) -> float:
        """Share of logits whose reward is at a limit; 0 before the first move."""
        return float((self.pay(logits).abs() >= self._clip).double().mean()) if self.is_set else 0.0

    def move(self, logits: torch.Tensor) -> None:
        """Towards the mean and the standard deviation of logits of accelerated pictures, at least one."""
        keep = self._momentum if self.is_set else 0.0
        self.mean = keep * self.mean + (1 - keep) * float(logits.mean())
        self.std = keep * self.std + (1 - keep) * float(logits.std(correction=0))
        self.is_set = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Mean, standard deviation, and whether they were ever moved."""
        values = torch.tensor([self.mean, self.std], dtype=torch.float64)
        return {"values": values, "is_set": torch.tensor(self.is_set)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.mean, self.std = state["values"].tolist()
        self.is_set = bool(state["is_set"])

# SPDX-License-Identifier: Apache-2.0
"""Decisions per image become rows to run. `plan` is the only function of the package that reads the device in a tick.

One copy of a few integers per image comes to the host; everything after it is host arithmetic and index tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rapid3rt.errors import UnsupportedError
from rapid3rt.planning import sparsity
from rapid3rt.types import COMPUTE, FORECAST_1, FORECAST_2, REUSE, ComputeDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Rows of one transformer call (row = branch x images + image), on the host and as device indices.

    compute: rows that run the blocks, dense ones first, then by level; levels: their sparsity level.
    reuse: rows that take the cached residual. Rows in neither list are done. rows: int32 `[len(compute) +
    len(reuse)]`, both lists one after the other. forced: rows that compute only because their branch has no residual.
    """

    compute: tuple[int, ...]
    levels: tuple[int, ...]
    reuse: tuple[int, ...]
    forced: tuple[int, ...]
    total: int
    rows: torch.Tensor

    @property
    def num_dense(self) -> int:
        """How many of the compute rows are dense; they come first."""
        return sum(level == 0 for level in self.levels)

    @property
    def is_dense(self) -> bool:
        """All rows compute, densely, in their own order: the plain model."""
        return self.num_dense == self.total


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every image does in this tick, on the host. action: -1 where done. level: sparsity level."""

    action: tuple[int, ...]
    level: tuple[int, ...]
    device: torch.device

    @property
    def finished(self) -> bool:
        """Every image is done."""
        return all(a < 0 for a in self.action)

    @property
    def active(self) -> list[int]:
        """Images that are not done."""
        return [i for i, a in enumerate(self.action) if a >= 0]

    def rows(self, branches: tuple[str, ...], holds: Callable[[str, int], bool]) -> RowPlan:
        """Spread the images' decisions over the guidance branches of one call.

        `holds(branch, image)` says whether a residual exists; a row without one computes although its image reuses.
        """
        num_images = len(self.action)
        compute: list[tuple[int, int]] = []
        reuse, forced = [], []
        for b, branch in enumerate(branches):
            for image, action in enumerate(self.action):
                row = b * num_images + image
                if action == COMPUTE:
                    compute.append((self.level[image], row))
                elif action >= 0 and holds(branch, image):
                    reuse.append(row)
                elif action >= 0:
                    compute.append((0, row))
                    forced.append(row)
        compute.sort()
        order = [row for _, row in compute] + reuse
        return RowPlan(
            compute=tuple(row for _, row in compute),
            levels=tuple(level for level, _ in compute),
            reuse=tuple(reuse),
            forced=tuple(forced),
            total=num_images * len(branches),
            rows=torch.tensor(order, dtype=torch.int32, device=self.device),
        )


BAD_SIGMA, BAD_ORDER, BAD_POINT, BAD_WEIGHTS = 1, 2, 3, 4
_BAD = {
    BAD_SIGMA: ("next_sigma", "a number, got nan"),
    BAD_ORDER: ("order", "0 (auto), 1 (Euler), 2 (Adams-Bashforth) or 3 (fitted), got another"),
    BAD_WEIGHTS: ("weights", "finite numbers where order is 3 (fitted), got none or others"),
    BAD_POINT: (
        "next_sigma",
        "the next of the run's own grid (where the scheduler steps: at order 1), got another",
    ),
}


def plan(
    decision: ComputeDecision, done: torch.Tensor, bad: torch.Tensor, policy_name: str
) -> Plan:
    """Read the decisions once and check them.

    Parameters
    ----------
    decision: as the policy gave it, budget and forced computes applied.
    done: bool `[B]`. bad: int32 `[B]`, BAD_... where the last step decision was that.
    policy_name: for the error messages.

    Raises
    ------
    ValueError: an action, level or order outside its range, or a NaN step.
    UnsupportedError: a forecast action, which no policy of this version may take.
    """
    # 64 bits: a wide integer must not wrap around into a valid answer.
    packed = torch.stack(
        [decision.action.long(), decision.sparsity.long(), done.long(), bad.long()]
    )
    action, level, is_done, is_bad = packed.cpu().tolist()
    raise_if_bad(is_bad, policy_name)
    for image, (a, s, d) in enumerate(zip(action, level, is_done, strict=True)):
        if d:
            continue
        where = f"of policy {policy_name!r} for image {image}"
        if a in (FORECAST_1, FORECAST_2):
            raise UnsupportedError(
                f"action {where} is a forecast, which this version cannot run; answer COMPUTE or REUSE"
            )
        if a not in (COMPUTE, REUSE):
            raise ValueError(f"action {where} must be 0 (compute) or 1 (reuse), got {a}")
        if not 0 <= s < sparsity.num_levels():
            raise ValueError(f"sparsity {where} must be 0 to {sparsity.num_levels() - 1}, got {s}")
    return Plan(
        action=tuple(-1 if d else a for a, d in zip(action, is_done, strict=True)),
        level=tuple(
            0 if d or a != COMPUTE else s for a, s, d in zip(action, level, is_done, strict=True)
        ),
        device=done.device,
    )


def raise_if_bad(flags: list[int], policy_name: str) -> None:
    """Turn the device's flags into an error that names the policy and the images."""
    for flag, (name, requirement) in _BAD.items():
        images = [i for i, f in enumerate(flags) if f == flag]
        if images:
            listed = ", ".join(map(str, images))
            raise ValueError(
                f"{name} of policy {policy_name!r} must be {requirement} for image {listed}"
            )

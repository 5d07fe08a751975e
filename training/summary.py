# SPDX-License-Identifier: Apache-2.0
"""What an iteration did, over all ranks: means of rewards, errors and costs, and who got how much.

Shape letters: P groups of this rank, G members.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from training.ranks import Ranks
from training.rollout import Rollout


def summary(
    rollout: Rollout,
    rewards: torch.Tensor,
    terms: Mapping[str, torch.Tensor],
    dead: torch.Tensor,
    ranks: Ranks,
) -> dict[str, float]:
    """Means over members that have a number, the share of dead groups, and how many members have no reward.

    rewards, terms: `[P, G]`. dead: bool `[P]`.
    """
    columns = {
        "reward/total": rewards,
        **{f"reward/{name}": term for name, term in terms.items()},
        "rollout/m": rollout.error,
        "cost/E": rollout.steps,
        "cost/nfe": rollout.nfe,
    }
    sums = {"dead": float(dead.sum()), "groups": float(len(dead))}
    sums["missing"] = float((~rewards.isfinite()).sum())
    for name, values in columns.items():
        finite = values.isfinite()
        sums[f"{name} sum"] = float(values[finite].sum())
        sums[f"{name} count"] = float(finite.sum())
    totals = ranks.sum(sums)
    means = {
        name: totals[f"{name} sum"] / totals[f"{name} count"]
        for name in columns
        if totals[f"{name} count"]
    }
    return means | {
        "policy/dead_groups": totals["dead"] / totals["groups"],
        "policy/missing_members": totals["missing"],
    }


def difficulties(
    rollout: Rollout, hardness: torch.Tensor | None, ranks: Ranks
) -> list[tuple[float, float, float]]:
    """Hardness of the pair, mean NFE and dial of every group. hardness: of all pairs; None: nothing is known of it."""
    if hardness is None:
        return []
    rows = [
        (float(hardness[group.pair]), float(nfe.mean()), float(group.dial or 0))
        for group, nfe in zip(rollout.groups, rollout.nfe, strict=True)
    ]
    table = ranks.gather(torch.tensor(rows, dtype=torch.float64).view(len(rows), 3))
    return [(row[0], row[1], row[2]) for row in table.tolist()]

# SPDX-License-Identifier: Apache-2.0
"""Where over sigma heads act: what they have added to the untrained policy, by bins of sigma."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rapid3rt.policies.learned import SCALARS, Heads, typical_action
from training.config import Recipe
from training.ranks import Ranks
from training.trajectory import Decisions

_EDGES = (0.1, 0.2, 0.4, 0.6, 0.8)
_CENTRES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)
_LOG_SIGMA = SCALARS.index("log sigma")


def shifts(
    heads: Heads, decisions: Mapping[str, Decisions], recipe: Recipe, ranks: Ranks
) -> dict[str, float]:
    """`heads/HEAD_shift@SIGMA`: means over the decisions of all ranks, of bins that have some.

    Of `step` the log of the ratio's mode over the untrained one; of a choice the mean index now minus then, so of
    `cache` how much more probable reuse is.
    """
    sums = {
        f"{name} {centre} {what}": 0.0
        for name in heads.config.sampled
        for centre in _CENTRES
        for what in ("sum", "count")
    }
    for name, own in decisions.items():
        for part in own.slices(recipe.micro_batch, recipe.members):
            moved, sigma = _moved(heads, part)
            place = torch.bucketize(sigma, torch.tensor(_EDGES), right=True)
            for i, centre in enumerate(_CENTRES):
                sums[f"{name} {centre} sum"] += float(moved[place == i].sum())
                sums[f"{name} {centre} count"] += float((place == i).sum())
    sums = ranks.sum(sums)
    return {
        f"heads/{name}_shift@{centre}": sums[f"{name} {centre} sum"] / count
        for name in heads.config.sampled
        for centre in _CENTRES
        if (count := sums[f"{name} {centre} count"])
    }


@torch.no_grad()
def _moved(heads: Heads, part: Decisions) -> tuple[torch.Tensor, torch.Tensor]:
    """What was added, and sigma, of every decision: `[N]` each, on the CPU."""
    decision = part.on(heads)
    now, then = (
        typical_action(part.head, logits)
        for logits in (heads.logits(decision), heads.untrained_logits(decision))
    )
    moved = (now / then).log() if part.head == "step" else now - then
    return moved.cpu(), part.scalars[:, _LOG_SIGMA].exp()

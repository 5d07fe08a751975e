# SPDX-License-Identifier: Apache-2.0
"""What an action costs in plain steps where nobody measured it: FLOPs of the block stack (METHOD.md, section 1)."""

from __future__ import annotations

from dataclasses import replace

from rapid3rt.planning import sparsity
from rapid3rt.types import ActionCosts


def with_estimates(
    costs: ActionCosts, image_attention_share: float, image_blocks: int
) -> ActionCosts:
    """The costs, with an estimate for every sparsity level that has no measurement.

    Parameters
    ----------
    costs: `measured` holds for all the levels it lists, and stays as it is.
    image_attention_share: of a dense step's FLOPs, those of image queries over image keys, 0 to 1: the part that a
        level cuts to the key blocks it keeps. image_blocks: key blocks of image tokens.
    """
    dense = costs.levels[0]
    levels = list(costs.levels)
    for level in range(len(levels), sparsity.num_levels()):
        density = sparsity.kept_blocks(level, image_blocks) / image_blocks
        levels.append(dense * (1 - image_attention_share * (1 - density)))
    return replace(costs, levels=tuple(levels))

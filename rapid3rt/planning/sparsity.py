# SPDX-License-Identifier: Apache-2.0
"""The table of sparsity levels: what a level means in kept key blocks.

Level 0 is dense. Level j keeps, for every query block of image tokens, `ceil(density_j x image blocks)` image key
blocks; text is always kept. Published evidence (reference of the project) puts harmless densities for images at 0.6
to 0.75; lower levels exist for policies that learn when they are harmless.
"""

from __future__ import annotations

import math

DENSITIES = (1.0, 0.75, 0.5, 0.25)
SMALL_IMAGE_TOKENS = 1024


def block_size(image_tokens: int, device_type: str) -> int:
    """Tokens per attention block, both ways: 64 on a CPU, 128 on a GPU; half of it for small images.

    The same for every backend, so that a trace of one can be replayed on another.
    """
    large = 64 if device_type == "cpu" else 128
    return large // 2 if image_tokens <= SMALL_IMAGE_TOKENS else large


def num_levels() -> int:
    """Levels including dense."""
    return len(DENSITIES)


def density(level: int) -> float:
    """Density of image key blocks at a level. Raises ValueError outside the table."""
    if not 0 <= level < len(DENSITIES):
        raise ValueError(f"sparsity level must be 0 to {len(DENSITIES) - 1}, got {level}")
    return DENSITIES[level]


def kept_blocks(level: int, image_blocks: int) -> int:
    """Image key blocks that one image query block attends to at a level; at least one."""
    return max(1, math.ceil(density(level) * image_blocks))

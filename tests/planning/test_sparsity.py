# SPDX-License-Identifier: Apache-2.0
"""Blocks of a size that the device's kernels have, and enough of them."""

from __future__ import annotations

import pytest

from rapid3rt.planning import sparsity


@pytest.mark.parametrize(
    ("tokens", "device", "block"),
    [
        (256, "cpu", 32),
        (1024, "cpu", 32),
        (1025, "cpu", 64),
        (4096, "cpu", 64),
        (256, "cuda", 64),
        (1024, "cuda", 64),
        (1025, "cuda", 128),
        (16384, "cuda", 128),
    ],
)
def test_block_size(tokens: int, device: str, block: int) -> None:
    assert sparsity.block_size(tokens, device) == block

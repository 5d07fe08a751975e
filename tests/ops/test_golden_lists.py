# SPDX-License-Identifier: Apache-2.0
"""The blocks that are chosen for fixed inputs are a decision: they may change only on purpose (make golden)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rapid3rt import ops
from rapid3rt.testing.cases import cases_of


def test_golden_block_lists(golden: Callable[[str, Any], None]) -> None:
    chosen = {}
    for case in cases_of("build_block_lists"):
        if case.bench:
            continue
        mode, count, index, order = ops.build_block_lists(*case.arguments(torch.float32))
        chosen[str(case)] = {
            "mode": mode.tolist(),
            "count": count.tolist(),
            "index": index.tolist(),
            "order": order.tolist(),
        }
    golden("block_lists", chosen)

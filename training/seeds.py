# SPDX-License-Identifier: Apache-2.0
"""Seeds are counters (METHOD.md, section 5): a hash of what the number is for, never of when or where it is drawn.

So no result depends on the number of ranks, the order of work, or how often a run was resumed.
"""

from __future__ import annotations

import hashlib


def seed_of(*key: int | str) -> int:
    """A seed of 0 to 2^63 - 1 from (run seed, counters, purpose)."""
    text = "/".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

# SPDX-License-Identifier: Apache-2.0
"""The probes that other caches fail."""

from __future__ import annotations

import pytest
from probes import PROBES, Probe

CELLS = [
    pytest.param(probe, kind, id=f"{probe.name} [{kind}]".replace(" ", "_"))
    for probe in PROBES
    for kind in probe.kinds
]


@pytest.mark.slow
@pytest.mark.parametrize(("probe", "kind"), CELLS)
def test_what_other_caches_get_wrong_is_right(probe: Probe, kind: str) -> None:
    probe.ask(kind)

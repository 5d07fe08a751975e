# SPDX-License-Identifier: Apache-2.0
"""Search the best fixed schedule of exactly K evaluations: `python -m training.search MODEL --budget K --out FILE`.

It starts from the searched family's grid at K (of a calibrated policy, the bundled one, or a short search here),
proposes what dynamic programming finds on a measured table of local errors, and climbs from there on the measured error
itself. The result is the rival that learning must beat, and a prior to start from (METHOD.md, sections 2 and 6 c).
"""

from training.search.run import Settings, search

__all__ = ["Settings", "search"]

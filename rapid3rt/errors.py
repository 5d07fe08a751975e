# SPDX-License-Identifier: Apache-2.0
"""The three kinds of error that a caller can meet.

`ValueError` (built in): the caller's value is wrong. `UnsupportedError`: the request is valid, but nothing here can
serve it. `StateError`: calls came out of order. Messages read `<name> must <requirement>, got <value>`.
"""


class UnsupportedError(NotImplementedError):
    """A valid request that no backend, adapter or seam of this package can serve."""


class StateError(RuntimeError):
    """Calls out of order, or an object used after what it belongs to has ended."""

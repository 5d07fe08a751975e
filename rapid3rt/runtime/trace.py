# SPDX-License-Identifier: Apache-2.0
"""The trace, as the runtime names it; it lives a floor below, because `replay` reads it too."""

from rapid3rt.planning.trace import Trace, TraceTick

__all__ = ["Trace", "TraceTick"]

# SPDX-License-Identifier: Apache-2.0
"""Who is calling: the frame of a pipeline's `__call__`.

Callbacks, windows and strength are locals of that call and live nowhere else; and a twin that is called from anywhere
else than its own pipeline must refuse.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline


def pipeline_call(pipe: Any) -> FrameType | None:
    """The running `__call__` of this pipeline, None where the innermost pipeline call is not its own.

    A pipeline that runs inside a callback of this one is another.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(caller, DiffusionPipeline):
            return frame if caller is pipe else None
        frame = frame.f_back
    return None

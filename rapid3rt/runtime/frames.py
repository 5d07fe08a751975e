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
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from rapid3rt.errors import StateError


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


def own_call(pipe: Any) -> FrameType:
    """The running `__call__` of this pipeline. StateError: another pipeline is calling."""
    frame = pipeline_call(pipe)
    if frame is None:
        raise StateError(
            "set_timesteps of an accelerated pipeline's scheduler must be called by that pipeline; another pipeline "
            "that was built from it must be built before rapid3rt.accelerate, or after rapid3rt.restore"
        )
    return frame


def counts_in_ticks(frame: FrameType) -> bool:
    """Whether something goes by the loop's iterations: skip-layer or adaptive guidance, a window, a cutoff callback."""
    arguments = frame.f_locals
    callback = arguments.get("callback_on_step_end")
    starts, ends = (arguments.get(f"control_guidance_{side}") for side in ("start", "end"))
    return (
        bool(arguments.get("skip_guidance_layers"))
        or bool(arguments.get("pag_adaptive_scale"))
        or isinstance(callback, PipelineCallback | MultiPipelineCallbacks)
        or any(start > 0 for start in _as_list(starts))
        or any(end < 1 for end in _as_list(ends))
    )


def is_watched(frame: FrameType) -> bool:
    """Whether a callback that is a plain function, which may count steps or not, is told every tick."""
    callback = frame.f_locals.get("callback_on_step_end")
    return callback is not None and not isinstance(
        callback, PipelineCallback | MultiPipelineCallbacks
    )


def _as_list(value: Any) -> list[Any]:
    """One number for all nets, or one for each; none where the pipeline has no such argument."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]

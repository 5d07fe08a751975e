# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for a pipeline's transformer, scheduler and ControlNet that share one session.

A twin is an instance of a dynamic subclass made per `accelerate`, with the name and module of the real class, so that
`isinstance`, saving and the pipeline's own bookkeeping see what they saw before. Nothing of diffusers is patched.
"""

from rapid3rt.runtime.twins.controlnet import make_controlnet_twin
from rapid3rt.runtime.twins.scheduler import make_scheduler_twin
from rapid3rt.runtime.twins.transformer import make_transformer_twin

__all__ = ["make_controlnet_twin", "make_scheduler_twin", "make_transformer_twin"]

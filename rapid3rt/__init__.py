# SPDX-License-Identifier: Apache-2.0
"""rapid3rt: Diffusion Transformers several times faster, with a decision per image and no change to their weights.

import rapid3rt
rapid3rt.accelerate(pipe, speed=2.5)
images = pipe(prompts, num_inference_steps=28).images
print(rapid3rt.report(pipe))
rapid3rt.restore(pipe)
"""

from rapid3rt.calibrate import calibrate
from rapid3rt.errors import StateError, UnsupportedError
from rapid3rt.pipeline import accelerate, report, restore
from rapid3rt.planning.trace import package_version
from rapid3rt.runtime.report import Report
from rapid3rt.runtime.trace import Trace
from rapid3rt.support import check
from rapid3rt.tiny import load_tiny

__version__ = package_version()

__all__ = [
    "Report",
    "StateError",
    "Trace",
    "UnsupportedError",
    "accelerate",
    "calibrate",
    "check",
    "load_tiny",
    "report",
    "restore",
]

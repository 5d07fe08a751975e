# SPDX-License-Identifier: Apache-2.0
"""One adapter per transformer family. A new family is one file, one test and one line in `ADAPTERS`."""

from rapid3rt.adapters.base import Adapter
from rapid3rt.adapters.flux import FluxAdapter
from rapid3rt.adapters.flux2 import Flux2Adapter
from rapid3rt.adapters.qwen import QwenAdapter
from rapid3rt.adapters.sd3 import SD3Adapter

ADAPTERS: tuple[Adapter, ...] = (
    SD3Adapter(),
    FluxAdapter(),
    QwenAdapter(),
    Flux2Adapter(),
)

__all__ = ["ADAPTERS", "Adapter", "Flux2Adapter", "FluxAdapter", "QwenAdapter", "SD3Adapter"]

# SPDX-License-Identifier: Apache-2.0
"""What families with packed latents share: tokens `[R, I, C]`, noise first, and guidance as a call of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from rapid3rt.adapters.attention import NOT_STOCK
from rapid3rt.errors import UnsupportedError


class PackedAdapter(ABC):
    """Base of the adapters of FLUX.1, FLUX.2 and Qwen-Image."""

    attention_kwargs: str

    def branches(
        self, pipe: Any, call: int, kwargs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Call 0: cond; call 1: uncond, the separate call of true CFG, where the pipeline says that it does that."""
        calls = ("cond", "uncond") if _is_guided(pipe, arguments) else ("cond",)
        if call >= len(calls):
            raise UnsupportedError(
                f"the transformer must be called for {', then '.join(calls)} in each tick and by the pipeline alone, "
                "got one more call; where a callback calls it, or the guidance of this pipeline is of its own, use "
                "rapid3rt.restore(pipe)"
            )
        return (calls[call],)

    def extra_guidance(self, pipe: Any, arguments: Mapping[str, Any]) -> float | None:
        """True CFG, which has a scale of its own but on FLUX.2."""
        scale = arguments.get("true_cfg_scale") if _is_guided(pipe, arguments) else None
        return None if scale is None else float(scale)

    def mu(self, arguments: Mapping[str, Any], mu: float | None, steps: int) -> float | None:
        """The pipelines shift by the size of the image alone."""
        return mu

    def is_few_step(self, pipe: Any) -> bool:
        """FLUX.2 Klein's pipelines carry a flag."""
        return bool(pipe.config.get("is_distilled"))

    def patch(self, transformer: Any) -> int:
        """All of them pack 2 x 2."""
        return 2

    def observe(
        self, transformer: Any, kwargs: Mapping[str, Any], images: int, resolution: tuple[int, int]
    ) -> torch.Tensor:
        """Noise channels of the noise tokens, as a grid."""
        hidden: torch.Tensor = kwargs["hidden_states"]
        channels = transformer.config.patch_size**2 * transformer.out_channels
        return self.as_grid(hidden[-images:, :, :channels], resolution)

    def as_grid(self, velocity: torch.Tensor, resolution: tuple[int, int]) -> torch.Tensor:
        """`[B, I, C]` to `[B, C, rows, columns]`, the noise tokens."""
        rows, columns = resolution
        noise: torch.Tensor = velocity[:, : rows * columns]
        grid: torch.Tensor = noise.unflatten(1, (rows, columns))
        return grid.permute(0, 3, 1, 2)

    def model_time(self, kwargs: Mapping[str, Any], timestep: torch.Tensor) -> torch.Tensor:
        """The pipelines cast the scheduler's timestep to the latents' dtype, then divide."""
        dtype: torch.dtype = kwargs["timestep"].dtype
        return timestep.to(dtype) / 1000

    @abstractmethod
    def stock_attention(self, transformer: Any) -> list[Any]:
        """As `Adapter` has it: every family looks for its own processors."""

    def dense_only(self, transformer: Any, kwargs: Mapping[str, Any]) -> str | None:
        """Our processors take no mask, and stand in for the stock ones alone: fused projections, IP-adapter and PAG
        bring others.
        """
        entries = kwargs.get(self.attention_kwargs)
        if entries is not None and entries.get("attention_mask") is not None:
            return "an attention mask goes to every layer"
        return None if self.stock_attention(transformer) else NOT_STOCK


def _is_guided(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether this call of the pipeline does true CFG: a local of most pipelines, a property of FLUX.2 Klein's."""
    flag = arguments.get("do_true_cfg", getattr(pipe, "do_classifier_free_guidance", False))
    return bool(flag)

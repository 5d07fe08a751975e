# SPDX-License-Identifier: Apache-2.0
"""What the runtime must know of a transformer family. One file per family implements `Adapter`.

Shape letters: B images, R rows (image x guidance branch), A active rows, I image tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rapid3rt.errors import UnsupportedError

IMAGE_PROMPTS = "ip_adapter_image_embeds"
Widths = tuple[tuple[str, str], ...]  # names of arguments, each with an option of the configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Rows after the model's own embedders. image: `[A, I, D]`. temb: `[A, D]`."""

    image: torch.Tensor
    temb: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """How attention of one call is sparse: the first `num_dense` rows are dense, then one level per row."""

    num_dense: int
    levels: tuple[int, ...]
    block: int
    backend: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetLayout:
    """How the pipelines of a family call a ControlNet.

    classes: what `pipe.controlnet` may be, Multi classes included. outputs: the transformer's arguments that take what
    it returns, in its order. rows: its arguments that hold one entry per row. per_net: those of them of which a Multi
    takes one per net. is_bare: whether it returns its only output as it is, and not a tuple of outputs.
    """

    classes: tuple[type, ...]
    outputs: tuple[str, ...]
    rows: tuple[str, ...]
    per_net: tuple[str, ...]
    is_bare: bool = False


NO_CONTROLNET = ControlNetLayout(classes=(), outputs=(), rows=(), per_net=())


class Adapter(Protocol):
    """One transformer family: where its tensors live, and its loop over blocks.

    family: its name. attention_kwargs: the transformer's argument that carries the LoRA scale. controlnet: its nets.
    widths: its arguments that come from the prompt, one row each, with the option that says how wide they are.
    """

    family: str
    attention_kwargs: str
    widths: Widths
    controlnet: ControlNetLayout

    def supports(self, transformer: Any) -> bool:
        """Whether this adapter serves the class of a transformer. UnsupportedError: a variant that it cannot serve."""

    def branches(
        self, pipe: Any, call: int, kwargs: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Guidance branches of the call-th transformer call of a tick. arguments: the locals of the pipeline's call.

        UnsupportedError: an unknown layout, or a call that the pipeline does not make.
        """

    def extra_guidance(self, pipe: Any, arguments: Mapping[str, Any]) -> float | None:
        """Scale of what guides this call besides `pipe.guidance_scale`; None where nothing does.

        arguments: the locals of the pipeline's call.
        """

    def mu(self, arguments: Mapping[str, Any], mu: float | None, steps: int) -> float | None:
        """What the pipeline would pass as `mu` for another number of steps. arguments: the locals of its call."""

    def is_few_step(self, pipe: Any) -> bool:
        """Whether the pipeline says that its model was distilled to a few steps, so that none can be spared."""

    def patch(self, transformer: Any) -> int:
        """Latent pixels along one side of an image token."""

    def resolution(self, transformer: Any, kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Noise tokens as (rows, columns). Asked once a run; may read the device."""

    def observe(
        self, transformer: Any, kwargs: Mapping[str, Any], images: int, resolution: tuple[int, int]
    ) -> torch.Tensor:
        """The noise latents of the batch, without references and conditions: `[B, C, h, w]`, a view."""

    def as_grid(self, velocity: torch.Tensor, resolution: tuple[int, int]) -> torch.Tensor:
        """What the pipeline steps with, as policies see it: `[B, C, h, w]`, a view."""

    def image_attention_share(self, transformer: Any, kwargs: Mapping[str, Any]) -> float:
        """FLOPs of image queries over image keys, as a share of the block stack's, 0 to 1."""

    def model_time(self, kwargs: Mapping[str, Any], timestep: torch.Tensor) -> torch.Tensor:
        """Times `[R]` as the pipeline passes them to its models. timestep: float32 `[R]` in the scheduler's units."""

    def embed(
        self,
        transformer: Any,
        kwargs: Mapping[str, Any],
        timestep: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> Embedded:
        """Embed some rows (None: all). timestep: float32 `[A]` in the scheduler's units."""

    def run_blocks(
        self, transformer: Any, kwargs: Mapping[str, Any], embedded: Embedded, rows: torch.Tensor | None,
        timestep: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The block stack on rows that `embedded` holds: `[A, I, D]`.

        The arguments of `controlnet.outputs` are tensors of these rows, in their order, or None.
        """

    def finish(
        self, transformer: Any, kwargs: Mapping[str, Any], hidden: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        """Final norm and projection, as the pipeline expects it: `[A, C, h, w]` or `[A, I, C]`."""

    def stock_attention(self, transformer: Any) -> list[Any]:
        """Attention modules that sparse levels act on: those with the stock processor and separate projections."""

    def dense_only(self, transformer: Any, kwargs: Mapping[str, Any]) -> str | None:
        """Why sparse levels must run dense on this transformer in a call with these arguments, empty where no call is
        meant; None where they need not.
        """

    def sparse_attention(
        self, transformer: Any, kwargs: Mapping[str, Any], rows: SparseRows
    ) -> AbstractContextManager[None]:
        """Exchange the stock attention processors while the context is open; others stay dense."""


def is_model(transformer: Any, model: type, forward: Callable[..., Any]) -> bool:
    """Whether a transformer is of a class of diffusers. forward: what that class had when it was imported here.

    UnsupportedError: it is, but with another forward, of a subclass or patched in; ours would go past it.
    """
    if not isinstance(transformer, model):
        return False
    got: Any = type(transformer).forward  # type: ignore[attr-defined]
    if got is not forward or got.__module__ != model.__module__:
        raise UnsupportedError(
            f"the transformer's forward must be {model.__name__}'s own, whose blocks are run one by one here, "
            f"got {got.__module__}.{got.__qualname__}"
        )
    return True


def take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Some rows of a tensor; None: the tensor itself."""
    return x if rows is None else x.index_select(0, rows)


def take_entries(
    entries: Mapping[str, Any] | None, rows: torch.Tensor | None, total: int
) -> dict[str, Any] | None:
    """`take` for every tensor that holds one entry for each of `total` rows, such as an attention mask.

    Image prompts are left to `take_nested`: they may be lists.
    """
    if entries is None:
        return None
    own = {
        name: take(x, rows)
        for name, x in entries.items()
        if isinstance(x, torch.Tensor) and x.shape[:1] == (total,) and name != IMAGE_PROMPTS
    }
    return {**entries, **own}


def take_nested(x: Any, rows: torch.Tensor | None, total: int) -> Any:
    """`take` for every tensor of nested lists and tuples; one of m * total entries holds m for each row."""
    if isinstance(x, torch.Tensor):
        return x if rows is None else take(x.unflatten(0, (total, -1)), rows).flatten(0, 1)
    return type(x)(take_nested(item, rows, total) for item in x)

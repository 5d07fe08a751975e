# SPDX-License-Identifier: Apache-2.0
"""A ControlNet call that the pipeline has made and that waits for the plan.

The pipeline carries handles to the transformer where the tensors would be. Each row is computed at most once per call,
at its own image's time: a second transformer call of the tick shares what the first one asked for. Nothing here reads
the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rapid3rt.adapters.base import ControlNetLayout, take
from rapid3rt.errors import StateError, UnsupportedError

Samples = (
    Sequence[torch.Tensor] | None
)  # one `[rows, I, D]` per block of a kind; None: nothing for that kind


@dataclass(frozen=True, slots=True)
class Deferred:
    """Stands for the `which`-th part of what a call will return."""

    call: DeferredCall
    which: int

    def __len__(self) -> int:
        """Asked by a transformer that is no twin, which counts the blocks."""
        raise StateError(
            "the ControlNet of an accelerated pipeline must be followed by that pipeline's own transformer; "
            "where a component was exchanged: restore, then accelerate again"
        )


class DeferredCall:
    """One call.

    Parameters
    ----------
    net: the real ControlNet. arguments: of the call, by name. layout: which of them have rows.
    """

    def __init__(self, net: Any, arguments: dict[str, Any], layout: ControlNetLayout) -> None:
        self._net, self._arguments, self._layout = net, arguments, layout
        self._rows: list[int] = []  # whose samples are there, in their order
        self._samples: tuple[Samples, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows that the pipeline called it with."""
        return len(self._arguments["hidden_states"])

    def handles(self) -> Deferred | tuple[Deferred, ...]:
        """What the pipeline gets instead of tensors, in the shape that it unpacks."""
        handles = tuple(Deferred(self, i) for i in range(len(self._layout.outputs)))
        return handles[0] if self._layout.is_bare else handles

    def samples(self, rows: list[int], time: torch.Tensor) -> tuple[Samples, ...]:
        """Samples of some rows, in this order; runs the net for those that it has not run for.

        time: `[num_rows]`, of every row, as the pipeline would pass it.
        """
        missing = [row for row in dict.fromkeys(rows) if row not in self._rows]
        if missing:
            self._samples = _join(self._samples, self._run(missing, time))
            self._rows += missing
        if rows == self._rows:
            return self._samples
        places = torch.tensor([self._rows.index(row) for row in rows], device=time.device)
        return tuple(None if s is None else [take(x, places) for x in s] for s in self._samples)

    def _run(self, rows: list[int], time: torch.Tensor) -> tuple[Samples, ...]:
        # All rows in their own order: untouched, the plain call.
        whole = rows == list(range(self.num_rows))
        index = None if whole else torch.tensor(rows, device=time.device)
        arguments = {**self._arguments, "timestep": take(time, index)}
        for name in self._layout.rows:
            if name in arguments:
                arguments[name] = self._gather(name, arguments[name], index)
        samples = self._net(**arguments)
        return (samples,) if self._layout.is_bare else samples

    def _gather(self, name: str, value: Any, index: torch.Tensor | None) -> Any:
        """Some rows of one argument. What has one row is meant for all of them."""
        # A Multi takes one entry per net; the image-to-image pipelines stack its modes to a tensor.
        if name in self._layout.per_net and hasattr(self._net, "nets"):
            return [self._take(name, entry, index) for entry in value]
        return self._take(name, value, index)

    def _take(self, name: str, value: torch.Tensor | None, index: torch.Tensor | None) -> Any:
        if value is None or len(value) == 1:
            return value
        if len(value) != self.num_rows:
            raise ValueError(
                f"{name} of the ControlNet must have {self.num_rows} rows like its hidden_states, got {len(value)}"
            )
        return take(value, index)


def _join(first: tuple[Samples, ...], second: tuple[Samples, ...]) -> tuple[Samples, ...]:
    """Rows of two runs of a net, one after the other."""
    if not first:
        return second
    return tuple(
        None if a is None or b is None else [torch.cat(pair) for pair in zip(a, b, strict=True)]
        for a, b in zip(first, second, strict=True)
    )


def deferred_call(kwargs: Mapping[str, Any], names: tuple[str, ...]) -> DeferredCall | None:
    """The ControlNet call that a transformer's arguments wait for; None where there is none.

    Raises
    ------
    UnsupportedError: somebody else's tensors. They belong to the pipeline's timestep, not to each image's own.
    """
    call = None
    for name in names:
        value = kwargs.get(name)
        if value is None:
            continue
        if not isinstance(value, Deferred):
            raise UnsupportedError(
                f"{name} must be what the accelerated pipeline's own ControlNet returned, got {type(value).__name__}; "
                "where pipe.controlnet was exchanged: restore, then accelerate again"
            )
        call = value.call
    return call

# SPDX-License-Identifier: Apache-2.0
"""The ControlNet's twin: shares the real module's `__dict__` and computes nothing when it is called.

Pipelines call it before the transformer, for all rows at their own timestep. Which rows compute, and at which sigma
each of them stands, is known only after the plan, so the call is kept and made then, through the real module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from rapid3rt.errors import UnsupportedError
from rapid3rt.runtime.twins.base import twin_class


class DeferringSession(Protocol):
    """What the twin needs of a session."""

    def defer(self, net: Any, arguments: dict[str, Any]) -> Any:
        """Keep one call; returns what the pipeline unpacks and hands to the transformer."""

    def guard(self) -> AbstractContextManager[None]:
        """Around a call: one that fails ends the run."""


def make_controlnet_twin(real: torch.nn.Module, session: DeferringSession) -> torch.nn.Module:
    """A twin of a diffusers ControlNet, single or Multi. The real one stays usable by others."""
    twin: Any = object.__new__(
        twin_class(type(real), session, {"__call__": _call_with(session, real)})
    )
    object.__setattr__(twin, "__dict__", real.__dict__)
    return twin  # type: ignore[no-any-return]


def _call_with(session: DeferringSession, real: torch.nn.Module) -> Callable[..., Any]:
    signature = inspect.signature(type(real).forward)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with session.guard():
            arguments = dict(signature.bind(self, *args, **kwargs).arguments)
            del arguments["self"]
            if arguments.get("return_dict", True):
                raise UnsupportedError(
                    "return_dict of an accelerated pipeline's ControlNet must be False"
                )
            return session.defer(real, arguments)

    return call

# SPDX-License-Identifier: Apache-2.0
"""The dynamic subclass behind every twin."""

from __future__ import annotations

from typing import Any

_MARK = "_rapid3rt_session"


def twin_class(real: type, session: Any, overrides: dict[str, Any]) -> type:
    """A subclass of `real` under its own name that carries the session and some methods."""
    body = {
        "__module__": real.__module__,
        "__qualname__": real.__qualname__,
        "__doc__": real.__doc__,
    }
    return type(
        real.__name__, (real,), {**body, _MARK: session, "_rapid3rt_real": real, **overrides}
    )


def session_of(component: Any) -> Any | None:
    """The session a component is a twin for, None for a real one."""
    return getattr(type(component), _MARK, None)


def real_class(component: Any) -> type:
    """The class that a twin stands for; the component's own class where it is no twin."""
    return getattr(type(component), "_rapid3rt_real", type(component))

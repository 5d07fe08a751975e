# SPDX-License-Identifier: Apache-2.0
"""The transformer's twin: shares the real module's `__dict__`, so weights, LoRA, hooks and devices are one state.

Calling it opens a window: our block loop is put where the class's own forward sits in the stack of hooks (offload,
casting, caches), the real module is called so that every root hook fires, and the slot is put back. An overridden
`forward` would not do: hooks that were added later keep the old one and erase ours.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale

from rapid3rt.errors import UnsupportedError
from rapid3rt.runtime.twins.base import real_class, twin_class

_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
"""One lock per real transformer: two pipelines that share it must not open their windows at once."""


_SKIPS_BLOCKS = (
    "the transformer's {} would skip blocks behind the plan, for the whole batch at once; {} first"
)
_CACHING = (
    *("fbc_", "mag_cache_", "sea_cache_", "faster_cache_", "pyramid_attention_broadcast"),
    *("taylorseer_cache", "text_kv_cache_"),
)
"""How the names of diffusers' caching hooks begin, which their functions leave on blocks and attention modules."""


class ForwardSession(Protocol):
    """What the twin needs of a session."""

    def forward(self, transformer: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Run one transformer call."""

    def guard(self) -> AbstractContextManager[None]:
        """Around a whole call, hooks included: one that fails ends the run."""

    @property
    def begins(self) -> bool:
        """Whether the run that goes on has not called the transformer yet."""


def make_transformer_twin(
    real: torch.nn.Module, session: ForwardSession, attention_kwargs: str
) -> torch.nn.Module:
    """A twin of a diffusers transformer. The real one stays usable by others.

    attention_kwargs: its argument that carries the LoRA scale.
    """
    lock = _LOCKS.setdefault(real, threading.RLock())
    call = _call_with(session, lock, attention_kwargs)
    twin: Any = object.__new__(twin_class(type(real), session, {"__call__": call}))
    object.__setattr__(twin, "__dict__", real.__dict__)
    return twin  # type: ignore[no-any-return]


def _call_with(
    session: ForwardSession, lock: threading.RLock, attention_kwargs: str
) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with session.guard():
            _check_own(self)
            if session.begins:
                check_transformer(self)
            with lock, _window(self, session, attention_kwargs):
                return torch.nn.Module.__call__(self, *args, **kwargs)

    return call


def check_transformer(transformer: Any) -> None:
    """Refuse what stands between us and the blocks, or skips some of them by itself.

    Raises
    ------
    UnsupportedError: the whole transformer was compiled, its forward exchanged, or a cache is enabled on it.
    """
    _check_own(transformer)
    for module in transformer.modules():
        hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", ())
        if caching := next((name for name in hooks if name.startswith(_CACHING)), None):
            raise UnsupportedError(_SKIPS_BLOCKS.format(f"hook {caching!r}", "remove that hook"))
    _innermost_slot(transformer, real_class(transformer).forward)  # type: ignore[attr-defined]


def _check_own(transformer: Any) -> None:
    """The part that costs nothing."""
    if getattr(transformer, "is_cache_enabled", False):
        call = "call pipe.transformer.disable_cache()"
        raise UnsupportedError(_SKIPS_BLOCKS.format("own cache", call))
    if transformer._compiled_call_impl is None:
        return
    # diffusers knows the repeated blocks of some families only; SD3 is not among them.
    instead = "for block in pipe.transformer.transformer_blocks: block.compile()"
    if getattr(transformer, "_repeated_blocks", None):
        instead = "pipe.transformer.compile_repeated_blocks()"
    raise UnsupportedError(
        f"compiling the whole transformer hides its blocks; compile them instead: {instead}"
    )


@contextmanager
def _window(module: Any, session: ForwardSession, attention_kwargs: str) -> Iterator[None]:
    """Our loop in the innermost forward slot while the context is open."""
    own = real_class(module).forward  # type: ignore[attr-defined]
    get, put = _innermost_slot(module, own)
    displaced = get()
    put(_loop(module, session, attention_kwargs, own, displaced))
    try:
        yield
    finally:
        if displaced is None:
            del module.__dict__["forward"]
        else:
            put(displaced)


def _innermost_slot(module: Any, own: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Where the class's own forward sits: a getter (None: nowhere on the instance) and a setter."""
    attributes = module.__dict__
    registry = attributes.get("_diffusers_hook")
    for holder in getattr(registry, "_fn_refs", ()):
        for name in ("original_forward", "forward"):
            if getattr(getattr(holder, name, None), "__func__", None) is own:
                return partial(getattr, holder, name), partial(setattr, holder, name)
    for name in ("_old_forward", "forward"):
        if getattr(attributes.get(name), "__func__", None) is own:
            return partial(attributes.__getitem__, name), partial(attributes.__setitem__, name)
    if "forward" not in attributes:
        return (lambda: None), partial(attributes.__setitem__, "forward")
    raise UnsupportedError(
        "the transformer's forward has been replaced by something that does not keep the original, such as a cache of "
        "another library or a compiled function; undo that replacement, then call rapid3rt.accelerate again"
    )


def _loop(
    module: Any, session: ForwardSession, attention_kwargs: str, own: Any, displaced: Any
) -> Callable[..., Any]:
    """The function that stands in the slot. Another thread that gets here runs what was there before."""
    owner = threading.get_ident()
    signature = inspect.signature(own)

    @apply_lora_scale(attention_kwargs)  # type: ignore[untyped-decorator]
    def run(transformer: Any, **kwargs: Any) -> Any:
        sample = session.forward(transformer, kwargs)
        return Transformer2DModelOutput(sample=sample) if kwargs["return_dict"] else (sample,)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return own(module, *args, **kwargs) if displaced is None else displaced(*args, **kwargs)
        bound = signature.bind(module, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments.pop("self", None)
        return run(module, **arguments)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p for name, p in signature.parameters.items() if name != "self"]
    )
    return forward

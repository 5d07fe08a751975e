# SPDX-License-Identifier: Apache-2.0
"""Caches of others, as rivals (METHOD.md, section 6 g): cache-dit, and those of diffusers where a model has them.

They are given every advantage. They decide for a whole call, so each image has a call of its own. Number of steps,
warm-up and reach are chosen for every dial on the validation split, out of `Peer.settings`. And a call costs what the
linear layers of the transformer multiplied, over a whole step of it: what a cache does besides is free.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from torch import nn

STEPS = (28, 14, 10, 7)
_WHOLE = 0.99
"""Of a step's multiply-adds, from which on it counts as computed."""
_CACHE_DIT = "cache-dit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """steps: `num_inference_steps`. warm_up: first steps that are computed whatever is seen. reach: a threshold or an
    interval; the larger, the more is reused.
    """

    steps: int
    warm_up: int
    reach: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One cache. name: with its version. switch: switches it on for a pipeline, returns what switches it off."""

    name: str
    settings: tuple[Setting, ...]
    switch: Callable[[Any, Setting], Callable[[], None]]

    @contextmanager
    def open(self, pipe: Any, setting: Setting) -> Iterator[Work]:
        """The pipeline under it while the context is open; for one call of one image."""
        off = self.switch(pipe, setting)
        work = Work()
        hooks = work.watch(pipe.transformer)
        try:
            # cache-dit would compile its forecast, in half a minute, for what takes microseconds here.
            with torch.compiler.set_stance("force_eager"):
                yield work
        finally:
            for hook in hooks:
                hook.remove()
            off()


@dataclass(slots=True)
class Work:
    """What a call really did. forwards: multiply-adds of the linear layers of every forward of the transformer."""

    forwards: list[int] = field(default_factory=list)

    def watch(self, transformer: nn.Module) -> list[Any]:
        """Count; returns the hooks."""

        def start(*_: Any) -> None:
            self.forwards.append(0)

        def count(layer: Any, _: Any, output: torch.Tensor) -> None:
            self.forwards[-1] += output.numel() * layer.in_features

        layers = [layer for layer in transformer.modules() if isinstance(layer, nn.Linear)]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        return [transformer.register_forward_pre_hook(start), *hooks]

    def spent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps reused in part and steps computed, int32 `[1, 2]`; equivalent steps, float64 `[1]`.

        The first step, before which there is nothing to reuse, is a whole one.
        """
        shares = torch.tensor(self.forwards, dtype=torch.float64) / self.forwards[0]
        computed = int((shares >= _WHOLE).sum())
        counts = torch.tensor([[len(shares) - computed, computed]], dtype=torch.int32)
        return counts, shares.sum().view(1)


def has_cache_dit() -> bool:
    """Whether the one that runs with every model is installed."""
    return find_spec("cache_dit") is not None


def find_peers(transformer: nn.Module) -> dict[str, Peer]:
    """Those that are installed and run with a model, by the name that a table shows."""
    found = {}
    if has_cache_dit():
        found[_CACHE_DIT] = _cache_dit(type(transformer).__name__)
    if hasattr(transformer, "enable_cache"):
        found["FirstBlockCache"] = _first_block()
        found["TaylorSeer"] = _taylor_seer()
    return found


def _cache_dit(model: str) -> Peer:
    """DBCache with one block computed always, and a linear forecast of what the others add."""
    # The last block of SD3 gives no text: 1.5.3 raises an error where that is to be forecast.
    has_text = not model.startswith("SD3")
    settings = tuple(
        Setting(steps=n, warm_up=n // part, reach=reach)
        for n in STEPS
        for part in (4, 2)
        for reach in (0.1, 0.2, 0.4)
    )

    def switch(pipe: Any, setting: Setting) -> Callable[[], None]:
        # Read at import; it tells ten lines a call else.
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=setting.reach,
            max_warmup_steps=setting.warm_up,
            num_inference_steps=setting.steps,
        )
        forecast = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=1, enable_encoder_calibrator=has_text
        )
        put_back = _remember(pipe.transformer)
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=forecast)

        def off() -> None:
            cache_dit.disable_cache(pipe)
            put_back()

        return off

    return Peer(
        name=f"{_CACHE_DIT} {metadata.version(_CACHE_DIT)}", settings=settings, switch=switch
    )


def _remember(module: nn.Module) -> Callable[[], None]:
    """Returns what puts back a module's attributes and the order of its children.

    cache-dit 1.5.3 leaves a forward of its own on FLUX, and children in another order, which makes the FirstBlockCache
    of diffusers raise an error.
    """
    attributes, children = vars(module), module._modules
    known, order = set(attributes), list(children)

    def put_back() -> None:
        for name in attributes.keys() - known:
            del attributes[name]
        ordered = {name: children[name] for name in order}
        children.clear()
        children.update(ordered)

    return put_back


def _first_block() -> Peer:
    settings = tuple(
        Setting(steps=n, warm_up=0, reach=reach) for n in STEPS for reach in (0.05, 0.1, 0.2, 0.4)
    )
    return _of_diffusers(
        "FirstBlockCache", settings, lambda setting: FirstBlockCacheConfig(threshold=setting.reach)
    )


def _taylor_seer() -> Peer:
    settings = tuple(
        Setting(steps=n, warm_up=n // 4, reach=reach) for n in STEPS for reach in (2.0, 3.0, 5.0)
    )
    return _of_diffusers(
        "TaylorSeer",
        settings,
        lambda setting: TaylorSeerCacheConfig(
            cache_interval=int(setting.reach),
            disable_cache_before_step=setting.warm_up,
            max_order=1,
        ),
    )


def _of_diffusers(
    name: str, settings: tuple[Setting, ...], configure: Callable[[Setting], Any]
) -> Peer:
    def switch(pipe: Any, setting: Setting) -> Callable[[], None]:
        off: Callable[[], None] = pipe.transformer.disable_cache
        pipe.transformer.enable_cache(configure(setting))
        return off

    version = metadata.version("diffusers")
    return Peer(name=f"{name} of diffusers {version}", settings=settings, switch=switch)

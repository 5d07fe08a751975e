# SPDX-License-Identifier: Apache-2.0
"""Registers every op with torch.library, so that torch.compile, CUDA graphs and opcheck know them.

Schemas are binding. The kernels of both devices are those of `native`; fakes give shapes alone. The overloads at the
end are bound once: looking them up by name costs more than a small call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rapid3rt.ops import native

_LISTS = (
    "Tensor mode, Tensor? count, Tensor? index, Tensor? order, Tensor? kv_len, "
    "int block_q, int block_kv, float scale"
)
_LOOKUP = "Tensor embedded, Tensor slots, Tensor slot, Tensor coef"

# torch.compile hands the arguments of an op that writes on by name, through a function of its own with a parameter
# named mode (torch 2.13): the in-place form cannot have one.
_LISTS_IN_PLACE = _LISTS.replace("Tensor mode", "Tensor modes")

SCHEMAS = {
    "block_sparse_attention": f"(Tensor q, Tensor k, Tensor v, {_LISTS}, bool lse=False) -> (Tensor, Tensor)",
    "block_sparse_attention_": (
        f"(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, {_LISTS_IN_PLACE}) -> ()"
    ),
    "build_block_lists": (
        "(Tensor q, Tensor k, Tensor keep, int text_start, int text_len, int block_q, int block_kv, float scale)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "cache_lookup": f"({_LOOKUP}) -> Tensor",
    "cache_lookup_norm": f"({_LOOKUP}, Tensor scale, Tensor shift, float eps) -> Tensor",
    "cache_store": "(Tensor(a!) slots, Tensor out, Tensor embedded, Tensor slot, Tensor gap) -> Tensor",
    "gate_residual": "(Tensor residual, Tensor gate, Tensor y) -> Tensor",
    "gather_rows": "(Tensor x, Tensor rows) -> Tensor",
    "norm_modulate": (
        "(Tensor x, Tensor scale, Tensor shift, Tensor? weight, Tensor? bias, float eps, bool rms) -> Tensor"
    ),
    "scatter_rows": "(Tensor(a!) out, Tensor x, Tensor rows) -> ()",
}


def _fake_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: torch.Tensor,
    count: torch.Tensor | None,
    index: torch.Tensor | None,
    order: torch.Tensor | None,
    kv_len: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
    lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    del k, v, mode, count, index, order, kv_len, block_q, block_kv, scale
    num_rows, num_heads, len_q, head_dim = q.shape
    out = q.new_empty((num_rows, len_q, num_heads, head_dim)).transpose(1, 2)
    shape = (num_rows, num_heads, len_q) if lse else (0,)
    return out, q.new_empty(shape, dtype=torch.float32)


def _fake_block_lists(
    q: torch.Tensor,
    k: torch.Tensor,
    keep: torch.Tensor,
    text_start: int,
    text_len: int,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del k, keep, text_start, text_len, scale
    num_rows, num_heads, num_tokens, _ = q.shape
    num_q, num_kv = -(-num_tokens // block_q), -(-num_tokens // block_kv)
    heads = (num_rows, num_heads)
    return (
        q.new_empty(heads, dtype=torch.uint8),
        q.new_empty((*heads, num_q), dtype=torch.int32),
        q.new_empty((*heads, num_q, num_kv), dtype=torch.int32),
        q.new_empty(num_rows * num_heads * num_q, dtype=torch.int32),
    )


def _fake_like_first(x: torch.Tensor, *others: object) -> torch.Tensor:
    del others
    return x.new_empty(x.shape)


def _fake_store(slots: torch.Tensor, out: torch.Tensor, *others: object) -> torch.Tensor:
    del slots, others
    return out.new_empty((out.shape[0], 3), dtype=torch.float32)


def _fake_gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.new_empty((rows.shape[0], *x.shape[1:]))


def _fake_nothing(*arguments: object) -> None:
    del arguments


_FAKES: dict[str, Callable[..., Any]] = {
    "block_sparse_attention": _fake_attention,
    "block_sparse_attention_": _fake_nothing,
    "build_block_lists": _fake_block_lists,
    "cache_lookup": _fake_like_first,
    "cache_lookup_norm": _fake_like_first,
    "cache_store": _fake_store,
    "gate_residual": _fake_like_first,
    "gather_rows": _fake_gather,
    "norm_modulate": _fake_like_first,
    "scatter_rows": _fake_nothing,
}


def _on_one_device(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """The op behind a check: a kernel that is handed an address of another device would read what is not there."""

    def call(*arguments: Any) -> Any:
        devices = {a.device for a in arguments if isinstance(a, torch.Tensor)}
        if len(devices) > 1:
            found = " and ".join(sorted(map(str, devices)))
            raise ValueError(f"{name} must have all tensors on one device, got {found}")
        return op(*arguments)

    return call


def register(
    library: torch.library.Library,
    name: str,
    like: str,
    cpu: Callable[..., Any],
    gpu: Callable[..., Any],
) -> None:
    """Define an op with the schema and the fake of the one it is like. cpu, gpu: what serves each."""
    library.define(name + SCHEMAS[like], tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, cpu, "CPU")
    library.impl(name, gpu, "CUDA")
    torch.library.register_fake(f"rapid3rt::{name}", _FAKES[like], lib=library)


_library = torch.library.Library("rapid3rt", "DEF")
for _name in SCHEMAS:
    _kernel = getattr(native, _name)
    register(_library, _name, _name, _kernel, _on_one_device(_name, _kernel))

block_sparse_attention = torch.ops.rapid3rt.block_sparse_attention.default
block_sparse_attention_ = torch.ops.rapid3rt.block_sparse_attention_.default
build_block_lists = torch.ops.rapid3rt.build_block_lists.default
cache_lookup = torch.ops.rapid3rt.cache_lookup.default
cache_lookup_norm = torch.ops.rapid3rt.cache_lookup_norm.default
cache_store = torch.ops.rapid3rt.cache_store.default
gate_residual = torch.ops.rapid3rt.gate_residual.default
gather_rows = torch.ops.rapid3rt.gather_rows.default
norm_modulate = torch.ops.rapid3rt.norm_modulate.default
scatter_rows = torch.ops.rapid3rt.scatter_rows.default

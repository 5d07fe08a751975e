# SPDX-License-Identifier: Apache-2.0
"""The ops that callers use: they check, choose a backend and call it. Definitions: `rapid3rt.ops.reference`.

Every op is for inference: inputs that require a gradient while gradients are enabled are refused, and so are those
that carry a tangent of forward-mode differentiation. `backend` is "native", "flex" or "reference", None for
RAPID3RT_BACKEND and then the best there is (`rapid3rt.ops.backends` says which); an explicit choice that is not
available raises UnsupportedError. Only attention has a flex backend: under it the other ops take the best there is.
Wrong shapes, dtypes, devices and layouts raise ValueError, and so do, on the CPU, ids out of range. Tensors are
float32, bfloat16 or float16 unless said otherwise; inputs of any layout are taken, and copied where a kernel needs
them contiguous.
Letters: R rows, S slots, O orders, I tokens, D width, H heads, N tokens, K head dim, Mq / Mk query / key blocks.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from rapid3rt.ops import checks, flex, library, reference
from rapid3rt.ops.backends import BACKENDS, choose, choose_attention, describe_backend, require
from rapid3rt.ops.native import info

__all__ = [
    "BACKENDS",
    "block_sparse_attention",
    "block_sparse_attention_",
    "build_block_lists",
    "cache_lookup",
    "cache_lookup_norm",
    "cache_store",
    "choose_attention",
    "describe_backend",
    "gate_residual",
    "gather_rows",
    "info",
    "norm_modulate",
    "require",
    "scatter_rows",
]

_ATTENTION: dict[str, Any] = {"native": library, "flex": flex, "reference": reference}


def gather_rows(x: torch.Tensor, rows: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Return `x[rows]`, contiguous `[R, ...]`. x: `[T, ...]`, any dtype. rows: int32 `[R]`, each in [0, T)."""
    checks.no_gradient("gather_rows", x)
    if x.dim() < 1:
        raise ValueError(f"x must have at least 1 dimension, got shape {tuple(x.shape)}")
    checks.expect_rows("rows", rows, x.device)
    if choose(backend, x.device, x.dtype) == "native":
        return library.gather_rows(x, rows)  # type: ignore[no-any-return]
    return reference.gather_rows(x, rows)


def scatter_rows(
    out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, *, backend: str | None = None
) -> None:
    """Do `out[rows] = x`; the other rows of out keep their bytes.

    Parameters
    ----------
    out: `[T, ...]` contiguous, any dtype, written. x: `[R, ...]`, same dtype. rows: int32 `[R]`, unique, in [0, T).
    The range of addresses of out meets neither that of x nor that of rows.
    """
    checks.no_gradient("scatter_rows", out, x)
    checks.expect_rows("rows", rows, out.device)
    checks.expect("x", x, (rows.shape[0], *out.shape[1:]), out.dtype, out.device)
    checks.expect_contiguous("out", out)
    if choose(backend, x.device, x.dtype) == "native":
        library.scatter_rows(out, x, rows)
    else:
        reference.scatter_rows(out, x, rows)


def cache_lookup(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    coef: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Return `embedded + sum over o of coef[:, o] * slots[slot, o]`, contiguous `[R, I, D]`.

    Parameters
    ----------
    embedded: `[R, I, D]`. slots: `[S, O, I, D]`, same dtype. slot: int32 `[R]`. coef: float32 `[R, O]`; an order
    whose coefficient is 0 is not read.
    """
    checks.no_gradient("cache_lookup", embedded, slots, coef)
    checks.expect_cache(embedded, slots, slot, coef, "coef")
    if choose(backend, embedded.device, embedded.dtype) == "native":
        return library.cache_lookup(embedded, slots, slot, coef)  # type: ignore[no-any-return]
    return reference.cache_lookup(embedded, slots, slot, coef)


def cache_lookup_norm(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    coef: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Return `LayerNorm(cache_lookup(...)) (1 + scale) + shift` in one pass, `[R, I, D]`.

    Parameters
    ----------
    embedded, slots, slot, coef: as in `cache_lookup`. scale, shift: `[R, D]`. eps: added to the variance.
    """
    checks.no_gradient("cache_lookup_norm", embedded, slots, coef, scale, shift)
    checks.expect_cache(embedded, slots, slot, coef, "coef")
    per_row = (embedded.shape[0], embedded.shape[2])
    checks.expect("scale", scale, per_row, embedded.dtype, embedded.device)
    checks.expect("shift", shift, per_row, embedded.dtype, embedded.device)
    native = choose(backend, embedded.device, embedded.dtype) == "native"
    op = library.cache_lookup_norm if native else reference.cache_lookup_norm
    return op(embedded, slots, slot, coef, scale, shift, eps)


def cache_store(
    slots: torch.Tensor,
    out: torch.Tensor,
    embedded: torch.Tensor,
    slot: torch.Tensor,
    gap: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Keep `r = out - embedded` and its finite differences; return statistics of r.

    Order 0 becomes r, order 1 `(r - old r) / gap`, order 2 `(new order 1 - old order 1) / gap`. Where gap is 0 nothing
    old is read and higher orders become 0.

    Parameters
    ----------
    slots: `[S, O, I, D]` contiguous, written. out, embedded: `[R, I, D]`, same dtype. slot: int32 `[R]`, unique.
    gap: float32 `[R]`, distance in sigma to the row's previous compute, 0 where there is none. The range of addresses
    of slots meets none of the others'.

    Returns
    -------
    float32 `[R, 3]`: drift = mean|r - old r| / mean|old r| (0 where gap is 0), mean and standard deviation of r;
    all 0 where I or D is 0.
    """
    checks.no_gradient("cache_store", slots, out, embedded, gap)
    checks.expect_cache(embedded, slots, slot, gap, "gap")
    checks.expect("out", out, embedded.shape, embedded.dtype, embedded.device)
    checks.expect_contiguous("slots", slots)
    if choose(backend, embedded.device, embedded.dtype) == "native":
        return library.cache_store(slots, out, embedded, slot, gap)  # type: ignore[no-any-return]
    return reference.cache_store(slots, out, embedded, slot, gap)


def norm_modulate(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Return `(norm(x) weight + bias) (1 + scale) + shift`: LayerNorm over D, or RMS norm if `rms`.

    Parameters
    ----------
    x: `[R, I, D]`. scale, shift: `[R, D]`. weight, bias: `[D]` or None. All of one dtype. eps: added to the variance
    (mean square).
    """
    checks.no_gradient("norm_modulate", x, scale, shift, weight, bias)
    checks.expect_float("x", x, 3)
    per_row, width = (x.shape[0], x.shape[2]), (x.shape[2],)
    checks.expect("scale", scale, per_row, x.dtype, x.device)
    checks.expect("shift", shift, per_row, x.dtype, x.device)
    if weight is not None:
        checks.expect("weight", weight, width, x.dtype, x.device)
    if bias is not None:
        checks.expect("bias", bias, width, x.dtype, x.device)
    native = choose(backend, x.device, x.dtype) == "native"
    op = library.norm_modulate if native else reference.norm_modulate
    return op(x, scale, shift, weight, bias, eps, rms)


def gate_residual(
    residual: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Return `residual + gate y`, `[R, I, D]`. residual, y: `[R, I, D]`; gate: `[R, D]`; one dtype."""
    checks.no_gradient("gate_residual", residual, gate, y)
    checks.expect_float("residual", residual, 3)
    checks.expect("y", y, residual.shape, residual.dtype, residual.device)
    per_row = (residual.shape[0], residual.shape[2])
    checks.expect("gate", gate, per_row, residual.dtype, residual.device)
    if choose(backend, y.device, y.dtype) == "native":
        return library.gate_residual(residual, gate, y)  # type: ignore[no-any-return]
    return reference.gate_residual(residual, gate, y)


def build_block_lists(
    q: torch.Tensor,
    k: torch.Tensor,
    keep: torch.Tensor,
    text_start: int,
    text_len: int,
    block_q: int,
    block_kv: int,
    scale: float,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose, for each query block, the key blocks with the largest `scale * mean(q) . mean(k)`.

    Parameters
    ----------
    q, k: `[R, H, N, K]`, joint tokens, strides as in `block_sparse_attention`. keep: int32 `[R]`, image key blocks
    per image query block; at least all of them makes the row dense. text_start, text_len: where text tokens lie; a
    block that touches one is always a key, and dense as a query block. block_q, block_kv: tokens per block, 32, 64
    or 128.

    Returns
    -------
    mode uint8 `[R, H]`, count int32 `[R, H, Mq]`, index int32 `[R, H, Mq, Mk]`, order int32 `[R H Mq]`: what
    `block_sparse_attention` takes.
    """
    checks.no_gradient("build_block_lists", q, k)
    checks.expect_blocks(block_q, block_kv)
    checks.expect_float("q", q, 4)
    checks.expect("k", k, q.shape, q.dtype, q.device)
    checks.expect_heads("q", q)
    checks.expect_heads("k", k)
    checks.expect("keep", keep, (q.shape[0],), torch.int32, q.device)
    if text_len < 0 or text_start < 0 or text_start + text_len > q.shape[2]:
        raise ValueError(
            f"text_start and text_len must lie within {q.shape[2]} tokens, got {text_start} and {text_len}"
        )
    native = choose(backend, q.device, q.dtype) == "native"
    op = library.build_block_lists if native else reference.build_block_lists
    return op(q, k, keep, text_start, text_len, block_q, block_kv, scale)


def block_sparse_attention(
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
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale q k^T) v over the listed key blocks of each query block, and the log-sum-exp.

    Parameters
    ----------
    q: `[R, H, Nq, K]`. k, v: `[R, H, Nk, K]`. Last stride 1, other strides multiples of 16 bytes, aligned to 16
    bytes. mode: uint8 `[R, H]`, 0 dense, 1 list. count: int32 `[R, H, Mq]`. index: int32 `[R, H, Mq, S]`, ascending,
    not read beyond count. order: int32 `[R H Mq]`, a permutation of work ids, or None; never changes the result.
    kv_len: int32 `[R]`, keys beyond it are not read, or None. block_q, block_kv: 32, 64 or 128 tokens. lse: return it.

    Returns
    -------
    out `[R, H, Nq, K]`, a transposed view of contiguous `[R, Nq, H, K]`; a query without keys gives 0.
    lse float32 `[R, H, Nq]`, natural logarithm, -inf without keys; empty if not asked for.
    """
    checks.no_gradient("block_sparse_attention", q, k, v)
    lists = (mode, count, index, order, kv_len)
    checks.expect_attention(q, k, v, lists, block_q, block_kv)
    chosen = _choose_attention(backend, q, block_q, lse)
    return _ATTENTION[chosen].block_sparse_attention(  # type: ignore[no-any-return]
        q, k, v, *lists, block_q, block_kv, scale, lse
    )


def block_sparse_attention_(
    out: torch.Tensor,
    lse: torch.Tensor | None,
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
    *,
    backend: str | None = None,
) -> None:
    """Write `block_sparse_attention` into out and lse; heads of mode 2 (skip) keep their bytes.

    Parameters
    ----------
    out: `[R, H, Nq, K]`, strides as q, written. lse: float32 `[R, H, Nq]` contiguous or None, written. The others as
    in `block_sparse_attention`; mode may also be 2. The ranges of addresses of out and lse meet neither each other nor
    those of q, k, v: an out that interleaves with them, as a slice of one packed tensor does, is refused; an out
    behind them in the same storage is not.
    """
    checks.no_gradient("block_sparse_attention_", out, q, k, v)
    lists = (mode, count, index, order, kv_len)
    checks.expect_attention(q, k, v, lists, block_q, block_kv)
    checks.expect("out", out, q.shape, q.dtype, q.device)
    checks.expect_heads("out", out)
    if lse is not None:
        checks.expect("lse", lse, q.shape[:3], torch.float32, q.device)
        checks.expect_contiguous("lse", lse)
    chosen = _choose_attention(backend, q, block_q, lse is not None)
    _ATTENTION[chosen].block_sparse_attention_(out, lse, q, k, v, *lists, block_q, block_kv, scale)


def _choose_attention(backend: str | None, q: torch.Tensor, block: int, lse: bool) -> str:
    # index() makes constants of what torch.compile(dynamic=True) takes for symbols: the choice depends on them.
    head_dim, block = operator.index(q.shape[3]), operator.index(block)
    chosen: str = choose_attention(backend, q.device, q.dtype, head_dim, block, lse)
    return chosen

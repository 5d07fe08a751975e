# SPDX-License-Identifier: Apache-2.0
"""What `rapid3rt.ops` demands of its tensors. Reads shapes, dtypes, layouts and addresses, never values."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from rapid3rt.errors import UnsupportedError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128)


def no_gradient(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise UnsupportedError where autograd would expect a gradient, backward or forward, of an op that has none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise UnsupportedError(
            f"{op} has no gradient: call it under torch.no_grad(), or detach its inputs"
        )
    # Asking a tensor for its tangent costs microseconds: only within a dual level, where alone there are any.
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise UnsupportedError(f"{op} has no forward-mode gradient: pass the primals of its inputs")


def _has_tangent(x: torch.Tensor | None) -> bool:
    if x is None:
        return False
    # A traced tensor does not show its tangent: it may have one.
    return torch.compiler.is_compiling() or forward_ad.unpack_dual(x).tangent is not None


def expect(
    name: str,
    x: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise ValueError unless the tensor has this shape, dtype and device."""
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype is not dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on device {device}, got {x.device}")


def expect_float(name: str, x: torch.Tensor, num_dims: int) -> None:
    """Raise ValueError unless the tensor has so many dimensions and a dtype that kernels know."""
    if x.dim() != num_dims:
        raise ValueError(f"{name} must have {num_dims} dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


def expect_contiguous(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless the tensor, which will be written, is contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(x.stride())}")


def expect_apart(name: str, written: torch.Tensor, **read: torch.Tensor | None) -> None:
    """Raise ValueError where a tensor that is written shares memory with itself or with what is read.

    Ranges of addresses are compared, whatever the storage. Views that interleave, as slices of the last dimension do,
    are refused too, though no element is shared. A traced graph has no addresses: its ops are checked when they run.
    """
    if torch.compiler.is_compiling():
        return
    if not written.is_contiguous():
        _expect_distinct(name, written)
    begin, end = _addresses(written)
    for other, x in read.items():
        first, last = (0, 0) if x is None else _addresses(x)
        if first < end and begin < last:
            shared = min(end, last) - max(begin, first)
            raise ValueError(
                f"{name} must share no memory with {other}, got {shared} bytes in the ranges of both"
            )


def _addresses(x: torch.Tensor) -> tuple[int, int]:
    """Of the first byte and behind the last; 0 and 0 without memory: meta, fake, empty."""
    try:
        first = x.data_ptr()
    except RuntimeError:  # wrapped by torch.func: the op is called with what it wraps
        return 0, 0
    if not first:
        return 0, 0
    if x.is_contiguous():
        return first, first + x.nbytes
    steps = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return first, first + (steps + 1) * x.element_size()


def _expect_distinct(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless every element has a place of its own."""
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < span:
                raise ValueError(
                    f"{name} must not overlap itself, got shape {tuple(x.shape)} and strides {tuple(x.stride())}"
                )
            span += (size - 1) * stride


def expect_rows(name: str, rows: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor is a list of ids."""
    if rows.dim() != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {tuple(rows.shape)}")
    if rows.dtype is not torch.int32:
        raise ValueError(f"{name} must be torch.int32, got {rows.dtype}")
    if rows.device != device:
        raise ValueError(f"{name} must be on device {device}, got {rows.device}")


def expect_heads(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless `[R, H, N, K]` has last stride 1 and others that are multiples of 16 bytes."""
    strides, shape = x.stride(), x.shape
    size = x.element_size()
    if shape[3] > 1 and strides[3] != 1:
        raise ValueError(f"{name} must have last stride 1, got strides {tuple(strides)}")
    if any(shape[i] > 1 and strides[i] * size % 16 for i in range(3)):
        raise ValueError(
            f"{name} must have strides that are multiples of 16 bytes, got strides {tuple(strides)}"
        )


def expect_blocks(block_q: int, block_kv: int) -> None:
    """Raise ValueError unless kernels exist for the block sizes."""
    if block_q not in BLOCKS or block_kv != block_q:
        raise ValueError(
            f"block_q and block_kv must both be 32, 64 or 128, got {block_q} and {block_kv}"
        )


def expect_cache(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    factors: torch.Tensor,
    name: str,
) -> None:
    """Raise ValueError unless the tensors of a cache op fit together. factors: coef `[R, O]` or gap `[R]`."""
    expect_float("embedded", embedded, 3)
    if slots.dim() != 4:
        raise ValueError(f"slots must have 4 dimensions, got shape {tuple(slots.shape)}")
    num_rows, num_tokens, width = embedded.shape
    device = embedded.device
    num_slots, num_orders = slots.shape[0], slots.shape[1]
    if num_orders < 1:
        raise ValueError(f"slots must hold at least one order, got shape {tuple(slots.shape)}")
    expect("slots", slots, (num_slots, num_orders, num_tokens, width), embedded.dtype, device)
    expect("slot", slot, (num_rows,), torch.int32, device)
    shape = (num_rows, num_orders) if name == "coef" else (num_rows,)
    expect(name, factors, shape, torch.float32, device)


def expect_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: tuple[
        torch.Tensor,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
    ],
    block_q: int,
    block_kv: int,
) -> None:
    """Raise ValueError unless the tensors of an attention call fit together."""
    expect_blocks(block_q, block_kv)
    expect_float("q", q, 4)
    num_rows, num_heads, len_q, head_dim = q.shape
    device = q.device
    if k.dim() != 4:
        raise ValueError(f"k must have 4 dimensions, got shape {tuple(k.shape)}")
    for name, x in (("k", k), ("v", v)):
        expect(name, x, (num_rows, num_heads, k.shape[2], head_dim), q.dtype, device)
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect_heads(name, x)
    mode, count, index, order, kv_len = lists
    num_blocks = -(-len_q // block_q)
    heads = (num_rows, num_heads)
    expect("mode", mode, heads, torch.uint8, device)
    if (count is None) != (index is None):
        given = "index" if count is None else "count"
        raise ValueError(f"count and index must be given together, got {given} alone")
    if count is not None and index is not None:
        expect("count", count, (*heads, num_blocks), torch.int32, device)
        listed = index.shape[3] if index.dim() == 4 else 0
        expect("index", index, (*heads, num_blocks, listed), torch.int32, device)
        most = -(-k.shape[2] // block_kv)
        if listed > most:
            raise ValueError(f"index must list at most {most} key blocks, got {listed}")
    if order is not None:
        expect("order", order, (num_rows * num_heads * num_blocks,), torch.int32, device)
    if kv_len is not None:
        expect("kv_len", kv_len, (num_rows,), torch.int32, device)


def expect_attention_apart(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """`expect_apart` for what attention writes: out and lse."""
    expect_apart("out", out, lse=lse, q=q, k=k, v=v)
    if lse is not None:
        expect_apart("lse", lse, q=q, k=k, v=v)

# SPDX-License-Identifier: Apache-2.0
"""What the ops are measured against: copies, plain PyTorch, SDPA, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rapid3rt import ops
from rapid3rt.ops import reference
from rapid3rt.testing.cases import Case

Call = Callable[[], object]
Arguments = tuple[Any, ...]


def eager(case: Case, arguments: Arguments) -> Call:
    """What a user would write: plain PyTorch in the dtype of the tensors."""
    if case.op == "gather_rows":
        x, rows = arguments
        return lambda: x.index_select(0, rows)
    if case.op == "scatter_rows":
        out, x, rows = arguments
        wide = rows.long()
        return lambda: out.index_copy_(0, wide, x)
    if case.op in ("cache_lookup", "cache_lookup_norm"):
        return eager_lookup(*arguments)
    if case.op == "cache_store":
        return eager_store(*arguments)
    if case.op == "norm_modulate":
        x, scale, shift, weight, bias, eps, _ = arguments
        return lambda: (
            F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale[:, None]) + shift[:, None]
        )
    if case.op == "gate_residual":
        residual, gate, y = arguments
        return lambda: residual + gate[:, None] * y
    return lambda: getattr(reference, case.op)(*arguments)


def eager_lookup(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    coef: torch.Tensor,
    *norm: Any,
) -> Call:
    """Lookup, with scale, shift and eps also norm and modulation."""
    weight = coef[:, :, None, None].to(embedded.dtype)

    def lookup() -> torch.Tensor:
        x = embedded
        for order in range(slots.shape[1]):
            x = x + weight[:, order] * slots[:, order].index_select(0, slot)
        if not norm:
            return x
        scale, shift, eps = norm
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

    return lookup


def eager_store(
    slots: torch.Tensor,
    out: torch.Tensor,
    embedded: torch.Tensor,
    slot: torch.Tensor,
    gap: torch.Tensor,
) -> Call:
    """Store of rows that all have a history."""
    wide, width = slot.long(), gap[:, None, None].to(out.dtype)

    def store() -> torch.Tensor:
        r = out - embedded
        old = slots.index_select(0, slot)
        entries = [r]
        for order in range(1, slots.shape[1]):
            entries.append((entries[-1] - old[:, order - 1]) / width)
        slots[wide] = torch.stack(entries, 1)
        drift = (r - old[:, 0]).abs().mean((1, 2)) / old[:, 0].abs().mean((1, 2))
        return torch.stack((drift, r.mean((1, 2)), r.std((1, 2), correction=0)), 1)

    return store


def copy_of(num_bytes: int, device: torch.device) -> Call:
    """Move as many bytes as a call does, reading half and writing half."""
    source = torch.randn(num_bytes // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def listed_mask(arguments: Arguments) -> torch.Tensor:
    """Which key blocks each query block sees: bool `[R, H, Mq, Mk]`."""
    _, k, _, mode, count, index, *_, block_kv, _, _ = arguments
    blocks = -(-k.shape[2] // block_kv)
    seen = torch.zeros(*count.shape, blocks + 1, dtype=torch.bool, device=k.device)
    in_list = torch.arange(index.shape[-1], device=k.device) < count[..., None]
    seen.scatter_(-1, torch.where(in_list, index, blocks).long(), True)
    return seen[..., :blocks] | (mode != 1)[..., None, None]


def masked_sdpa(arguments: Arguments) -> Call:
    """SDPA with the lists as a mask."""
    q, k, v = arguments[:3]
    block_q, block_kv, scale = arguments[8:11]
    mask = listed_mask(arguments).repeat_interleave(block_q, 2).repeat_interleave(block_kv, 3)
    mask = mask[:, :, : q.shape[2], : k.shape[2]].contiguous()
    return lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def always(_b: Any, _h: Any, q: Any, _k: Any) -> Any:
    """A mask that hides nothing: FlexAttention's code for the CPU does not compile without one."""
    return q >= 0


def flex(arguments: Arguments) -> Call:
    """FlexAttention compiled, over the same lists."""
    q, k, v = arguments[:3]
    block_q, block_kv, scale = arguments[8:11]
    seen = listed_mask(arguments)
    count = seen.sum(-1, dtype=torch.int32)
    index = torch.argsort((~seen).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        count, index, None, None, (block_q, block_kv), always, (q.shape[2], k.shape[2])
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale)


def attention_rivals(arguments: Arguments, forced: bool, compiles: bool) -> dict[str, Call]:
    """Against the best that PyTorch does without lists, and against two ways to use them."""
    q, k, v, mode = arguments[:4]
    scale = arguments[10]
    found: dict[str, Call] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)}
    if forced:
        a, b, c = q.float(), k.float(), v.float()
        found["sdpa fp32"] = lambda: F.scaled_dot_product_attention(a, b, c, scale=scale)
    elif mode.any():
        found["sdpa mask"] = masked_sdpa(arguments)
    if compiles:
        found["flex"] = flex(arguments)
    return found


def list_rivals(case: Case, arguments: Arguments) -> dict[str, Call]:
    """Lists must cost little beside the attention that they serve."""
    q, k, *_, block_q, block_kv, scale = arguments
    mode = torch.zeros(q.shape[:2], dtype=torch.uint8, device=q.device)
    dense = (q, k, k, mode, None, None, None, None, block_q, block_kv, scale)
    return {
        "dense attention": lambda: ops.block_sparse_attention(*dense),
        "eager": eager(case, arguments),
    }


def make_rivals(case: Case, arguments: Arguments, forced: bool, compiles: bool) -> dict[str, Call]:
    """Name to call.

    Parameters
    ----------
    forced: another instruction set than the best runs. compiles: also those that torch.compile makes.
    """
    if case.op == "block_sparse_attention":
        return attention_rivals(arguments, forced, compiles)
    if case.op == "build_block_lists":
        return list_rivals(case, arguments)
    x = arguments[0]
    call = eager(case, arguments)
    found = {"copy": copy_of(case.num_bytes(x.dtype), x.device), "eager": call}
    if compiles and case.op not in ("gather_rows", "scatter_rows"):
        found["compile"] = torch.compile(call, dynamic=False)
    return found

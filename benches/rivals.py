# SPDX-License-Identifier: Apache-2.0
"""What the ops are measured against: copies, plain PyTorch, SDPA, FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rapid3rt import ops
from rapid3rt.testing.attention import listed_mask, lists_of
from rapid3rt.testing.cases import Case
from rapid3rt.testing.eager import Call, eager

Arguments = tuple[Any, ...]


def copy_of(num_bytes: int, device: torch.device) -> Call:
    """Move as many bytes as a call does, reading half and writing half."""
    source = torch.randn(num_bytes // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


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
    count, index = lists_of(listed_mask(arguments))
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

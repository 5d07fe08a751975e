# SPDX-License-Identifier: Apache-2.0
"""What the ops are measured against: copies, plain PyTorch, SDPA, FlexAttention.

What torch.compile makes is compiled for one case alone: Dynamo forgets before each. It compiles a function for eight
shapes at most; beyond them FlexAttention would run as plain PyTorch, thirty times slower, and say so once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rapid3rt import ops
from rapid3rt.testing.attention import listed_mask, lists_of
from rapid3rt.testing.cases import Case, result_tensors
from rapid3rt.testing.eager import Call, eager

Arguments = tuple[Any, ...]
Makers = dict[str, Callable[[], Call]]

NAMES = (
    *("copy", "eager", "compile"),
    *("sdpa", "sdpa fp32", "sdpa mask", "flex"),
    "dense attention",
)
COMPILED = ("compile", "flex")
SAME_RESULT = ("sdpa mask", "flex")  # as ours; eager and compile are the op's own definition


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
    """FlexAttention compiled, over the same lists; an error where it cannot be compiled."""
    q, k, v = arguments[:3]
    block_q, block_kv, scale = arguments[8:11]
    count, index = lists_of(listed_mask(arguments))
    mask = BlockMask.from_kv_blocks(
        count, index, None, None, (block_q, block_kv), always, (q.shape[2], k.shape[2])
    )
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale)


def fp32_sdpa(arguments: Arguments) -> Call:
    """SDPA without lists on widened tensors."""
    q, k, v = (x.float() for x in arguments[:3])
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=arguments[10])


def attention_rivals(arguments: Arguments, forced: bool) -> Makers:
    """Against the best that PyTorch does without lists, and against two ways to use them."""
    q, k, v, mode = arguments[:4]
    scale = arguments[10]
    found: Makers = {"sdpa": lambda: lambda: F.scaled_dot_product_attention(q, k, v, scale=scale)}
    if forced:
        found["sdpa fp32"] = partial(fp32_sdpa, arguments)
    elif mode.any():
        found["sdpa mask"] = partial(masked_sdpa, arguments)
    return {**found, "flex": partial(flex, arguments)}


def list_rivals(case: Case, arguments: Arguments) -> Makers:
    """Lists must cost little beside the attention that they serve."""
    q, k, *_, block_q, block_kv, scale = arguments
    mode = torch.zeros(q.shape[:2], dtype=torch.uint8, device=q.device)
    dense = (q, k, k, mode, None, None, None, None, block_q, block_kv, scale)
    return {
        "dense attention": lambda: lambda: ops.block_sparse_attention(*dense),
        "eager": lambda: eager(case, arguments),
    }


def _makers(case: Case, arguments: Arguments, forced: bool) -> Makers:
    if case.op == "block_sparse_attention":
        return attention_rivals(arguments, forced)
    if case.op == "build_block_lists":
        return list_rivals(case, arguments)
    x = arguments[0]
    found: Makers = {
        "copy": lambda: copy_of(case.num_bytes(x.dtype), x.device),
        "eager": lambda: eager(case, arguments),
    }
    if case.op not in ("gather_rows", "scatter_rows"):
        found["compile"] = lambda: torch.compile(eager(case, arguments), dynamic=False)
    return found


def make_rivals(
    case: Case, arguments: Arguments, names: tuple[str, ...], forced: bool
) -> tuple[dict[str, Call], dict[str, str]]:
    """Those of these names that the case has: name to call, and for those that cannot run, name to reason.

    Each has been called once, and its result compared with ours where it must be the same.

    Parameters
    ----------
    forced: another instruction set than the best runs.
    """
    torch.compiler.reset()
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, make in _makers(case, arguments, forced).items():
        if name not in names:
            continue
        try:
            calls[name] = make()
            result = calls[name]()
            if name in SAME_RESULT:
                ours = getattr(ops, case.op)(*arguments)
                got, want = result_tensors(result)[0], result_tensors(ours)[0]
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
        except Exception as error:
            calls.pop(name, None)
            reason = [line.strip() for line in str(error).splitlines() if line.strip()]
            failed[name] = ": ".join([type(error).__name__, *reason[:1]])
    return calls, failed

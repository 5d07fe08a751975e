# SPDX-License-Identifier: Apache-2.0
"""What the attention tests share: forcing an instruction set, the rival's result, and the error rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from rapid3rt import envs, ops
from rapid3rt.ops import native, reference
from rapid3rt.testing.attention import listed_mask
from rapid3rt.testing.numerics import assert_close

Arguments = tuple[Any, ...]

ISAS: tuple[str, ...] = ops.info()["isas"]


@contextmanager
def forced(isa: str | None) -> Iterator[None]:
    """Attention of one instruction set within the block."""
    native._cpu.force_isa(isa)
    try:
        yield
    finally:
        native._cpu.force_isa(envs.cpu_isa())


def widen(arguments: Arguments) -> Arguments:
    """The same call in float64; coefficients stay float32, as the op wants them."""
    is_float = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in arguments]
    return tuple(a.double() if f else a for a, f in zip(arguments, is_float, strict=True))


def masked_sdpa(arguments: Arguments) -> torch.Tensor:
    """What PyTorch gives for the same call: SDPA under a mask."""
    q, k, v = arguments[:3]
    kv_len, block_q, block_kv, scale = arguments[7:11]
    mask = listed_mask(arguments).repeat_interleave(block_q, 2).repeat_interleave(block_kv, 3)
    mask = mask[:, :, : q.shape[2], : k.shape[2]]
    if kv_len is not None:
        mask = mask & (torch.arange(k.shape[2], device=k.device) < kv_len[:, None, None, None])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).nan_to_num(0.0)


def mean_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean distance where the truth is finite."""
    finite = truth.isfinite()
    return float((x.to(truth.dtype) - truth)[finite].abs().mean()) if finite.any() else 0.0


def check_attention(what: str, arguments: Arguments) -> None:
    """Hold the native kernel to twice the error of SDPA in the same dtype: largest, mean and direction."""
    out, lse = ops.block_sparse_attention(*arguments, backend="native")
    truth, truth_lse = reference.block_sparse_attention(*widen(arguments))
    rival = masked_sdpa(arguments)
    assert_close(what, out, rival, truth)
    if out.numel():
        # A few wrong tiles hide below the largest error of many right ones, not below the mean.
        # A single key is copied by PyTorch without any error, so the floor is that of `assert_close`.
        floor = mean_error(truth.to(out.dtype) + 0.3 - 0.3, truth)
        allowed = 2 * mean_error(rival, truth) + 2 * floor + 1e-8
        assert mean_error(out, truth) <= allowed, f"{what}: mean error"
    assert out.transpose(1, 2).is_contiguous()
    assert lse.dtype is torch.float32
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""The ops as a user would write them: plain PyTorch, every operation rounded to the dtype of the tensors.

A rival for benches, and the measure of what error a dtype allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from rapid3rt.ops import reference
from rapid3rt.testing.cases import Case

Call = Callable[[], Any]


def eager(case: Case, arguments: tuple[Any, ...]) -> Call:
    """The call of a case in plain PyTorch; attention and its lists are the reference itself."""
    makers: dict[str, Callable[..., Call]] = {
        "gather_rows": _gather,
        "scatter_rows": _scatter,
        "cache_lookup": _lookup,
        "cache_lookup_norm": _lookup,
        "cache_store": _store,
        "norm_modulate": _modulate,
        "gate_residual": _gate,
    }
    if case.op in makers:
        return makers[case.op](*arguments)
    return lambda: getattr(reference, case.op)(*arguments)


def _gather(x: torch.Tensor, rows: torch.Tensor) -> Call:
    return lambda: x.index_select(0, rows)


def _scatter(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> Call:
    wide = rows.long()
    return lambda: out.index_copy_(0, wide, x)


def _gate(residual: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> Call:
    return lambda: residual + gate[:, None] * y


def _modulate(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool = False,
) -> Call:
    def modulate() -> torch.Tensor:
        if rms:
            normed = F.rms_norm(x, x.shape[-1:], weight, eps)
            normed = normed if bias is None else normed + bias
        else:
            normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return normed * (1 + scale[:, None]) + shift[:, None]

    return modulate


def _lookup(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    coef: torch.Tensor,
    *norm: Any,
) -> Call:
    weight = coef[:, :, None, None].to(embedded.dtype)

    def lookup() -> torch.Tensor:
        x = embedded
        for order in range(slots.shape[1]):
            x = x + weight[:, order] * slots[:, order].index_select(0, slot)
        if not norm:
            return x
        scale, shift, eps = norm
        normed = F.layer_norm(x, x.shape[-1:], eps=eps)
        modulated: torch.Tensor = normed * (1 + scale[:, None]) + shift[:, None]
        return modulated

    return lookup


def _store(
    slots: torch.Tensor,
    out: torch.Tensor,
    embedded: torch.Tensor,
    slot: torch.Tensor,
    gap: torch.Tensor,
) -> Call:
    """Rows must all have a history."""
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

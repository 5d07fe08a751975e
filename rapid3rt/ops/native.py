# SPDX-License-Identifier: Apache-2.0
"""The native backend: hands addresses, sizes and strides of tensors to the torch-free modules `_cpu` and `_cuda`.

Every op prepares its call in the same way for both; `_run` sends it to the module of the device, and
`rapid3rt.ops.cuda` adds what a GPU needs. Nothing is checked here but layouts that the kernels rely on, and that what
is written is not read as well: a compiled graph has no addresses before it runs. `rapid3rt.ops` checks what callers
pass. Why a module is missing, if it is, is kept and told. A call that computes no value goes to the reference, which
checks its ids on the CPU.
"""

from __future__ import annotations

import importlib
from typing import Any

# First: OpenMP must be the one that torch has loaded, two runtimes in one process fight over cores.
import torch
from torch.autograd.graph import increment_version  # kernels write behind autograd's back

from rapid3rt import envs
from rapid3rt.errors import UnsupportedError
from rapid3rt.ops import checks, cuda, reference

# The same numbers stand in csrc/include/rapid3rt/dtype.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_num_threads = torch.get_num_threads


def _load() -> tuple[Any, str | None, bool]:
    """The module, or None and why not, and whether that is a wrong RAPID3RT_CPU_ISA."""
    try:
        module: Any = importlib.import_module("rapid3rt._cpu")
    except ImportError as error:
        return None, f"module rapid3rt._cpu cannot be loaded: {error}", False
    isa = envs.cpu_isa()
    if isa is not None:
        try:
            module.force_isa(isa)
        except ValueError as error:  # told by whatever needs the kernels: an import needs none
            return None, str(error), True
    return module, None, False


_cpu, _missing, _wrong_isa = _load()


def missing_reason(device_type: str) -> str | None:
    """Why this backend cannot serve a device, None when it can.

    Raises ValueError where RAPID3RT_CPU_ISA is wrong: what was asked for by name is never replaced silently.
    """
    if device_type == "cpu":
        if _wrong_isa:
            raise ValueError(_missing)
        return _missing
    if device_type == "cuda":
        return cuda.missing_reason()
    return f"this build has no native kernels for device {device_type!r}"


def kernel_isa(op: str, dtype: torch.dtype, head_dim: int = 0) -> str:
    """Name the instruction set whose kernel serves calls of an op on the CPU; head_dim: of attention."""
    if op.startswith("block_sparse_attention"):
        return str(_cpu.attention_isa(DTYPES[dtype], head_dim))
    best: str = _cpu.isa()
    return "avx512_bf16" if best == "amx" else best  # nothing else has tiles


def info() -> dict[str, Any]:
    """Tell what the CPU kernels run on.

    Returns
    -------
    available: bool. Where it is True: isas (tuple, instruction sets of this build that this machine has, ascending),
    isa (the best of them, or the one that was forced; an op may have no kernel of its own for it), openmp (bool). Else
    reason: why the module is missing, or what is wrong with RAPID3RT_CPU_ISA.
    """
    if _cpu is None:
        return {"available": False, "reason": _missing}
    return {
        "available": True,
        "isas": tuple(_cpu.isas),
        "isa": _cpu.isa(),
        "openmp": _cpu.has_openmp,
    }


def _module() -> Any:
    if _cpu is None:
        raise UnsupportedError(f"backend 'native' is not available: {_missing}")
    return _cpu


def _run(name: str, on: torch.Tensor, *arguments: Any) -> None:
    """Call the kernel of the device that a tensor is on; all others are on it too."""
    if on.is_cuda:
        cuda.run(name, on.device, arguments)
    else:
        getattr(_module(), name)(*arguments, _num_threads())


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As `reference.gather_rows`."""
    x, rows = x.contiguous(), rows.contiguous()
    out = x.new_empty((rows.shape[0], *x.shape[1:]))
    num_rows, num_bytes = rows.shape[0], out.numel() * x.element_size()
    if num_bytes or (num_rows and not x.is_cuda):  # on the CPU ids of rows of no bytes are checked
        _run(
            "gather_rows", x,
            out.data_ptr(), x.data_ptr(), rows.data_ptr(), num_rows, x.shape[0], num_bytes // num_rows
        )  # fmt: skip
    return out


def scatter_rows(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
    """As `reference.scatter_rows`."""
    checks.expect_apart("out", out, x=x, rows=rows)
    increment_version(out)
    x, rows = x.contiguous(), rows.contiguous()
    num_rows, num_bytes = rows.shape[0], x.numel() * x.element_size()
    if num_bytes or (num_rows and not x.is_cuda):
        _run(
            "scatter_rows", out,
            out.data_ptr(), x.data_ptr(), rows.data_ptr(), num_rows, out.shape[0], num_bytes // num_rows
        )  # fmt: skip


def cache_lookup(
    embedded: torch.Tensor, slots: torch.Tensor, slot: torch.Tensor, coef: torch.Tensor
) -> torch.Tensor:
    """As `reference.cache_lookup`."""
    if not embedded.numel():
        return reference.cache_lookup(embedded, slots, slot, coef)
    return _lookup(embedded, slots, slot, coef, None, None, 0.0)


def cache_lookup_norm(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    coef: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """As `reference.cache_lookup_norm`."""
    if not embedded.numel():
        return reference.cache_lookup_norm(embedded, slots, slot, coef, scale, shift, eps)
    return _lookup(embedded, slots, slot, coef, scale.contiguous(), shift.contiguous(), eps)


def _lookup(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    coef: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    embedded, slots, slot, coef = (t.contiguous() for t in (embedded, slots, slot, coef))
    out = torch.empty_like(embedded)
    num_rows, num_tokens, width = embedded.shape
    _run(
        "cache_lookup", embedded,
        out.data_ptr(), embedded.data_ptr(), slots.data_ptr(), slot.data_ptr(), coef.data_ptr(),
        _address(scale), _address(shift), eps, num_rows, slots.shape[0], slots.shape[1], num_tokens, width,
        DTYPES[embedded.dtype],
    )  # fmt: skip
    return out


def cache_store(
    slots: torch.Tensor,
    out: torch.Tensor,
    embedded: torch.Tensor,
    slot: torch.Tensor,
    gap: torch.Tensor,
) -> torch.Tensor:
    """As `reference.cache_store`."""
    if not embedded.numel():
        return reference.cache_store(slots, out, embedded, slot, gap)
    checks.expect_apart("slots", slots, out=out, embedded=embedded, slot=slot, gap=gap)
    increment_version(slots)
    out, embedded, slot, gap = (t.contiguous() for t in (out, embedded, slot, gap))
    num_rows, num_tokens, width = embedded.shape
    stats = embedded.new_empty((num_rows, 3), dtype=torch.float32)
    _run(
        "cache_store", slots,
        stats.data_ptr(), slots.data_ptr(), out.data_ptr(), embedded.data_ptr(), slot.data_ptr(), gap.data_ptr(),
        num_rows, slots.shape[0], slots.shape[1], num_tokens, width, DTYPES[embedded.dtype],
    )  # fmt: skip
    return stats


def norm_modulate(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
) -> torch.Tensor:
    """As `reference.norm_modulate`."""
    x, scale, shift = (t.contiguous() for t in (x, scale, shift))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    out = torch.empty_like(x)
    if out.numel():
        _run(
            "norm_modulate", x,
            out.data_ptr(), x.data_ptr(), scale.data_ptr(), shift.data_ptr(), _address(weight), _address(bias),
            eps, rms, *x.shape, DTYPES[x.dtype],
        )  # fmt: skip
    return out


def gate_residual(residual: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """As `reference.gate_residual`."""
    residual, gate, y = (t.contiguous() for t in (residual, gate, y))
    out = torch.empty_like(residual)
    if out.numel():
        _run(
            "gate_residual", residual,
            out.data_ptr(), residual.data_ptr(), gate.data_ptr(), y.data_ptr(), *y.shape, DTYPES[y.dtype],
        )  # fmt: skip
    return out


def build_block_lists(
    q: torch.Tensor,
    k: torch.Tensor,
    keep: torch.Tensor,
    text_start: int,
    text_len: int,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.build_block_lists`."""
    keep = keep.contiguous()
    num_rows, num_heads, num_tokens, _ = q.shape
    num_q, num_kv = -(-num_tokens // block_q), -(-num_tokens // block_kv)
    mode = q.new_empty((num_rows, num_heads), dtype=torch.uint8)
    count = q.new_empty((num_rows, num_heads, num_q), dtype=torch.int32)
    index = q.new_empty((num_rows, num_heads, num_q, num_kv), dtype=torch.int32)
    order = q.new_empty(num_rows * num_heads * num_q, dtype=torch.int32)
    if not order.numel():
        mode.zero_()
    else:
        _run(
            "build_block_lists", q,
            mode.data_ptr(), count.data_ptr(), index.data_ptr(), order.data_ptr(), q.data_ptr(), k.data_ptr(),
            keep.data_ptr(), q.stride()[:3], k.stride()[:3], q.shape, text_start, text_len, block_q, block_kv, scale,
            DTYPES[q.dtype],
        )  # fmt: skip
    return mode, count, index, order


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.block_sparse_attention`."""
    if not q.numel():
        return reference.block_sparse_attention(
            q, k, v, mode, count, index, order, kv_len, block_q, block_kv, scale, lse
        )
    num_rows, num_heads, len_q, head_dim = q.shape
    out = q.new_empty((num_rows, len_q, num_heads, head_dim)).transpose(1, 2)
    sums = q.new_empty((num_rows, num_heads, len_q) if lse else (0,), dtype=torch.float32)
    lists = (mode, count, index, order, kv_len)
    _attend(out, sums if lse else None, q, k, v, lists, (block_q, block_kv), scale, False)
    return out, sums


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
) -> None:
    """As `reference.block_sparse_attention_`."""
    lists = (mode, count, index, order, kv_len)
    if not q.numel():
        reference.block_sparse_attention_(out, lse, q, k, v, *lists, block_q, block_kv, scale)
        return
    checks.expect_attention_apart(out, lse, q, k, v)
    increment_version([out] if lse is None else [out, lse])
    _attend(out, lse, q, k, v, lists, (block_q, block_kv), scale, True)


def _attend(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: tuple[torch.Tensor | None, ...],
    blocks: tuple[int, int],
    scale: float,
    allow_skip: bool,
) -> None:
    mode, count, index, order, kv_len = lists
    assert mode is not None
    mode = mode.contiguous()
    order, kv_len = (None if t is None else t.contiguous() for t in (order, kv_len))
    # The lists may be expanded over rows and heads: only the last dimension is made contiguous.
    count, index = (
        t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
        for t in (count, index)
    )
    no_strides = (0, 0, 0)
    _run(
        "block_sparse_attention", q,
        out.data_ptr(), _address(lse), q.data_ptr(), k.data_ptr(), v.data_ptr(), mode.data_ptr(),
        _address(count), _address(index), _address(order), _address(kv_len),
        out.stride()[:3], q.stride()[:3], k.stride()[:3], v.stride()[:3],
        no_strides if index is None else index.stride()[:3],
        no_strides[:2] if count is None else count.stride()[:2],
        (*q.shape[:3], k.shape[2], q.shape[3]), *blocks, 0 if index is None else index.shape[-1], scale, allow_skip,
        DTYPES[q.dtype],
    )  # fmt: skip

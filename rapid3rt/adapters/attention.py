# SPDX-License-Identifier: Apache-2.0
"""What the sparse attention processors of all families share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rapid3rt import ops
from rapid3rt.adapters.base import SparseRows
from rapid3rt.planning import sparsity

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


NOT_STOCK = "no attention processor of the transformer is the stock one"


class SparseProcessor:
    """Base of the families' processors: block-sparse on the thread that put it there, the stock one on others.

    Modules are shared: another thread may be running a pipeline of its own on them.
    """

    def __init__(self, rows: SparseRows, stock: Any) -> None:
        self.rows, self.stock, self._owner = rows, stock, threading.get_ident()

    def is_foreign_thread(self) -> bool:
        """Whether the caller is not who opened the window."""
        return threading.get_ident() != self._owner


@contextmanager
def exchanged_processors(
    modules: Sequence[Any],
    processor: Callable[[SparseRows, Any], SparseProcessor],
    rows: SparseRows,
) -> Iterator[None]:
    """Put our processor into each module while the context is open. Caller holds the model's lock."""
    stock = [module.processor for module in modules]
    try:
        for module, own in zip(modules, stock, strict=True):
            module.processor = processor(rows, own)
        yield
    finally:
        for module, own in zip(modules, stock, strict=True):
            module.processor = own


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: SparseRows,
    text_start: int,
    num_text: int,
    dense: Dense,
) -> torch.Tensor:
    """Attention whose first rows are dense and whose other rows are block-sparse.

    q, k, v: `[R, H, N, K]`, image and text tokens joined; text at `text_start`, `num_text` tokens, first or last.
    dense: the model's own attention on the same layout. Returns `[R, H, N, K]`.
    """
    first = rows.num_dense
    out = block_sparse(q[first:], k[first:], v[first:], rows, text_start, num_text)
    return torch.cat([dense(q[:first], k[:first], v[:first]), out]) if first else out


def block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: SparseRows,
    text_start: int,
    num_text: int,
    kv_len: torch.Tensor | None = None,
) -> torch.Tensor:
    """Block-sparse attention of the rows behind the dense ones, as in `attend`.

    kv_len: int32 `[R]`, keys beyond it are not seen; None: all are.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):  # as the model's own attention does
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    block, num_tokens = rows.block, q.shape[2]
    # A block that touches text is a text block, so the seam counts against the image.
    image_blocks = -(-num_tokens // block)
    if num_text:
        image_blocks -= -(-(text_start + num_text) // block) - text_start // block
    levels = rows.levels[rows.num_dense :]
    keep = [sparsity.kept_blocks(level, image_blocks) for level in levels]
    keep_rows = torch.tensor(keep, dtype=torch.int32, device=q.device)
    scale = q.shape[-1] ** -0.5
    mode, count, index, order = ops.build_block_lists(
        q, k, keep_rows, text_start, num_text, block, block, scale, backend=rows.backend
    )
    out, _ = ops.block_sparse_attention(
        q, k, v, mode, count, index, order, kv_len, block, block, scale, backend=rows.backend
    )
    return out

# SPDX-License-Identifier: Apache-2.0
"""Every op in plain PyTorch: the specification that kernels are held to, and the backend of last resort.

Arithmetic runs in float32 (float64 for float64 inputs) and is rounded to the dtype once, at the end. Ids are checked
on the CPU only: on a GPU that would be a host read, and under torch.compile a graph break.
Letters: R rows, S slots, O orders, I tokens, D width, H heads, N tokens, K head dim, Mq / Mk query / key blocks.
"""

from __future__ import annotations

import torch

from rapid3rt.ops import checks

DENSE, LIST, SKIP = 0, 1, 2


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `x[rows]`.

    Parameters
    ----------
    x: `[T, ...]`, any dtype. rows: int32 `[R]`, each in [0, T).

    Returns
    -------
    `[R, ...]`, contiguous.

    Raises
    ------
    ValueError: an id outside the range (CPU).
    """
    _check_ids("rows", rows, x.shape[0], unique=False)
    return x.index_select(0, rows)


def scatter_rows(out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
    """Do `out[rows] = x`; other rows of `out` keep their bytes.

    Parameters
    ----------
    out: `[T, ...]` contiguous, any dtype, written. x: `[R, ...]`. rows: int32 `[R]`, unique, each in [0, T).

    Raises
    ------
    ValueError: an id outside the range or twice (CPU); x or rows within the memory of out.
    """
    checks.expect_apart("out", out, x=x, rows=rows)
    _check_ids("rows", rows, out.shape[0], unique=True)
    out.index_copy_(0, rows.long(), x)


def cache_lookup(
    embedded: torch.Tensor, slots: torch.Tensor, slot: torch.Tensor, coef: torch.Tensor
) -> torch.Tensor:
    """Return `embedded + sum over o of coef[:, o] * slots[slot, o]`, summed in the order of o.

    Parameters
    ----------
    embedded: `[R, I, D]`. slots: `[S, O, I, D]`, same dtype. slot: int32 `[R]`. coef: float32 `[R, O]`; an order
    whose coefficient is 0 is not read.

    Returns
    -------
    `[R, I, D]`, contiguous.

    Raises
    ------
    ValueError: a slot outside the range (CPU).
    """
    return _lookup(embedded, slots, slot, coef).to(embedded.dtype)


def cache_lookup_norm(
    embedded: torch.Tensor,
    slots: torch.Tensor,
    slot: torch.Tensor,
    coef: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Return `norm(x) (1 + scale) + shift` of `x = cache_lookup(...)` kept in float32; norm is LayerNorm over D.

    Parameters
    ----------
    embedded, slots, slot, coef: as in `cache_lookup`. scale, shift: `[R, D]`. eps: added to the variance.
    """
    normed = _norm(_lookup(embedded, slots, slot, coef), eps, rms=False)
    return _modulate(normed, scale, shift).to(embedded.dtype)


def cache_store(
    slots: torch.Tensor,
    out: torch.Tensor,
    embedded: torch.Tensor,
    slot: torch.Tensor,
    gap: torch.Tensor,
) -> torch.Tensor:
    """Keep the residual `r = out - embedded` and its finite differences in the slots of some rows.

    Order 0 becomes r, order 1 `(r - old r) / gap`, order 2 `(new order 1 - old order 1) / gap`, and so on. Where gap
    is 0 nothing old is read, and higher orders become 0.

    Parameters
    ----------
    slots: `[S, O, I, D]` contiguous, written. out, embedded: `[R, I, D]`, same dtype. slot: int32 `[R]`, unique.
    gap: float32 `[R]`, distance in sigma to the row's previous compute, 0 where there is none.

    Returns
    -------
    float32 `[R, 3]`: drift = mean|r - old r| / mean|old r| (0 where gap is 0), mean and standard deviation
    (population) of r. All 0 where there are no values, I or D being 0.

    Raises
    ------
    ValueError: a slot outside the range or twice (CPU); another tensor within the memory of slots.
    """
    checks.expect_apart("slots", slots, out=out, embedded=embedded, slot=slot, gap=gap)
    _check_ids("slot", slot, slots.shape[0], unique=True)
    work = torch.promote_types(out.dtype, torch.float32)
    r = out.to(work) - embedded.to(work)
    mean = r.mean((1, 2))
    std = (r - mean[:, None, None]).square().mean((1, 2)).sqrt()
    known = (gap != 0)[:, None, None]
    wide_gap = torch.where(
        known, gap[:, None, None].to(work), torch.ones((), dtype=work, device=gap.device)
    )
    where = slot.long()
    old = torch.where(
        known[:, None], slots[where].to(work), torch.zeros((), dtype=work, device=out.device)
    )
    old_size = old[:, 0].abs().mean((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    drift = torch.where(
        gap != 0, (r - old[:, 0]).abs().mean((1, 2)) / old_size, torch.zeros_like(mean)
    )
    value = r
    for order in range(slots.shape[1]):
        slots[where, order] = value.to(slots.dtype)
        value = torch.where(known, (value - old[:, order]) / wide_gap, torch.zeros_like(value))
    stats = torch.stack((drift, mean, std), dim=1).float()
    return stats if r.numel() else torch.zeros_like(stats)


def norm_modulate(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
) -> torch.Tensor:
    """Return `(norm(x) weight + bias) (1 + scale) + shift`, norm over D: LayerNorm, or RMS norm if `rms`.

    Parameters
    ----------
    x: `[R, I, D]`. scale, shift: `[R, D]`. weight, bias: `[D]` or None. All of one dtype. eps: added to the variance
    (mean square).
    """
    normed = _norm(x.to(torch.promote_types(x.dtype, torch.float32)), eps, rms)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return _modulate(normed, scale, shift).to(x.dtype)


def gate_residual(residual: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return `residual + gate y`. residual, y: `[R, I, D]`; gate: `[R, D]`; one dtype."""
    work = torch.promote_types(y.dtype, torch.float32)
    return (residual.to(work) + gate.to(work)[:, None] * y.to(work)).to(y.dtype)


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
    """Choose, for each query block, the key blocks with the largest `scale * mean(q) . mean(k)`.

    A block that touches a text token is a text block: a key of every query block, and dense as a query block.

    Parameters
    ----------
    q, k: `[R, H, N, K]`, joint tokens. keep: int32 `[R]`, image key blocks per image query block; at least all of
    them makes the row dense. text_start, text_len: where text tokens lie. block_q, block_kv: tokens per block.

    Returns
    -------
    mode uint8 `[R, H]`, count int32 `[R, H, Mq]`, index int32 `[R, H, Mq, Mk]` (the first `count` ascending are the
    list, the other blocks follow ascending), order int32 `[R H Mq]`: work ids by falling count, ties by id.
    Ties of scores take the lower block.
    """
    num_rows, num_heads, num_tokens, _ = q.shape
    q_text = _text_blocks(num_tokens, block_q, text_start, text_len, q.device)
    k_text = _text_blocks(num_tokens, block_kv, text_start, text_len, q.device)
    dense = (keep >= (~k_text).sum())[:, None].expand(num_rows, num_heads)
    scores = scale * _block_means(q, block_q) @ _block_means(k, block_kv).mT
    scores = torch.where(scores.isnan() | k_text, -torch.inf, scores)
    # Text blocks stay out of the ranking even where an image block scores -inf.
    ranking = _stable_argsort(scores, k_text)
    rank = torch.argsort(ranking, dim=-1)
    listed = (rank < keep.clamp_min(0)[:, None, None, None]) | k_text
    listed = listed | q_text[:, None] | dense[:, :, None, None]
    count = listed.sum(-1, dtype=torch.int32)
    index = torch.argsort((~listed).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    order = torch.argsort(-count.flatten(), stable=True).to(torch.int32)
    return torch.where(dense, DENSE, LIST).to(torch.uint8), count, index, order


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
    """Attention in which each query block sees a list of key blocks: softmax(scale q k^T) v over the listed keys.

    Parameters
    ----------
    q: `[R, H, Nq, K]`. k, v: `[R, H, Nk, K]`. Last stride 1, other strides multiples of 16 bytes.
    mode: uint8 `[R, H]`, 0 dense, 1 list. count: int32 `[R, H, Mq]`. index: int32 `[R, H, Mq, S]`, ascending, not
    read beyond count. Both may be expanded over R and H, and None where all modes are 0.
    order: int32 `[R H Mq]`, in which order tiles are worked on; None: by id. Never changes the result.
    kv_len: int32 `[R]`, keys beyond it are not read. block_q, block_kv: tokens per block. lse: also return it.

    Returns
    -------
    out `[R, H, Nq, K]`, a transposed view of contiguous `[R, Nq, H, K]`; a query without keys gives 0.
    lse float32 `[R, H, Nq]`, natural log of the sum of exp of scaled logits, -inf without keys; empty if not asked.

    Raises
    ------
    ValueError: lists out of range, or mode 2 (CPU).
    """
    num_rows, num_heads, len_q, head_dim = q.shape
    out = q.new_empty((num_rows, len_q, num_heads, head_dim)).transpose(1, 2)
    sums = _float32_empty(q, (num_rows, num_heads, len_q) if lse else (0,))
    refuse_skip(mode)
    lists = (mode, count, index, order, kv_len)
    block_sparse_attention_(out, sums if lse else None, q, k, v, *lists, block_q, block_kv, scale)
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
    """Write `block_sparse_attention` into out and lse. Heads of mode 2 (skip) keep their bytes.

    Parameters
    ----------
    out: `[R, H, Nq, K]`, last stride 1, written. lse: float32 `[R, H, Nq]` contiguous or None, written. The others
    as in `block_sparse_attention`.

    Raises
    ------
    ValueError: lists out of range (CPU); one of q, k, v, lse within the memory of out or lse.
    """
    checks.expect_attention_apart(out, lse, q, k, v)
    check_lists(mode, count, index, order, kv_len, -(-k.shape[2] // block_kv), k.shape[2])
    work = torch.promote_types(q.dtype, torch.float32)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            listed = (
                None if count is None or index is None else (count[row, head], index[row, head])
            )
            allowed = _allowed_keys(
                mode[row, head], listed, None if kv_len is None else kv_len[row],
                (q.shape[2], k.shape[2]), (block_q, block_kv),
            )  # fmt: skip
            read = allowed.any(0)[:, None]
            keys = torch.where(read, k[row, head].to(work), 0.0)
            values = torch.where(read, v[row, head].to(work), 0.0)
            logits = torch.where(allowed, (q[row, head].to(work) * scale) @ keys.T, -torch.inf)
            sums = torch.logsumexp(logits, dim=-1)
            safe = torch.where(sums == -torch.inf, 0.0, sums)
            result = (torch.exp(logits - safe[:, None]) @ values).to(out.dtype)
            keep = mode[row, head] == SKIP
            out[row, head] = torch.where(keep, out[row, head], result)
            if lse is not None:
                lse[row, head] = torch.where(keep, lse[row, head], sums.to(lse.dtype))


def _allowed_keys(
    mode: torch.Tensor,
    listed: tuple[torch.Tensor, torch.Tensor] | None,
    kv_len: torch.Tensor | None,
    tokens: tuple[int, int],
    blocks: tuple[int, int],
) -> torch.Tensor:
    """Which keys each query of one head sees: bool `[Nq, Nk]`."""
    num_q, num_kv = (-(-n // block) for n, block in zip(tokens, blocks, strict=True))
    seen = (mode != LIST).expand(num_q, num_kv)
    if listed is not None:
        count, index = listed
        in_list = torch.arange(index.shape[-1], device=index.device) < count[:, None]
        # Entries beyond count may be anything: they go to a column that is cut off.
        chosen = torch.where(in_list, index, num_kv).long()
        marks = torch.zeros(num_q, num_kv + 1, dtype=torch.bool, device=index.device)
        seen = seen | marks.scatter(1, chosen, True)[:, :num_kv]
    allowed = seen.repeat_interleave(blocks[0], 0)[: tokens[0]]
    allowed = allowed.repeat_interleave(blocks[1], 1)[:, : tokens[1]]
    if kv_len is not None:
        allowed = allowed & (torch.arange(tokens[1], device=allowed.device) < kv_len)
    return allowed


def _lookup(
    embedded: torch.Tensor, slots: torch.Tensor, slot: torch.Tensor, coef: torch.Tensor
) -> torch.Tensor:
    _check_ids("slot", slot, slots.shape[0], unique=False)
    total = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
    for order in range(slots.shape[1]):
        c = coef[:, order, None, None]
        term = slots[:, order].index_select(0, slot).to(total.dtype)
        total = torch.where(c == 0, total, total + c * term)
    return total


def _norm(x: torch.Tensor, eps: float, rms: bool) -> torch.Tensor:
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _modulate(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    wide_scale, wide_shift = scale.to(normed.dtype)[:, None], shift.to(normed.dtype)[:, None]
    return normed * (1 + wide_scale) + wide_shift


def _text_blocks(
    num_tokens: int, block: int, text_start: int, text_len: int, device: torch.device
) -> torch.Tensor:
    """Which blocks touch a text token: bool `[M]`."""
    begin = torch.arange(-(-num_tokens // block), device=device) * block
    touches = (begin < text_start + text_len) & (text_start < (begin + block).clamp_max(num_tokens))
    return touches & (text_len > 0)


def _block_means(x: torch.Tensor, block: int) -> torch.Tensor:
    """Means over the valid tokens of each block: `[R, H, M, K]`."""
    num_tokens = x.shape[2]
    num_blocks = -(-num_tokens // block)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = torch.nn.functional.pad(wide, (0, 0, 0, num_blocks * block - num_tokens))
    sizes = (num_tokens - torch.arange(num_blocks, device=x.device) * block).clamp_max(block)
    blocks = padded.reshape(*x.shape[:2], num_blocks, block, x.shape[3])
    return blocks.sum(3) / sizes[:, None]


def _stable_argsort(scores: torch.Tensor, is_last: torch.Tensor) -> torch.Tensor:
    """Blocks by falling score, ties by id, those of `is_last` at the end."""
    ranking = torch.argsort(scores, dim=-1, descending=True, stable=True)
    last = is_last.to(torch.uint8)[ranking]
    return ranking.gather(-1, torch.argsort(last, dim=-1, stable=True))


def _float32_empty(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _can_read(x: torch.Tensor) -> bool:
    """Whether reading values costs no synchronisation and breaks no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_ids(name: str, ids: torch.Tensor, limit: int, *, unique: bool) -> None:
    if not _can_read(ids):
        return
    bad = ((ids < 0) | (ids >= limit)).nonzero().flatten()
    if len(bad):
        at = int(bad[0])
        raise ValueError(f"{name} must be in [0, {limit}), got {int(ids[at])} at position {at}")
    if unique:
        kept, times = ids.unique(return_counts=True)
        if bool((times > 1).any()):
            raise ValueError(f"{name} must be unique, got {int(kept[times > 1][0])} twice")


def refuse_skip(mode: torch.Tensor) -> None:
    """Raise ValueError where a mode is 2 (CPU): the functional form has no bytes to keep."""
    if _can_read(mode) and bool((mode == SKIP).any()):
        raise ValueError(
            "mode must be 0 or 1 in the functional form, got 2 (skip); use block_sparse_attention_"
        )


def check_lists(
    mode: torch.Tensor,
    count: torch.Tensor | None,
    index: torch.Tensor | None,
    order: torch.Tensor | None,
    kv_len: torch.Tensor | None,
    num_kv: int,
    len_kv: int,
) -> None:
    """Raise ValueError where what attention reads of its lists is out of range (CPU). num_kv: Mk, len_kv: Nk."""
    if not _can_read(mode):
        return
    if order is not None:  # only tells kernels where to begin
        _check_ids("order", order, order.shape[0], unique=True)
    if kv_len is not None and bool(((kv_len < 0) | (kv_len > len_kv)).any()):
        raise ValueError(f"kv_len must be in [0, {len_kv}], got {kv_len.tolist()}")
    if bool((mode > SKIP).any()):
        raise ValueError(f"mode must be 0, 1 or 2, got {int(mode.max())}")
    is_list = mode == LIST
    if not bool(is_list.any()):
        return
    if count is None or index is None:
        raise ValueError("count and index must be given where a mode is 1, got none")
    counts, lists = count[is_list], index[is_list]
    if bool(((counts < 0) | (counts > index.shape[-1])).any()):
        raise ValueError(
            f"count must be in [0, {index.shape[-1]}], got {int(counts.min())} to {int(counts.max())}"
        )
    in_list = torch.arange(index.shape[-1], device=index.device) < counts[..., None]
    wrong = (lists < 0) | (lists >= num_kv)
    wrong[..., 1:] |= lists[..., 1:] <= lists[..., :-1]
    if bool((wrong & in_list).any()):
        raise ValueError(
            f"index must be ascending in [0, {num_kv}), got {int(lists[wrong & in_list][0])}"
        )

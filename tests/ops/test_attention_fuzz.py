# SPDX-License-Identifier: Apache-2.0
"""Random attention calls on every instruction set: shapes, lists, modes, lengths, and poison in all that none names.

FUZZ_CASES sets how many calls are made; CI makes 2,000.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_calls import ISAS, forced, masked_sdpa, widen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rapid3rt import ops
from rapid3rt.ops import reference
from rapid3rt.testing.attention import listed_mask, lists_of
from rapid3rt.testing.cases import DTYPES
from rapid3rt.testing.numerics import assert_same_bits, poison_

NUM_CASES = int(os.environ.get("FUZZ_CASES", "2000"))
MASKS = ("bernoulli", "banded", "arrow", "one block", "one row works", "empty", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a random call looks like; the seed fills in the numbers. rise: of the last keys over the first ones."""

    seed: int
    isa: str
    dtype: torch.dtype
    block: int
    head_dim: int
    rows: int
    heads: int
    len_q: int
    len_kv: int
    mask: str
    density: float
    ragged: bool
    gain: float
    rise: float


CALLS = st.builds(
    Call,
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from((32, 64, 128)),
    head_dim=st.sampled_from((64, 128, 32, 8, 16, 40, 72, 136)),
    rows=st.integers(1, 3),
    heads=st.integers(1, 2),
    len_q=st.integers(1, 200),
    len_kv=st.one_of(st.integers(1, 300), st.integers(300, 800)),
    mask=st.sampled_from(MASKS),
    density=st.sampled_from((0.02, 0.1, 0.3, 0.6, 0.9, 1.0)),
    ragged=st.booleans(),
    gain=st.sampled_from((1.0, 1.0, 30.0, -2.0)),
    rise=st.sampled_from((1.0, 1.0, 20.0)),
)


def listed_blocks(call: Call, g: torch.Generator, num_q: int, num_kv: int) -> torch.Tensor:
    """Which key blocks each query block sees: bool `[R, H, Mq, Mk]`."""
    shape = (call.rows, call.heads, num_q, num_kv)
    i = torch.arange(num_q)[:, None] * num_kv // max(num_q, 1)
    j = torch.arange(num_kv)[None]
    if call.mask == "banded":
        return ((i - j).abs() <= 1).expand(shape)
    if call.mask == "arrow":
        return ((i == j) | (j == 0) | (i == 0)).expand(shape)
    if call.mask == "one block":
        return torch.randint(0, num_kv, (*shape[:3], 1), generator=g) == j
    if call.mask == "one row works":
        return (torch.arange(call.rows) == call.rows - 1)[:, None, None, None].expand(shape)
    if call.mask == "bernoulli":
        return torch.rand(shape, generator=g) < call.density
    return torch.full(shape, call.mask == "full")


def make_arguments(call: Call) -> tuple[Any, ...]:
    """The call's arguments, clean; modes are 0, 1 and 2 at random."""
    g = torch.Generator().manual_seed(call.seed)
    num_q, num_kv = -(-call.len_q // call.block), -(-call.len_kv // call.block)
    q, k, v = (
        torch.randn(call.rows, n, call.heads, call.head_dim, generator=g).to(call.dtype).transpose(1, 2)
        for n in (call.len_q, call.len_kv, call.len_kv)
    )  # fmt: skip
    k = (k * torch.linspace(1, call.rise, call.len_kv)[:, None]).to(call.dtype)
    count, index = lists_of(listed_blocks(call, g, num_q, num_kv))
    mode = torch.randint(0, 6, (call.rows, call.heads), generator=g)
    mode = torch.tensor([1, 1, 1, 1, 0, 2], dtype=torch.uint8)[mode]
    order = torch.randperm(count.numel(), generator=g).int()
    kv_len = None
    if call.ragged:
        kv_len = torch.randint(0, call.len_kv + 1, (call.rows,), generator=g).int()
    scale = call.gain * call.head_dim**-0.5
    return q, k, v, mode, count, index, order, kv_len, call.block, call.block, scale


def poison_unread(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call with poison in every key, value and list entry that it must not read."""
    q, k, v, mode, count, index, order, kv_len, block, block_kv, scale = arguments
    k, v, index = k.clone(), v.clone(), index.clone()
    read = listed_mask(arguments).any(2)
    keys = read.repeat_interleave(block_kv, 2)[..., : k.shape[2]]
    if kv_len is not None:
        keys = keys & (torch.arange(k.shape[2]) < kv_len[:, None, None])
    k[~keys], v[~keys] = torch.nan, torch.nan
    index[torch.arange(index.shape[-1]) >= count[..., None]] = 2**31 - 1
    return q, k, v, mode, count, index, order, kv_len, block, block_kv, scale


def run(arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, mode = arguments[:4]
    out, lse = poison_(torch.empty_like(q)), poison_(torch.empty(q.shape[:3]))
    ops.block_sparse_attention_(out, lse, q, k, v, mode, *arguments[4:], backend="native")
    return out, lse


def check(call: Call) -> None:
    """As exact as SDPA, the same bits with poison around and another order of work; skipped heads untouched."""
    arguments = make_arguments(call)
    with forced(call.isa):
        out, lse = run(poison_unread(arguments))
        again = run((*arguments[:6], None, *arguments[7:]))
    assert_same_bits("poison and order", out, again[0])
    assert_same_bits("poison and order, lse", lse, again[1])
    mode = arguments[3]
    skipped = mode == 2
    assert out[skipped].isnan().all()
    assert lse[skipped].isnan().all()
    plain = (*arguments[:3], torch.where(skipped, 0, mode).byte(), *arguments[4:])
    computed = ~skipped
    if not computed.any():
        return
    truth, truth_lse = reference.block_sparse_attention(*widen(plain), lse=True)
    rival = masked_sdpa(plain)
    bound = 2 * largest_error(rival, truth) + 2 * largest_error(truth.to(out.dtype), truth)
    # Of a few queries PyTorch may happen to round all well. What any float kernel may lose: a logit is a sum of
    # head_dim products, off by sqrt(head_dim) roundings of the sum of their sizes (Higham and Mary, 2019, A New
    # Approach to Probabilistic Rounding Error Analysis), however small it is itself; its weight is off by as much.
    q, k, v = (t.double() for t in arguments[:3])
    terms = float((q.abs() @ k.abs().mT).max()) * abs(arguments[-1])
    logit_error = call.head_dim**0.5 * 2**-24 * terms
    bound += (2**-23 + logit_error) * float(v.abs().max())
    assert bool(out[computed].isfinite().all())
    assert largest_error(out[computed], truth[computed]) <= bound
    lse, truth_lse = lse[computed].double(), truth_lse[computed]
    torch.testing.assert_close(lse, truth_lse, rtol=1e-5, atol=1e-5 + logit_error)


def largest_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.to(truth.dtype) - truth).abs().max())


@pytest.mark.slow
@settings(
    max_examples=NUM_CASES,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(call=CALLS)
def test_random_calls(call: Call) -> None:
    check(call)

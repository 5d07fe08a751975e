# SPDX-License-Identifier: Apache-2.0
"""The specification against formulas written with loops, one element or one query at a time."""

from __future__ import annotations

import math

import pytest
import torch

from rapid3rt.ops import reference
from rapid3rt.testing.cases import Case, cases_of


def small(*ops: str) -> list[Case]:
    return [case for case in cases_of(*ops) if not case.bench]


@pytest.mark.parametrize("case", small("gather_rows"), ids=str)
def test_gather_takes_rows(case: Case) -> None:
    x, rows = case.arguments(torch.float64)
    got = reference.gather_rows(x, rows)
    assert got.shape == (len(rows), *x.shape[1:])
    assert all(torch.equal(got[i], x[int(row)]) for i, row in enumerate(rows))


@pytest.mark.parametrize("case", small("scatter_rows"), ids=str)
def test_scatter_writes_its_rows_and_no_other(case: Case) -> None:
    out, x, rows = case.arguments(torch.float64)
    before = out.clone()
    reference.scatter_rows(out, x, rows)
    written = {int(row): i for i, row in enumerate(rows)}
    for row in range(len(out)):
        expected = x[written[row]] if row in written else before[row]
        assert torch.equal(out[row], expected)


@pytest.mark.parametrize("case", small("cache_lookup"), ids=str)
def test_lookup_adds_orders(case: Case) -> None:
    embedded, slots, slot, coef = case.arguments(torch.float64)
    got = reference.cache_lookup(embedded, slots, slot, coef)
    for row in range(len(embedded)):
        expected = embedded[row].clone()
        for order in range(slots.shape[1]):
            expected += float(coef[row, order]) * slots[int(slot[row]), order]
        torch.testing.assert_close(got[row], expected)


def test_lookup_never_reads_an_order_of_coefficient_zero() -> None:
    embedded, slots = torch.ones(1, 2, 3), torch.ones(1, 2, 2, 3)
    slots[:, 1] = float("nan")
    got = reference.cache_lookup(embedded, slots, torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    assert torch.equal(got, torch.full((1, 2, 3), 2.0))


@pytest.mark.parametrize("case", small("cache_lookup_norm"), ids=str)
def test_lookup_norm_is_layer_norm_with_modulation(case: Case) -> None:
    embedded, slots, slot, coef, scale, shift, eps = case.arguments(torch.float64)
    got = reference.cache_lookup_norm(embedded, slots, slot, coef, scale, shift, eps)
    x = reference.cache_lookup(embedded, slots, slot, coef)
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    torch.testing.assert_close(got, normed * (1 + scale[:, None]) + shift[:, None])


def test_store_keeps_differences_of_three_computes() -> None:
    torch.manual_seed(0)
    residuals = torch.randn(3, 1, 4, 5, dtype=torch.float64)
    slots = torch.full((2, 3, 4, 5), float("nan"), dtype=torch.float64)
    slot, embedded = torch.tensor([1], dtype=torch.int32), torch.randn(1, 4, 5, dtype=torch.float64)
    stats = [
        reference.cache_store(slots, embedded + r, embedded, slot, torch.tensor([gap]))
        for r, gap in zip(residuals, (0.0, 0.5, 0.25), strict=True)
    ]
    first = (residuals[1] - residuals[0]) / 0.5
    second = (residuals[2] - residuals[1]) / 0.25
    torch.testing.assert_close(slots[1, 0], residuals[2, 0])
    torch.testing.assert_close(slots[1, 1], second[0])
    torch.testing.assert_close(slots[1, 2], ((second - first) / 0.25)[0])
    assert slots[0].isnan().all()
    drift = (residuals[2] - residuals[1]).abs().mean() / residuals[1].abs().mean()
    r = residuals[2]
    expected = torch.stack((drift, r.mean(), r.std(correction=0)))[None].float()
    torch.testing.assert_close(stats[2], expected)
    assert float(stats[0][0, 0]) == 0.0


@pytest.mark.parametrize("case", small("norm_modulate"), ids=str)
def test_modulate_is_norm_weight_bias_scale_shift(case: Case) -> None:
    x, scale, shift, weight, bias, eps, rms = case.arguments(torch.float64)
    got = reference.norm_modulate(x, scale, shift, weight, bias, eps, rms)
    norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
    normed = norm(x, x.shape[-1:], eps=eps)
    normed = normed * (1 if weight is None else weight) + (0 if bias is None else bias)
    torch.testing.assert_close(got, normed * (1 + scale[:, None]) + shift[:, None])


@pytest.mark.parametrize("case", small("gate_residual"), ids=str)
def test_gate_multiplies_per_row(case: Case) -> None:
    residual, gate, y = case.arguments(torch.float64)
    got = reference.gate_residual(residual, gate, y)
    torch.testing.assert_close(
        got, torch.stack([r + g * v for r, g, v in zip(residual, gate, y, strict=True)])
    )


@pytest.mark.parametrize("case", small("build_block_lists"), ids=str)
def test_lists_hold_text_and_the_best_image_blocks(case: Case) -> None:
    q, k, keep, text_start, text_len, block, _, scale = case.arguments(torch.float64)
    mode, count, index, order = reference.build_block_lists(
        q, k, keep, text_start, text_len, block, block, scale
    )
    num_tokens = q.shape[2]
    blocks = [range(b, min(b + block, num_tokens)) for b in range(0, num_tokens, block)]
    text = [any(text_start <= token < text_start + text_len for token in b) for b in blocks]
    image = [b for b in range(len(blocks)) if not text[b]]
    costs = []
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            dense = int(keep[row]) >= len(image)
            assert int(mode[row, head]) == (0 if dense else 1)
            for m, queries in enumerate(blocks):
                mean_q = q[row, head, list(queries)].mean(0)
                scores = {b: float(mean_q @ k[row, head, list(blocks[b])].mean(0)) for b in image}
                best = sorted(image, key=lambda b: (-round(scores[b], 9), b))[: int(keep[row])]
                listed = sorted({*best, *(b for b in range(len(blocks)) if text[b])})
                if dense or text[m]:
                    listed = list(range(len(blocks)))
                size = int(count[row, head, m])
                assert index[row, head, m, :size].tolist() == listed
                assert sorted(index[row, head, m].tolist()) == list(range(len(blocks)))
                costs.append(size)
    assert order.tolist() == sorted(range(len(costs)), key=lambda item: (-costs[item], item))


@pytest.mark.parametrize("case", small("block_sparse_attention"), ids=str)
def test_attention_is_softmax_over_the_listed_keys(case: Case) -> None:
    q, k, v, mode, count, index, order, kv_len, block, _, scale, _ = case.arguments(torch.float64)
    out, lse = reference.block_sparse_attention(
        q, k, v, mode, count, index, order, kv_len, block, block, scale, True
    )
    num_keys = k.shape[2]
    for row, head in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        limit = num_keys if kv_len is None else int(kv_len[row])
        for query in range(0, q.shape[2], 7):
            m = query // block
            keys = list(range(limit))
            if int(mode[row, head]) == 1:
                listed = index[row, head, m, : int(count[row, head, m])].tolist()
                keys = [key for key in keys if key // block in listed]
            logits = [scale * float(q[row, head, query] @ k[row, head, key]) for key in keys]
            if not keys:
                assert not out[row, head, query].any()
                assert float(lse[row, head, query]) == -math.inf
                continue
            top = max(logits)
            weights = torch.tensor([math.exp(x - top) for x in logits], dtype=torch.float64)
            expected = (weights[:, None] * v[row, head, keys]).sum(0) / weights.sum()
            torch.testing.assert_close(out[row, head, query], expected)
            assert float(lse[row, head, query]) == pytest.approx(
                top + math.log(float(weights.sum()))
            )

# SPDX-License-Identifier: Apache-2.0
"""What shows whether a discriminator is worth its reward: how well it tells pictures apart, at how many evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def auc(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Probability that a full picture's logit is above an accelerated one's, ties counting half.

    The exact rank statistic of Mann and Whitney. real `[n]`, fake `[m]`. NaN where either is empty.
    """
    if not len(real) or not len(fake):
        return math.nan
    ordered = fake.sort().values
    below = torch.searchsorted(ordered, real.contiguous())
    not_above = torch.searchsorted(ordered, real.contiguous(), right=True)
    return int((below + not_above).sum()) / (2 * len(real) * len(fake))


def paired(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Share of pairs `[n]` whose full picture has the higher logit, ties counting half; NaN for none.

    What a group sees of the discriminator: its members share prompt and noise, so what lies between prompts cancels.
    """
    return float(((real > fake).double() + (real >= fake).double()).mean() / 2)


def accuracy(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Share of logits on the right side of 0, both classes of equal weight; 0 itself is on neither side."""
    return float(((real > 0).double().mean() + (fake < 0).double().mean()) / 2)


def bin_of(nfe: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """Bin of a number of evaluations, int64 `[n]`: the first whose upper edge it does not exceed, else the last."""
    return torch.bucketize(nfe, torch.tensor(edges)).clamp(max=len(edges) - 1)


def by_nfe(
    measure: Callable[[torch.Tensor, torch.Tensor], float],
    real: torch.Tensor,
    fake: torch.Tensor,
    nfe: torch.Tensor,
    edges: Sequence[int],
) -> dict[int, float]:
    """A measure of every bin that has pairs, by upper edge, rising. real, fake: logits of pairs `[n]`."""
    bins = bin_of(nfe, edges)
    return {
        edge: measure(real[bins == i], fake[bins == i])
        for i, edge in enumerate(edges)
        if bool((bins == i).any())
    }

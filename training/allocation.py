# SPDX-License-Identifier: Apache-2.0
"""Fit the allocation head: how many evaluations each image gets, from what every number of them is known to be worth.

The bank holds the error of every pair at several numbers of evaluations, so nothing has to be sampled (METHOD.md,
section 2, has this as a bandit with full information). Two steps, because the mean error hangs on a few images and a
fit of many weights to it learns those by heart (measured: 1.1 times the error without a head on held-out pairs): many
weights are regressed on log error, where every pair says as much as another; then one strength for every dial is chosen
by the mean error that it gives.

Shape letters: n pairs, K tabulated numbers of evaluations, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rapid3rt.policies.allocation import limits, whole
from rapid3rt.policies.fixed import Steps
from rapid3rt.policies.heads import AllocationHead
from rapid3rt.policies.schedule import WarpFamily
from rapid3rt.types import DenoiseState, StepDecision
from training.bank import Bank, accelerated, read_file

TABLE = (3, 4, 5, 6, 8, 10, 12, 14, 17)
"""Numbers of evaluations that errors are tabulated at."""
_FOLDS = 12
_PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_STRENGTHS = tuple(0.025 * i for i in range(25))
"""Of a hardness in units of its own standard deviation, so times the spread of log error."""
_ENDS = (3.0, 1.5)
"""Exponents of the error below and above the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """conditioning: float32 `[n, D]` at the first tick. ks: rising. errors: float64 `[n, K]`."""

    conditioning: torch.Tensor
    ks: tuple[int, ...]
    errors: torch.Tensor

    @property
    def log_errors(self) -> torch.Tensor:
        """`[n, K]`."""
        return self.errors.clamp(min=1e-9).log()

    @property
    def hardness(self) -> torch.Tensor:
        """How far a pair's log error lies above the mean, over all numbers of evaluations, float64 `[n]`."""
        logs = self.log_errors
        return (logs - logs.mean(0)).mean(1)


def read_pairs(bank: Bank, family: WarpFamily) -> Pairs:
    """Measure what is needed, from the bank's folder where it was measured before."""
    ks = tuple(k for k in TABLE if k <= bank.steps)
    errors = [bank.searched(family, k).error for k in ks]
    return Pairs(
        conditioning=read_conditioning(bank), ks=ks, errors=torch.stack(errors, 1).double()
    )


class _Witness(Steps):
    """One step, in which the conditioning is noted as heads see it."""

    def __init__(self) -> None:
        super().__init__(1)
        self.seen: list[torch.Tensor] = []

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        if state.tick == 0:
            self.seen.append(state.conditioning.bfloat16().float().cpu())
        return super().decide_step(state, velocity)


def read_conditioning(bank: Bank) -> torch.Tensor:
    """The modulation embedding of every pair at the first tick, float32 `[n, D]`, rounded as heads read it."""
    path = bank.folder / "conditioning.safetensors"
    if bank.is_main and not path.exists():
        witness = _Witness()
        for start in range(0, len(bank), bank.batch_size):
            with accelerated(bank.pipe, witness):
                bank.images(range(start, min(start + bank.batch_size, len(bank))))
        bank.save({"conditioning": torch.cat(witness.seen)}, path)
    bank.wait()
    seen = read_file(path)["conditioning"]
    if not bool(seen.isfinite().all()):
        raise ValueError(
            f"conditioning of pairs must be finite, got NaN or infinity in '{path}'; delete it and use another --dtype"
        )
    return seen


def fit_head(head: AllocationHead, pairs: Pairs, ticks: int) -> dict[str, float]:
    """Fit a head in place. Returns metrics, of pairs that were held out of the fit of the hardness.

    `allocation/explained`: share of the variance of hardness. `allocation/ratio@b`: mean error over that of all images
    alike, at a mean of b; the strength is the best on these pairs, so it is at most 1. Raises ValueError for fewer than
    24 pairs.
    """
    n = len(pairs.errors)
    if n < 2 * _FOLDS:
        raise ValueError(f"pairs must be at least {2 * _FOLDS} to fit an allocation, got {n}")
    x = pairs.conditioning.double()
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    x, y = (x - mean) / spread, pairs.hardness
    penalty, predicted, explained = predict_held_out(x, y, _PENALTIES)
    scale = predicted.std().clamp(min=1e-6)
    weight = _ridge(x, y, penalty) / scale
    metrics = {"allocation/explained": explained, "allocation/penalty": penalty}
    strengths, offsets = [], []
    for dial in head.dials.tolist():
        hardness = (predicted - predicted.mean()) / scale
        strength, ratio = _choose_strength(hardness, pairs, dial, ticks)
        metrics[f"allocation/ratio@{dial:g}"] = ratio
        strengths.append(strength)
        offsets.append(_setting(strength * (x @ weight), dial, ticks) - math.log(dial))
    with torch.no_grad():
        head.mean.copy_(mean)
        head.spread.copy_(spread)
        head.hardness.weight.copy_(weight[None])
        head.strength.copy_(torch.tensor(strengths))
        head.offset.copy_(torch.tensor(offsets))
    return metrics


def planned_steps(
    head: AllocationHead, conditioning: torch.Tensor, dial: float, ticks: int
) -> torch.Tensor:
    """Even steps that each image's plan comes to at a dial, float32 `[n]`. conditioning: `[n, D]`."""
    with torch.no_grad():
        device = head.offset.device
        b = torch.full((len(conditioning),), dial, device=device)
        plans = _plans(head(conditioning.to(device), b).cpu(), math.log(dial), ticks)
    return whole(plans)


def even_steps(dial: float, ticks: int) -> int:
    """Evaluations of every image where all get the same."""
    return min(int(whole(torch.tensor(dial))), ticks)


def _ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weights `[D]` that lower |y - mean - x w|^2 + penalty |w|^2."""
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight: torch.Tensor = torch.linalg.solve(gram, x.T @ (y - y.mean()))
    return weight


def predict_held_out(
    x: torch.Tensor, y: torch.Tensor, penalties: Sequence[float]
) -> tuple[float, torch.Tensor, float]:
    """By ridge regressions on other pairs: the best penalty, its predictions `[n]`, the share of variance explained.

    x: float64 `[n, features]` of unit spread. y: float64 `[n]`.
    """
    held_out = {penalty: _predict_held_out(x, y, penalty) for penalty in penalties}
    penalty = min(held_out, key=lambda key: float((y - held_out[key]).square().sum()))
    predicted = held_out[penalty]
    explained = 1 - float((y - predicted).square().sum() / (y - y.mean()).square().sum())
    return penalty, predicted, explained


def _predict_held_out(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Every pair's hardness by the fit to the folds that it is not in."""
    predicted = torch.zeros_like(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    for fold in order.chunk(_FOLDS):
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[fold] = False
        weight = _ridge(x[rest], y[rest], penalty)
        predicted[fold] = x[fold] @ weight + y[rest].mean()
    return predicted


def _choose_strength(
    hardness: torch.Tensor, pairs: Pairs, dial: float, ticks: int
) -> tuple[float, float]:
    """The strength of the least mean error, and that error over the one of all images alike."""

    def mean_error(strength: float) -> float:
        setting = _setting(strength * hardness, dial, ticks)
        return float(_error_at(_plans(strength * hardness, setting, ticks), pairs).mean())

    errors = {strength: mean_error(strength) for strength in _STRENGTHS}
    best = min(errors, key=lambda key: errors[key])
    return best, errors[best] / errors[0.0]


def _plans(log_stretch: torch.Tensor, setting: float, ticks: int) -> torch.Tensor:
    """Evaluations of every image, as `policies.allocation` clamps them."""
    low, high = limits(math.exp(setting), ticks, is_learned=True)
    return (setting + log_stretch).exp().clamp(low, high)


def _setting(log_stretch: torch.Tensor, dial: float, ticks: int) -> float:
    """Log of the b whose clamped plans have the mean `dial`, by bisection."""
    low, high = math.log(dial) - 3, math.log(dial) + 3
    for _ in range(50):
        middle = (low + high) / 2
        above = float(_plans(log_stretch, middle, ticks).mean()) > dial
        low, high = (low, middle) if above else (middle, high)
    return low


def _error_at(evaluations: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Every pair's error at its own number of evaluations, `[n]`: log-log linear in the table, a power beyond it."""
    logs, at = pairs.log_errors, evaluations.double().log()
    ks = torch.tensor(pairs.ks, dtype=torch.float64).log()
    right = torch.searchsorted(ks, at.clamp(ks[0], ks[-1])).clamp(1, len(ks) - 1)
    rows = torch.arange(len(at))
    share = ((at - ks[right - 1]) / (ks[right] - ks[right - 1])).clamp(0, 1)
    inside = logs[rows, right - 1] * (1 - share) + logs[rows, right] * share
    beyond = _ENDS[0] * (ks[0] - at).clamp(min=0) - _ENDS[1] * (at - ks[-1]).clamp(min=0)
    return (inside + beyond).exp()

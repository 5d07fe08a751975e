# SPDX-License-Identifier: Apache-2.0
"""One policy update: scores the stored decisions again, a few times over, and never runs the generator.

The sums are over all ranks: every rank scores its own decisions, group by group, one flat reduction adds the
gradients, and a constant divides them. So ranks may hold different numbers of decisions, and dead groups weigh nothing
and are never dropped. Gradients are added up in float64: in float32 the order of sums would show, and Adam, which
divides by their size, would make a whole step of what cancels.

Shape letters: P groups and G members of this rank, N decisions of one head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from rapid3rt.policies.learned import Heads
from training import loss
from training.config import Recipe
from training.ranks import Ranks
from training.trajectory import Decisions

_SAME = 1e-3
"""What a log-probability may differ by between rollout and update, in nat: batches differ, nothing else does."""
_FIRST = 1e-5
"""The same between two scorings of one update: nothing differs, so on a CPU it is exactly 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One iteration of this rank.

    advantage: float32 `[P G]`. weight: float32 `[P G]`, 0 for a member that is missing or of a dead group, else 1 / (P
    G T) with the groups of all ranks and T ticks: length is cost, so it must not normalise.
    """

    decisions: Mapping[str, Decisions]
    advantage: torch.Tensor
    weight: torch.Tensor

    def of(self, head: str) -> Decisions | tuple[()]:
        """A head's decisions, nothing where it took none."""
        return self.decisions.get(head, ())

    def per_member(self, log_probs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sums over every trajectory, `[P G]`."""
        total = torch.zeros(len(self.advantage))
        for name, values in log_probs.items():
            total = total.index_add(0, self.decisions[name].member, values)
        return total


def update(
    heads: Heads,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    recipe: Recipe,
    coefficients: Mapping[str, float],
    ranks: Ranks,
) -> dict[str, float]:
    """Some epochs over one iteration's decisions. coefficients: of every head's entropy. Returns metrics.

    Raises RuntimeError where log-probabilities are not those of the rollout, FloatingPointError where a gradient is not
    finite.
    """
    scored = {name: _score(heads, d, recipe) for name, d in batch.decisions.items()}
    old = {name: log_prob for name, (log_prob, _) in scored.items()}
    _require_same(old, batch.decisions)
    counts = ranks.sum({name: float(len(batch.of(name))) for name in heads.config.sampled})
    metrics = _entropies(heads, batch, scored, counts, recipe, ranks)
    for epoch in range(recipe.inner_epochs):
        new = {name: _score(heads, d, recipe)[0] for name, d in batch.decisions.items()}
        slopes, sums = _differentiate(heads, batch, new, old, counts, recipe)
        metrics |= _distances(ranks.sum(sums), counts)
        if epoch == 0:
            metrics["policy/first_ratio_error"] = _require_one(ranks.max(_ratio_error(new, old)))
        elif metrics["policy/kl"] > recipe.kl_stop:
            break
        losses = _losses(heads, batch, slopes, coefficients, counts, recipe)
        _set_gradients(optimiser, losses, ranks)
        norm = float(torch.nn.utils.clip_grad_norm_(heads.parameters(), recipe.gradient_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm must be finite, got {norm}; lower --learning-rate or --prior-kl"
            )
        optimiser.step()
        metrics |= {"policy/gradient_norm": norm, "policy/epochs": epoch + 1.0}
    return metrics


Scored = tuple[torch.Tensor, torch.Tensor]


def _score(heads: Heads, decisions: Decisions, recipe: Recipe, untrained: bool = False) -> Scored:
    """Log-probabilities and entropies of all, `[N]` each, on the CPU; in the slices of the losses, so to the bit."""
    with torch.no_grad():
        slices = decisions.slices(recipe.micro_batch, recipe.members)
        parts = [d.score_untrained(heads) if untrained else d.score(heads) for d in slices]
    log_prob, entropy = zip(*parts, strict=True)
    return torch.cat(log_prob).cpu(), torch.cat(entropy).cpu()


def _require_same(old: Mapping[str, torch.Tensor], decisions: Mapping[str, Decisions]) -> None:
    for name, scored in old.items():
        apart = float((scored - decisions[name].log_prob).abs().max())
        if not apart < _SAME:
            raise RuntimeError(
                f"log-probabilities of {name} must be those of the rollout, got {apart:.2g} nat apart"
            )


def _ratio_error(new: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]) -> float:
    """Largest |ratio - 1| of any decision."""
    errors = [float(((new[name] - old[name]).exp() - 1).abs().max()) for name in new]
    return max(errors, default=0.0)


def _require_one(error: float) -> float:
    """Both sides were scored by the same weights: what moves them or the decisions in between is an error of ours."""
    if not error <= _FIRST:
        raise RuntimeError(f"ratios must be 1 before the first step, got an error of {error:.2g}")
    return error


def _entropies(
    heads: Heads,
    batch: Batch,
    scored: Mapping[str, Scored],
    counts: Mapping[str, float],
    recipe: Recipe,
    ranks: Ranks,
) -> dict[str, float]:
    """Mean entropy of every head in nat, now and before training."""
    now, before = dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0.0)
    for name, decisions in batch.decisions.items():
        now[name] = float(scored[name][1].sum())
        before[name] = float(_score(heads, decisions, recipe, untrained=True)[1].sum())
    now, before = (_means(ranks.sum(sums), counts) for sums in (now, before))
    return {f"entropy/{name}": mean for name, mean in now.items()} | {
        f"entropy/{name}_prior": mean for name, mean in before.items()
    }


def _means(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Sums of every head over its number of decisions; a head without any is left out."""
    return {name: sums[name] / count for name, count in counts.items() if count}


def _distances(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """How far the heads have moved: k3 per decision of the head that moved most, and of each; what was clipped."""
    kl = _means(sums, counts)
    each = {f"policy/kl_{name}": value for name, value in kl.items()} if len(counts) > 1 else {}
    return each | {
        "policy/kl": max(kl.values(), default=0.0),
        "policy/clip_fraction": sums["clipped"] / max(sums["weighed"], 1.0),
    }


def _set_gradients(
    optimiser: torch.optim.Optimizer, losses: Iterator[torch.Tensor], ranks: Ranks
) -> None:
    """To the sum over all losses of all ranks.

    Zero and not nothing without one: a head without decisions, on this rank or at all, must take the same part.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    total = total.to(parameters[0].device)
    for part in losses:
        found = torch.autograd.grad(part, parameters, allow_unused=True, materialize_grads=True)
        total += torch.cat([gradient.flatten() for gradient in found])
    ranks.add(total)
    sizes = [p.numel() for p in parameters]
    for parameter, gradient in zip(parameters, total.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype)


def _differentiate(
    heads: Heads,
    batch: Batch,
    new: Mapping[str, torch.Tensor],
    old: Mapping[str, torch.Tensor],
    counts: Mapping[str, float],
    recipe: Recipe,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The surrogate's derivative by every log-probability, `[N]` each, and sums for the metrics.

    Scoring again with these as constants gives the gradient of the heads: in slices of any size, for one ratio per
    decision as for one per trajectory.
    """
    leaves = {name: x.clone().requires_grad_() for name, x in new.items()}
    sums = dict.fromkeys([*counts, "clipped", "weighed"], 0.0)
    total = torch.zeros(())
    for now, then, member in _ratios(batch, leaves, old, recipe):
        each = loss.clipped_surrogate(
            now,
            then,
            batch.advantage[member],
            batch.weight[member],
            clip_low=recipe.clip_low,
            clip_high=recipe.clip_high,
        )
        weighed = float((batch.weight[member] > 0).sum())
        sums["clipped"] += float(each.clipped) * weighed
        sums["weighed"] += weighed
        total = total + each.loss
    for name, leaf in leaves.items():
        sums[name] = float(loss.k3(new[name], old[name]).sum())
        if recipe.prior_kl:
            prior = _score(heads, batch.decisions[name], recipe, untrained=True)[0]
            total = total + recipe.prior_kl / counts[name] * loss.k3(prior, leaf).sum()
    if leaves:
        total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, sums


def _ratios(
    batch: Batch,
    new: Mapping[str, torch.Tensor],
    old: Mapping[str, torch.Tensor],
    recipe: Recipe,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Log-probabilities that make ratios, now and then, and whose they are: of decisions, or of whole trajectories."""
    if recipe.ratio == "trajectory":
        yield batch.per_member(new), batch.per_member(old), torch.arange(len(batch.advantage))
        return
    for name in new:
        yield new[name], old[name], batch.decisions[name].member


def _losses(
    heads: Heads,
    batch: Batch,
    slopes: Mapping[str, torch.Tensor],
    coefficients: Mapping[str, float],
    counts: Mapping[str, float],
    recipe: Recipe,
) -> Iterator[torch.Tensor]:
    """One loss for every slice of every head; their gradients add up."""
    for name, slope in slopes.items():
        start = 0
        for part in batch.decisions[name].slices(recipe.micro_batch, recipe.members):
            log_prob, entropy = part.score(heads)
            constant = slope[start : start + len(part)].to(log_prob.device)
            bonus = coefficients[name] / counts[name] * entropy.sum()
            yield (constant * log_prob).sum() - bonus
            start += len(part)

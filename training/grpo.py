# SPDX-License-Identifier: Apache-2.0
"""The trainer: groups of rollouts, rewards against their group, a clipped update. METHOD.md, section 5.

`Trainer.iterate` reads from top to bottom: draw groups, roll out, reward, compare within groups, update the heads,
adapt, teach the discriminator. Everything that it changes is in `Trainer.state`. Shape letters: P groups of this rank,
G members.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rapid3rt.policies.learned import Heads
from training import loss
from training.allocation import TABLE, planned_steps, read_conditioning
from training.checkpoint import State, load_optimiser_state, optimiser_state
from training.config import Recipe
from training.discriminator import Discriminator
from training.ranks import Ranks
from training.rewards import Samples, WeightedSum
from training.rollout import Group, Rollout, Rollouts
from training.seeds import seed_of
from training.shift import shifts
from training.subject import Subject
from training.summary import difficulties, summary
from training.update import Batch, update

_FIRST_COEFFICIENT = 3e-3
_LEAST_SPREAD = 0.05
_SLOW, _SLOWER = 0.8, 0.9
_LAST_THIRD = 2 / 3
_LATE_CHOICE_ENTROPY = 0.03


@dataclass(slots=True)
class Running:
    """What adapts from iteration to iteration.

    price: mu_b, mean_steps: the running mean of E over what was planned, spread: the running std within groups, each
    of every dial (key of `_name`). entropy: coefficient of every head; first: its entropy before its first update.
    """

    price: dict[str, float] = field(default_factory=dict)
    mean_steps: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Heads, and all that changes while they learn.

    subject: frozen. heads: trained in place. quality: the rewards q of the paper's form. discriminator: None where
    omega is 0. errors: M_b of every dial.
    """

    def __init__(
        self,
        recipe: Recipe,
        subject: Subject,
        heads: Heads,
        ranks: Ranks,
        *,
        quality: WeightedSum | None = None,
        discriminator: Discriminator | None = None,
    ) -> None:
        self.recipe, self.subject, self.heads, self.ranks = recipe, subject, heads, ranks
        self.quality, self.discriminator = quality, discriminator
        self.rollouts = Rollouts(
            subject.training,
            heads,
            family=subject.searched.schedule if recipe.prior else None,
            order=recipe.order,
            costs=subject.searched.costs,
            batch=recipe.rollout_batch,
            seed=recipe.seed,
        )
        trained = [p for name in heads.config.sampled for p in heads.by_name[name].parameters()]
        self.optimiser = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
        self.running = Running(entropy=dict.fromkeys(heads.config.sampled, _FIRST_COEFFICIENT))
        self._plans: dict[str, torch.Tensor] = {}
        self.tabulated: torch.Tensor | None = None
        """Log errors of the searched family, a row per pair, a column per number of `TABLE`; None without a family."""
        self.errors = self._read_errors()
        self.rollout: Rollout | None = None
        """Of the last iteration, for pictures."""
        self.difficulty: list[tuple[float, float, float]] = []
        """Of the groups of the last iteration, over all ranks: hardness of the pair, mean NFE, dial."""

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration, numbered from 0. Returns metrics of all ranks."""
        clock: dict[str, float] = {}
        drawn = self.draw(iteration)
        groups = self.ranks.share(drawn, [group.dial or 1.0 for group in drawn])
        with _timed(clock, "rollout"):
            rollout = self.rollout = self.rollouts.collect(groups, self.recipe.members)
        with _timed(clock, "reward"):
            rewards, terms = self.reward(rollout)
        scale = self._spreads(groups, rewards)
        advantage = loss.advantages(
            rewards,
            scale=self._divisor(rewards, scale),
            leave_one_out=self.recipe.advantage == "rloo",
        )
        dead = loss.dead_groups(rewards, scale)
        alive = rewards.isfinite() & ~dead[:, None]
        ticks = self.recipe.num_inference_steps
        batch = Batch(
            decisions=rollout.decisions,
            advantage=advantage.flatten(),
            weight=alive.flatten() / (self.recipe.groups * self.recipe.members * ticks),
        )
        with _timed(clock, "update"):
            metrics = update(
                self.heads, self.optimiser, batch, self.recipe, self.running.entropy, self.ranks
            )
        metrics |= self._adapt(iteration, groups, rollout, metrics)
        with _timed(clock, "discriminator"):
            metrics |= self._teach(rollout)
        metrics |= summary(rollout, rewards, terms, dead, self.ranks) | self._margin(rollout)
        metrics |= shifts(self.heads, rollout.decisions, self.recipe, self.ranks)
        self.difficulty = difficulties(rollout, self.hardness, self.ranks)
        return metrics | {f"time/{phase}": seconds for phase, seconds in clock.items()}

    # Draw ------------------------------------------------------------------------------------------------------------

    def draw(self, iteration: int) -> list[Group]:
        """The groups of an iteration, over all ranks: pair and dial of each by its own number."""
        groups = []
        for i in range(self.recipe.groups):
            number = iteration * self.recipe.groups + i
            pair = seed_of(self.recipe.seed, number, "pair") % len(self.subject.training)
            which = seed_of(self.recipe.seed, number, "dial") % len(self.recipe.dials)
            dial = self.recipe.dials[which] if self.recipe.prior else None
            groups.append(Group(number=number, pair=pair, dial=dial))
        return groups

    # Reward ----------------------------------------------------------------------------------------------------------

    def reward(self, rollout: Rollout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Rewards `[P, G]`, NaN where a member has none, and the terms that they are made of."""
        if self.recipe.reward == "fidelity":
            dials = torch.tensor([group.dial for group in rollout.groups])
            keys = [_name(group.dial) for group in rollout.groups]
            scale = torch.tensor([self.errors[key] for key in keys])
            price = torch.tensor([self.running.price[key] for key in keys])
            rewards = loss.dial_reward(
                rollout.error,
                rollout.steps,
                scale=scale,
                price=price,
                dial=dials,
                failure=self.recipe.failure,
                power=self.recipe.error_power,
            )
            terms = {"relative_error": rollout.error / scale[:, None]}
        else:
            quality, terms = self._quality(rollout)
            rewards = loss.paper_reward(
                quality,
                torch.zeros_like(quality),
                rollout.steps,
                discount=self.recipe.discount,
                omega=0.0,
            )
        if self.discriminator is not None:
            terms["realism"] = self._realism(rollout)
            weight = torch.ones_like(rewards)
            if self.recipe.reward == "paper":
                weight = loss.compute_discount(rollout.steps, self.recipe.discount)
            rewards = rewards + weight * self.recipe.omega * terms["realism"]
        return rewards.float(), terms

    def _realism(self, rollout: Rollout) -> torch.Tensor:
        """d of every member `[P, G]`, NaN where its image has a pixel that is no number."""
        assert self.discriminator is not None
        whole = rollout.error.isfinite()
        realism = torch.full_like(rollout.error, math.nan)
        realism[whole] = self.discriminator.reward(_shown(rollout.images[whole]))
        return realism

    def _quality(self, rollout: Rollout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        shape = rollout.error.shape
        if self.quality is None:
            return torch.zeros(shape), {}
        pairs = [group.pair for group in rollout.groups for _ in range(shape[1])]
        bank = self.subject.training
        scenes = self.subject.scenes
        needs_full = any(getattr(reward, "to", "") == "full" for reward in self.quality.rewards)
        samples = Samples(
            images=_shown(rollout.images.flatten(0, 1)),
            prompts=[bank.prompts[pair] for pair in pairs],
            scenes=None if scenes is None else [scenes[pair] for pair in pairs],
            converged=_shown(bank.converged()[pairs]),
            full=_shown(bank.full()[pairs]) if needs_full else None,
        )
        terms = self.quality.terms(samples)
        total = self.quality.combine(terms)
        return total.view(shape), {name: term.view(shape) for name, term in terms.items()}

    @property
    def hardness(self) -> torch.Tensor | None:
        """How far a pair's log error lies above the mean, of the searched family; None where it is not tabulated."""
        logs = self.tabulated
        return None if logs is None else (logs - logs.mean(0)).mean(1)

    def _margin(self, rollout: Rollout) -> dict[str, float]:
        """`rollout/margin`: by how much, in log error, groups lie below the searched family at the cost of each member.

        The family's images are not made again: the bank has a table of their errors.
        """
        if self.tabulated is None:
            return {}
        ks, dense = self._numbers(), self.subject.searched.costs.levels[0]
        margins = []
        for group, error, steps in zip(rollout.groups, rollout.error, rollout.steps, strict=True):
            whole, logs = error.isfinite(), self.tabulated[group.pair].tolist()
            if whole.any():
                known = [math.exp(_between(k / dense, ks, logs)) for k in steps[whole].tolist()]
                margins.append(math.log(sum(known) / max(float(error[whole].sum()), 1e-12)))
        sums = self.ranks.sum({"margin": sum(margins), "groups": float(len(margins))})
        return {"rollout/margin": sums["margin"] / sums["groups"]} if sums["groups"] else {}

    def _numbers(self) -> list[int]:
        """Evaluations that the searched family is tabulated at."""
        return [k for k in TABLE if k <= self.recipe.num_inference_steps]

    def _read_errors(self) -> dict[str, float]:
        """M_b of every dial, and the first price of each: the slope of the error curve, -d log M / d log b."""
        recipe, family = self.recipe, self.subject.searched.schedule
        if recipe.reward != "fidelity" or family is None:
            return {}
        ks = self._numbers()
        table = torch.stack([self.subject.training.searched(family, k).error for k in ks], 1)
        self.tabulated = table.clamp(min=1e-9).log()
        means, errors = table.mean(0).log().tolist(), {}
        for dial in recipe.dials:
            errors[_name(dial)] = math.exp(_between(dial, ks, means))
            slope = _between(dial * 0.95, ks, means) - _between(dial * 1.05, ks, means)
            price = slope / (math.log(1.05) - math.log(0.95))
            self.running.price[_name(dial)] = min(max(price, 0.0), 8.0)
            self.running.mean_steps[_name(dial)] = 1.0
        return errors

    # Compare ---------------------------------------------------------------------------------------------------------

    def _spreads(self, groups: list[Group], rewards: torch.Tensor) -> torch.Tensor:
        """The running std within groups of every group's dial, `[P]`, moved by all ranks' groups first."""
        own = loss.group_std(rewards)
        seen = (rewards.isfinite().sum(1) > 1) & own.isfinite()
        for key in self._dial_names():
            mine = torch.tensor([_name(group.dial) == key for group in groups], dtype=torch.bool)
            mine = mine & seen
            sums = self.ranks.sum({"std": float(own[mine].sum()), "count": float(mine.sum())})
            if sums["count"]:
                mean = sums["std"] / sums["count"]
                before = self.running.spread.get(key, mean)
                self.running.spread[key] = _SLOWER * before + (1 - _SLOWER) * mean
        spread = self.running.spread
        return torch.tensor(
            [max(spread.get(_name(group.dial), 0.0), _LEAST_SPREAD) for group in groups]
        )

    def _divisor(self, rewards: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
        if self.recipe.advantage == "bin":
            return scale
        if self.recipe.advantage == "group":
            return loss.group_std(rewards).clamp(min=_LEAST_SPREAD)
        return None

    def _dial_names(self) -> list[str]:
        return [_name(dial) for dial in self.recipe.dials] if self.recipe.prior else [_name(None)]

    # Adapt -----------------------------------------------------------------------------------------------------------

    def _adapt(
        self, iteration: int, groups: list[Group], rollout: Rollout, metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Entropy coefficients towards their floors, prices towards the dials."""
        out: dict[str, float] = {}
        progress = (iteration + 1) / self.recipe.iterations
        for name in self.running.entropy:
            if f"entropy/{name}" in metrics:
                self.running.first.setdefault(name, metrics[f"entropy/{name}"])
            floor = self._floor(name, metrics, progress)
            entropy = metrics.get(f"entropy/{name}", math.nan)
            self.running.entropy[name] = loss.adapt_entropy(
                self.running.entropy[name], entropy, floor
            )
            out |= {
                f"entropy/{name}_floor": floor,
                f"entropy_coefficient/{name}": self.running.entropy[name],
            }
        for key in self.running.price:
            mine = torch.tensor([_name(group.dial) == key for group in groups], dtype=torch.bool)
            steps, nfe = rollout.steps[mine], rollout.nfe[mine]
            sums = self.ranks.sum(
                {
                    "steps": float(steps.sum()),
                    "nfe": float(nfe.sum()),
                    "planned": float(self._planned(groups)[mine].sum()) * rollout.steps.shape[1],
                    "count": float(steps.numel()),
                }
            )
            if not sums["count"]:
                continue
            mean = sums["steps"] / sums["count"]
            out[f"cost/nfe@{key}"] = sums["nfe"] / sums["count"]
            before = self.running.mean_steps[key]
            self.running.mean_steps[key] = (
                _SLOW * before + (1 - _SLOW) * mean * sums["count"] / sums["planned"]
            )
            self.running.price[key] = loss.adapt_price(
                self.running.price[key], self.running.mean_steps[key], 1.0
            )
            out |= {f"cost/E@{key}": mean, f"cost/price@{key}": self.running.price[key]}
        return out

    def _planned(self, groups: list[Group]) -> torch.Tensor:
        """E that every group's pair is planned, `[P]`: that a few groups are of hard pairs must not raise a price."""
        dense = self.subject.searched.costs.levels[0]
        if not self._plans:
            self._plans = self._plan_all()
        planned = [float(self._plans[_name(group.dial)][group.pair]) * dense for group in groups]
        return torch.tensor(planned)

    def _plan_all(self) -> dict[str, torch.Tensor]:
        """Evaluations that every pair of the bank is planned at each dial, `[n]`.

        At every dial at once, also those that no group of this rank has: reading the bank, ranks wait for each other.
        """
        dials, bank = self.recipe.dials, self.subject.training
        head = self.heads.allocation
        if head is None:
            return {_name(b): self._plan_alone(b) for b in dials}
        seen, ticks = read_conditioning(bank), self.recipe.num_inference_steps
        return {_name(b): planned_steps(head, seen, b, ticks) for b in dials}

    def _plan_alone(self, dial: float) -> torch.Tensor:
        """What the searched family gives every pair without a head: an allocation of its own goes by the image."""
        bank, family = self.subject.training, self.subject.searched.schedule
        if family is None or family.allocation is None:
            return torch.full((len(bank),), float(max(1, round(dial))))
        return bank.allocated(family, dial).nfe

    def _floor(self, name: str, metrics: Mapping[str, float], progress: float) -> float:
        """Least entropy of a head, in nat. A step's: below the untrained policy's here, or what a warm start left."""
        if name == "step":
            prior = metrics.get("entropy/step_prior", 0.0)
            return min(prior, self.running.first.get("step", prior)) - self.recipe.step_entropy
        late = max(0.0, (progress - _LAST_THIRD) / (1 - _LAST_THIRD))
        share = self.recipe.choice_entropy
        share += late * (min(_LATE_CHOICE_ENTROPY, share) - share)
        return share * math.log(self.heads.config.outputs(name))

    # Discriminator ---------------------------------------------------------------------------------------------------

    def _teach(self, rollout: Rollout) -> dict[str, float]:
        """Show the discriminator this iteration's images beside what the plain pipeline makes of the same noise."""
        if self.discriminator is None:
            return {}
        whole = rollout.error.isfinite()
        numbers = torch.tensor([(g.pair, g.number) for g in rollout.groups], dtype=torch.int64)
        pair, number = numbers.view(-1, 1, 2).expand(*whole.shape, 2)[whole].unbind(1)
        rows = (
            self.discriminator.encode(_shown(rollout.images[whole])),
            self.discriminator.encode(_shown(self.subject.training.full()[pair])),
            rollout.nfe[whole],
        )
        # By number, however groups were dealt: what is drawn from the buffer depends on places in it.
        order = self.ranks.gather(number).argsort(stable=True)
        self.discriminator.add(*(self.ranks.gather(x)[order] for x in rows))
        return {f"discriminator/{k}": v for k, v in self.discriminator.update().items()}

    # Keep ------------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """All that changes."""
        running = self.running
        state: dict[str, Any] = {
            "heads": self.heads.state_dict(),
            "optimiser": optimiser_state(self.optimiser),
            "running": {
                "price": running.price,
                "mean_steps": running.mean_steps,
                "spread": running.spread,
                "entropy": running.entropy,
                "first": running.first,
            },
        }
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.heads.load_state_dict(state["heads"])
        load_optimiser_state(self.optimiser, state["optimiser"])
        self.running = Running(**{name: dict(value) for name, value in state["running"].items()})
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])


def _name(dial: float | None) -> str:
    """How metrics and states call a dial."""
    return "none" if dial is None else f"{dial:g}"


def _shown(images: torch.Tensor) -> torch.Tensor:
    """Images of -1..1 as rewards take them."""
    return ((images + 1) / 2).clamp(0, 1)


def _between(k: float, ks: list[int], logs: list[float]) -> float:
    """Log error at k, linear in log k between the tabulated ones and beyond them."""
    i = min(max(sum(x < k for x in ks), 1), len(ks) - 1)
    share = math.log(k / ks[i - 1]) / math.log(ks[i] / ks[i - 1])
    return logs[i - 1] + share * (logs[i] - logs[i - 1])


@contextmanager
def _timed(clock: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock[phase] = time.perf_counter() - start

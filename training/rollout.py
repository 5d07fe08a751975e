# SPDX-License-Identifier: Apache-2.0
"""Rollouts: groups of images through the runtime that serves users, with sampled decisions.

All members of a group share prompt, noise and dial; they differ by their decisions alone. Groups of one dial share
pipeline calls, in which finished images cost nothing. Shape letters: P groups, G members, H and W of decoded images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import rapid3rt
from rapid3rt.policies.learned import Heads, LearnedPolicy
from rapid3rt.policies.schedule import WarpFamily
from rapid3rt.types import ActionCosts
from training.bank import Bank, accelerated
from training.prompts import Prompts
from training.seeds import seed_of
from training.trajectory import Decisions, Recorder, join


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """number: counted over the whole run. pair: of the bank. dial: b, None for heads without a prior."""

    number: int
    pair: int
    dial: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What some groups did.

    images: float32 `[P, G, 3, H, W]` in -1..1. error: mean squared difference to the converged solution; steps, nfe:
    equivalent steps and evaluations; float32 `[P, G]`. decisions: of every head, members counted p G + g.
    """

    groups: tuple[Group, ...]
    images: torch.Tensor
    error: torch.Tensor
    steps: torch.Tensor
    nfe: torch.Tensor
    decisions: Mapping[str, Decisions]


class Rollouts:
    """Runs groups.

    bank: pairs and their converged solutions. family: the prior's, None for heads without one. order: of the steps.
    costs: of the actions. batch: images of one pipeline call. seed: of the training run.
    """

    def __init__(
        self,
        bank: Bank,
        heads: Heads,
        *,
        family: WarpFamily | None,
        order: int,
        costs: ActionCosts,
        batch: int,
        seed: int,
    ) -> None:
        self.bank, self.heads, self.family, self.order = bank, heads, family, order
        self.costs, self.batch, self.seed = costs, batch, seed
        self._prompts = Prompts(bank.pipe, bank.prompts, bank.call)

    def collect(self, groups: Sequence[Group], members: int, *, sample: bool = True) -> Rollout:
        """Run all groups, so many members each. sample False: every decision at its mode, as users are served."""
        converged = self.bank.converged()
        total = len(groups) * members
        images = torch.zeros(total, *converged.shape[1:])
        steps, nfe = torch.zeros(total), torch.zeros(total)
        parts: list[Decisions] = []
        for call in self._calls(groups, members):
            recorder = Recorder(self.heads, call) if sample else None
            made, reports = self._run([groups[m // members] for m in call], members, call, recorder)
            for place, member in enumerate(call):
                images[member] = made[place]
                nfe[member] = reports[place].nfe
                steps[member] = reports[place].equivalent_steps
            if recorder is not None:
                parts += recorder.decisions()
        shape = (len(groups), members)
        whole = images.view(*shape, *images.shape[1:])
        target = converged[[group.pair for group in groups]]
        return Rollout(
            groups=tuple(groups),
            images=whole,
            error=(whole - target[:, None]).square().mean((2, 3, 4)),
            steps=steps.view(shape),
            nfe=nfe.view(shape),
            decisions=join(parts),
        )

    def _calls(self, groups: Sequence[Group], members: int) -> Iterator[list[int]]:
        """Members of every pipeline call: of one dial, at most a batch of them."""
        for dial in dict.fromkeys(group.dial for group in groups):
            own = [
                p * members + g
                for p, group in enumerate(groups)
                if group.dial == dial
                for g in range(members)
            ]
            for start in range(0, len(own), self.batch):
                yield own[start : start + self.batch]

    def _run(
        self, groups: Sequence[Group], members: int, call: Sequence[int], recorder: Recorder | None
    ) -> tuple[torch.Tensor, Sequence[Any]]:
        """One pipeline call. groups: of every image. Returns images `[n, 3, H, W]` and their reports."""
        seeds = [
            seed_of(self.seed, group.number, member % members, "actions")
            for group, member in zip(groups, call, strict=True)
        ]
        policy = self.policy(groups[0].dial, None if recorder is None else seeds, recorder)
        pipe = self.bank.pipe
        pairs = [group.pair for group in groups]
        with accelerated(pipe, policy):
            images = self.bank.images(pairs, arguments=self._prompts.arguments(pairs, pipe.device))
            return images, rapid3rt.report(pipe).images

    def policy(
        self, dial: float | None, seeds: Sequence[int] | None, recorder: Recorder | None
    ) -> LearnedPolicy:
        """The heads as they are now, at a dial. Without seeds: as users are served."""
        return LearnedPolicy(
            self.heads,
            self.family,
            order=self.order,
            dial=dial,
            costs=self.costs,
            seeds=None if seeds is None else lambda _run: seeds,
            record=None if recorder is None else recorder.record,
        )

# SPDX-License-Identifier: Apache-2.0
"""What an update needs of a rollout: the live decisions of every head, small, in host memory.

An update scores stored decisions again and never runs the generator. Shape letters: N decisions of one head, over all
members and ticks; C latent channels, h x w cells that heads see, D model width, S scalars, A numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from rapid3rt.policies.learned import Decision, Heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Live decisions of one head.

    observation: bfloat16 `[N, C, h, w]`. conditioning: bfloat16 `[N, D]`. scalars: float32 `[N, 2 S]`. prior: float32
    `[N, A]`. action: `[N]`. member: int64 `[N]`, whose decision it was, counted over all groups of the iteration.
    tick: int64 `[N]`. log_prob: float32 `[N]`, when it was taken.
    """

    head: str
    observation: torch.Tensor
    conditioning: torch.Tensor
    scalars: torch.Tensor
    prior: torch.Tensor
    action: torch.Tensor
    member: torch.Tensor
    tick: torch.Tensor
    log_prob: torch.Tensor

    def __len__(self) -> int:
        return len(self.member)

    def take(self, rows: slice) -> Decisions:
        """Some of them, as views."""
        kept = {name: getattr(self, name)[rows] for name in _TENSORS}
        return Decisions(head=self.head, **kept)

    def pick(self, rows: torch.Tensor) -> Decisions:
        """Rows by number, as copies."""
        kept = {name: getattr(self, name)[rows] for name in _TENSORS}
        return Decisions(head=self.head, **kept)

    def slices(self, size: int, members: int) -> Iterator[Decisions]:
        """All of them, in order: slices of one group of so many members each, so large at most.

        What a row rounds to depends on the rows beside it. So a group is scored to the same bits whichever rank it was
        dealt to.
        """
        _, counts = torch.unique_consecutive(self.member // members, return_counts=True)
        start = 0
        for count in counts.tolist():
            for part in range(start, start + count, size):
                yield self.take(slice(part, min(part + size, start + count)))
            start += count

    def score(self, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy under some heads, in nat, `[N]` each, with gradients."""
        return heads.evaluate(self.on(heads))

    def score_untrained(self, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
        """As `score`, before anything was learned."""
        return heads.evaluate_untrained(self.on(heads))

    def on(self, heads: Heads) -> Decision:
        """As heads take them, on their device."""
        device = next(heads.parameters()).device
        tensors = {name: getattr(self, name).to(device) for name in _SEEN}
        live = torch.ones(len(self), dtype=torch.bool, device=device)
        return Decision(head=self.head, tick=-1, live=live, **tensors)


_TENSORS = tuple(field.name for field in fields(Decisions) if field.name != "head")
_SEEN = ("observation", "conditioning", "scalars", "prior", "action")


class Recorder:
    """Collects the decisions of one run; give its `record` to the policy.

    members: of every image of the run's batch, counted over all groups of the iteration.
    """

    def __init__(self, heads: Heads, members: Sequence[int]) -> None:
        self._heads, self._members = heads, torch.tensor(members, dtype=torch.int64)
        self._taken: list[tuple[Decision, torch.Tensor]] = []

    def record(self, decision: Decision) -> None:
        """Keep a decision with the log-probability that it was taken with. Reads nothing back from the device."""
        with torch.no_grad():
            log_prob, _ = self._heads.evaluate(decision)
        self._taken.append((decision, log_prob))

    def decisions(self) -> list[Decisions]:
        """What was live, after the run."""
        kept = ((decision, log_prob, decision.live.cpu()) for decision, log_prob in self._taken)
        return [
            Decisions(
                head=decision.head,
                member=self._members[live],
                tick=torch.full((int(live.sum()),), decision.tick, dtype=torch.int64),
                log_prob=log_prob.cpu()[live],
                **{name: getattr(decision, name).cpu()[live] for name in _SEEN},
            )
            for decision, log_prob, live in kept
            if bool(live.any())
        ]


def join(parts: Sequence[Decisions]) -> dict[str, Decisions]:
    """All decisions of every head, ordered by member and tick, so that sums do not depend on how calls were batched."""
    joined = {}
    for head in dict.fromkeys(part.head for part in parts):
        own = [part for part in parts if part.head == head]
        tensors = {name: torch.cat([getattr(part, name) for part in own]) for name in _TENSORS}
        longest = int(tensors["tick"].max()) + 1
        order = (tensors["member"] * longest + tensors["tick"]).argsort(stable=True)
        joined[head] = Decisions(head=head, **{name: x[order] for name, x in tensors.items()})
    return joined

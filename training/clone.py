# SPDX-License-Identifier: Apache-2.0
"""The warm start of heads without a prior: repeat what a searched schedule does (METHOD.md, section 5).

From nothing, three heads first have to find out that computing late steps is worth it; a schedule that was searched in
minutes knows. The teacher walks the training pairs once, the heads learn to say what it did.
"""

from __future__ import annotations

import torch

from rapid3rt.policies.learned import Heads, LearnedPolicy
from rapid3rt.policies.prior import Prior
from rapid3rt.policies.schedule import WarpFamily
from training.bank import Bank, accelerated
from training.seeds import seed_of
from training.trajectory import Decisions, Recorder, join

_PAIRS = 64
_BATCH = 256
_RATE = 1e-3


def clone(
    heads: Heads, bank: Bank, family: WarpFamily, *, dial: float, order: int, steps: int, seed: int
) -> dict[str, float]:
    """Train all sampled heads in place. dial: evaluations of the teacher. Returns their mean log-probability after."""
    lessons = _lessons(heads, bank, family, dial, order)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=_RATE, weight_decay=0.0)
    for step in range(steps):
        optimiser.zero_grad()
        for name, decisions in lessons.items():
            generator = torch.Generator().manual_seed(seed_of(seed, step, name, "clone"))
            rows = torch.randint(len(decisions), (_BATCH,), generator=generator)
            log_prob, _ = decisions.pick(rows).score(heads)
            (-log_prob.mean()).backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        return {
            f"clone/{name}": float(decisions.score(heads)[0].mean())
            for name, decisions in lessons.items()
        }


def _lessons(
    heads: Heads, bank: Bank, family: WarpFamily, dial: float, order: int
) -> dict[str, Decisions]:
    parts: list[Decisions] = []
    for start in range(0, min(len(bank), _PAIRS), bank.batch_size):
        pairs = list(range(start, min(start + bank.batch_size, len(bank))))
        recorder = Recorder(heads, pairs)
        teacher = Prior(family, budget=round(dial))
        policy = LearnedPolicy(heads, None, order=order, record=recorder.record, teacher=teacher)
        with accelerated(bank.pipe, policy):
            bank.images(pairs)
        parts += recorder.decisions()
    return join(parts)

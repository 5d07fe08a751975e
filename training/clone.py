# SPDX-License-Identifier: Apache-2.0
"""The warm start of heads without a prior: repeat what a searched schedule does (METHOD.md, section 5).

From nothing, three heads first have to find out that computing late steps is worth it; a schedule that was searched in
minutes knows. The teacher walks the training pairs once, the heads learn to say what it did, and to stay as unsure as
exploring needs: likelihood alone leaves them certain within a hundred steps (entropies of 1e-6 nat were seen), and what
is certain is never tried otherwise.
"""

from __future__ import annotations

import torch
from torch.distributions import Beta, kl_divergence
from torch.nn import functional

from rapid3rt.policies.learned import Heads, LearnedPolicy, concentrations
from rapid3rt.policies.prior import Prior, step_logits
from rapid3rt.policies.schedule import WarpFamily
from training.bank import Bank, accelerated
from training.seeds import seed_of
from training.trajectory import Decisions, Recorder, join

LESSONS = 64
"""Pairs that the teacher walks, at most."""
_BATCH = 256
_RATE = 1e-3
_DOUBT = 0.1
"""Probability that is left for what the teacher did not do: twice the least entropy that training keeps."""


def clone(
    heads: Heads, bank: Bank, family: WarpFamily, *, dial: float, order: int, steps: int, seed: int
) -> dict[str, float]:
    """Train all sampled heads in place. dial: evaluations of the teacher. Returns mean log-probability and entropy."""
    lessons = _lessons(heads, bank, family, dial, order)
    optimiser = torch.optim.AdamW(heads.parameters(), lr=_RATE, weight_decay=0.0)
    for step in range(steps):
        optimiser.zero_grad()
        for name, decisions in lessons.items():
            generator = torch.Generator().manual_seed(seed_of(seed, step, name, "clone"))
            rows = torch.randint(len(decisions), (_BATCH,), generator=generator)
            picked = decisions.pick(rows)
            _distance(picked, heads.logits(picked.on(heads))).backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimiser.step()
    said: dict[str, float] = {}
    for name, decisions in lessons.items():
        with torch.no_grad():
            log_prob, entropy = decisions.score(heads)
        said |= {f"clone/{name}": float(log_prob.mean())}
        said |= {f"clone/{name}_entropy": float(entropy.mean())}
    return said


def _distance(lessons: Decisions, logits: torch.Tensor) -> torch.Tensor:
    """Mean divergence of what heads say, `[N, A]`, from what they are taught.

    A step's lesson is the distribution that a prior would have there, a choice's the teacher's with `_DOUBT` shared
    among the others.
    """
    action = lessons.action.to(logits.device)
    if lessons.head == "step":
        taught, said = (Beta(*concentrations(x)) for x in (step_logits(action), logits))
        return kl_divergence(taught, said).mean()
    return functional.cross_entropy(
        logits, action, label_smoothing=_DOUBT * logits.shape[1] / (logits.shape[1] - 1)
    )


def _lessons(
    heads: Heads, bank: Bank, family: WarpFamily, dial: float, order: int
) -> dict[str, Decisions]:
    parts: list[Decisions] = []
    for start in range(0, min(len(bank), LESSONS), bank.batch_size):
        pairs = list(range(start, min(start + bank.batch_size, len(bank))))
        recorder = Recorder(heads, pairs)
        teacher = Prior(family, budget=round(dial))
        policy = LearnedPolicy(heads, None, order=order, record=recorder.record, teacher=teacher)
        with accelerated(bank.pipe, policy):
            bank.images(pairs)
        parts += recorder.decisions()
    return join(parts)

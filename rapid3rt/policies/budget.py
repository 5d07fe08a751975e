# SPDX-License-Identifier: Apache-2.0
"""A budget around a policy that has none: plan with k where it can plan, else stop computing.

The session enforces the cap for every policy by masking computes; what is here makes the cap worth
having.
"""

from __future__ import annotations

import torch

from rapid3rt.errors import check_count, check_number
from rapid3rt.policies.base import planned_evaluations
from rapid3rt.policies.controller import Controller
from rapid3rt.policies.fixed import Dense, Steps
from rapid3rt.policies.learned import LearnedPolicy
from rapid3rt.policies.replay import Replay
from rapid3rt.policies.schedule import FixedSchedule, ScheduleFamily
from rapid3rt.policies.threshold import Threshold
from rapid3rt.types import EULER, ComputeDecision, DenoiseState, Policy, Run, StepDecision


class BudgetedDense:
    """`dense` under a budget of k: walks `steps:k/trim` at an order; at k = ticks it is `dense` itself.

    `leaves_grid` is exact after `begin`; before it, it answers for a budget below the ticks.
    """

    reuses = False

    def __init__(
        self, budget: int | None = None, *, speed: float | None = None, order: int = EULER
    ) -> None:
        self.name, self.budget, self.speed, self.order = "dense", budget, speed, order
        self._inner: Dense | Steps | None = None

    @property
    def leaves_grid(self) -> bool:
        """Whether the run leaves the grid; exact after `begin`."""
        return self._inner is None or self._inner.leaves_grid

    def begin(self, run: Run) -> None:
        k = planned_evaluations(run, self.budget, self.speed)
        self._inner = Dense() if k == run.ticks else Steps(k, trim=True, order=self.order)
        self._inner.begin(run)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        assert self._inner is not None
        return self._inner.decide_compute(state)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert self._inner is not None
        return self._inner.decide_step(state, velocity)


def with_budget(policy: Policy, k: int) -> Policy:
    """The policy that spends at most k evaluations per image in the way that suits it.

    `policy` is left as it is. A policy of the user's own comes back unchanged: the session caps it.

    Raises
    ------
    ValueError
        k is not an integer of at least 1, or the policy has fixed its number of evaluations already
        (`steps`, `replay`, a fixed schedule).
    """
    return _limited(policy, "budget", budget=check_count("budget", k))


def with_speed(policy: Policy, speed: float) -> Policy:
    """The policy at max(1, floor(ticks / speed)) evaluations; `speed = 1` is `dense`.

    Raises like `with_budget`, and for a speed below 1.
    """
    speed = check_number("speed", speed, lambda s: s >= 1, "a finite number of at least 1")
    limited = _limited(policy, "speed", speed=speed)
    return Dense() if speed == 1 else limited


def _limited(
    policy: Policy, what: str, budget: int | None = None, speed: float | None = None
) -> Policy:
    if isinstance(policy, (Steps, Replay, FixedSchedule)):
        msg = f"{what} must not be given with '{policy.name}', which fixes its evaluations itself"
        raise ValueError(msg)
    if isinstance(policy, Dense):
        return BudgetedDense(budget, speed=speed)
    if isinstance(policy, Threshold):
        return Threshold(policy.x, order=policy.order, budget=budget, speed=speed)
    if isinstance(policy, Controller):
        return Controller(
            policy.tol, family=policy.family, order=policy.order, budget=budget, speed=speed
        )
    if isinstance(policy, ScheduleFamily):
        return ScheduleFamily(policy.family, name=policy.name, budget=budget, speed=speed)
    if isinstance(policy, LearnedPolicy):
        return policy.limited(budget=budget, speed=speed)
    return policy

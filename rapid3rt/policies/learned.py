# SPDX-License-Identifier: Apache-2.0
"""The learned policy: heads on top of a prior, sampled in training, at their modes in serving (METHOD.md, section 2).

Four heads, each of them optional. `cache` says before the forward whether to compute or reuse, `sparse` how sparsely to
compute; `step` says how far to go. `allocation` stretches an image's plan after its first evaluation; what every
stretch is worth is known, so it is trained on tables and never sampled. Every head adds to what the prior says. Without
a prior (the recipe of the paper) steps and reuse start from the heads' own biases, sparsity near none.

Every choice is a `Decision`. Its log-probability is computed from what it stores alone: observation, conditioning and
scalars, small and rounded. So an update never runs the generator, and a served decision is a stored one's.

Shape letters: B images, C latent channels, D model width, S scalars, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from rapid3rt.policies.base import SIGMA_MIN
from rapid3rt.policies.heads import AllocationHead, Head, observe, with_validity
from rapid3rt.policies.prior import Prior, step_logits
from rapid3rt.policies.sampling import (
    Noise,
    beta_entropy,
    beta_log_prob,
    beta_mode,
    choice_entropy,
    choice_log_prob,
)
from rapid3rt.policies.schedule import WarpFamily, misfit_notes
from rapid3rt.types import (
    AUTO,
    COMPUTE,
    ActionCosts,
    ComputeDecision,
    DenoiseState,
    Run,
    StepDecision,
)

HEADS = ("cache", "sparse", "allocation", "step")
SCALARS = (
    "planned / ticks",
    "left / planned",
    "left / ticks left",
    "since compute / ticks",
    "drift",
    "velocity change",
    "velocity change before",
    "log rms of observation",
    "log sigma",
)
_SELDOM = -3.0
"""Prior logit of every sparse level, also in the recipe of the paper, and of reuse on a prior, beside a 0."""
_PAPER_STEP = (2.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    """Everything that decides the shapes. family: of the model. channels: C of the latent grid that policies see.
    conditioning: D. heads: names, each once. levels: sparsity levels, dense included. side: cells per side that heads
    see, None for all. has_prior: whether heads add to a searched family's walk. dials: b that the allocation is fitted
    at. silent: those of them at which the sampled heads add nothing, because they gained nothing there when it was
    tried; what they add elsewhere is nothing from half-way to these.
    """

    family: str
    channels: int
    conditioning: int
    heads: tuple[str, ...] = ("allocation", "step")
    levels: int = 4
    width: int = 128
    side: int | None = None
    has_prior: bool = True
    dials: tuple[float, ...] = (5.0, 6.0, 8.0, 10.0, 14.0)
    silent: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.heads if name not in HEADS]
        if unknown or not self.heads or len(set(self.heads)) != len(self.heads):
            raise ValueError(
                f"heads must be some of {', '.join(HEADS)}, each once, got {self.heads}"
            )
        if "allocation" in self.heads and not self.has_prior:
            raise ValueError(
                "heads must not hold 'allocation' without a prior, whose plan it stretches"
            )
        if len(self.dials) < 2 or any(not 0 < a < b for a, b in pairwise(self.dials)):
            raise ValueError(f"dials must be at least two, above 0 and rising, got {self.dials}")
        if not set(self.silent) <= set(self.dials) or len(set(self.silent)) < len(self.silent):
            raise ValueError(
                f"silent must be some of the dials {self.dials}, each once, got {self.silent}"
            )
        if self.silent and not self.has_prior:
            raise ValueError(
                f"silent must be empty without a prior, which would be left alone, got {self.silent}"
            )

    def outputs(self, head: str) -> int:
        """Numbers that a head gives."""
        return {"cache": 2, "sparse": self.levels, "allocation": 1, "step": 2}[head]

    @property
    def sampled(self) -> tuple[str, ...]:
        """The heads whose decisions are random in training."""
        return tuple(name for name in self.heads if name != "allocation")

    def bends(self) -> tuple[float, ...]:
        """Between a silent dial and one that is not: where heads begin to fade, and where they have."""
        mixed = [
            (a, b) if b in self.silent else (b, a)
            for a, b in pairwise(self.dials)
            if (a in self.silent) != (b in self.silent)
        ]
        return tuple(loud * (quiet / loud) ** way for loud, quiet in mixed for way in (0.25, 0.5))

    def share(self, b: float) -> float:
        """How much counts of what the sampled heads say, where images get b evaluations in the mean.

        1 at a dial that is not silent and for a quarter of the way, in log b, to one that is, then falling linearly
        to 0 half-way, so that heads are never heard nearer to a dial that they do no good; beyond the ends as there.
        """
        shares = [float(dial not in self.silent) for dial in self.dials]
        at = min(max(b, self.dials[0]), self.dials[-1])
        i = next(i for i, dial in enumerate(self.dials[1:]) if at <= dial)
        low, high = self.dials[i], self.dials[i + 1]
        way = math.log(at / low) / math.log(high / low)
        between = (1 - way) * shares[i] + way * shares[i + 1]
        return between if shares[i] == shares[i + 1] else min(max(4 * between - 2, 0.0), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """What was measured at one setting of the dial, means over images of the calibration split, served as users are.

    dial: b. equivalent_steps, evaluations: E and NFE. error: mean squared error to the converged solution.
    """

    dial: float
    equivalent_steps: float
    evaluations: float
    error: float


def _inward(low: float, high: float) -> str:
    """A range in two decimals, each of which lies within it."""
    return f"{math.ceil(low * 100) / 100:.2f} to {math.floor(high * 100) / 100:.2f}"


def setting_for(calibration: Sequence[Dial], equivalent_steps: float) -> float:
    """The dial b whose images cost so much in the mean. Raises `ValueError` outside what was measured."""
    low, high = calibration[0], calibration[-1]
    if not low.equivalent_steps <= equivalent_steps <= high.equivalent_steps:
        raise ValueError(
            f"speed must ask for {low.equivalent_steps:.2f} to {high.equivalent_steps:.2f} equivalent steps, for which "
            f"this policy was calibrated, got {equivalent_steps:.2f}"
        )
    for a, b in pairwise(calibration):
        if equivalent_steps <= b.equivalent_steps:
            share = (equivalent_steps - a.equivalent_steps) / (
                b.equivalent_steps - a.equivalent_steps
            )
            return a.dial + share * (b.dial - a.dial)
    return high.dial


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One head's choice for all images at one tick.

    observation: bfloat16 `[B, C, h, w]`. conditioning: bfloat16 `[B, D]`. scalars: float32 `[B, 2 S]`. prior: float32
    `[B, A]`, what the head's outputs are added to. action: float32 ratios of a step, else int64 indices, `[B]`. live:
    bool `[B]`, False where the choice was void or forced: it has no log-probability.
    """

    head: str
    tick: int
    observation: torch.Tensor
    conditioning: torch.Tensor
    scalars: torch.Tensor
    prior: torch.Tensor
    action: torch.Tensor
    live: torch.Tensor


class Heads(nn.Module):
    """The trained part: a `Head` for every name of the config."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.by_name = nn.ModuleDict({name: self._make(name) for name in config.heads})

    def _make(self, name: str) -> nn.Module:
        config = self.config
        if name == "allocation":
            return AllocationHead(config.conditioning, config.dials)
        return Head(
            config.channels,
            config.conditioning,
            config.outputs(name),
            width=config.width,
            num_scalars=len(SCALARS),
            bias=self._bias(name),
        )

    @property
    def allocation(self) -> AllocationHead | None:
        """None where none is among the heads."""
        head = self.by_name["allocation"] if "allocation" in self.config.heads else None
        assert head is None or isinstance(head, AllocationHead)
        return head

    def _bias(self, name: str) -> Sequence[float] | None:
        if self.config.has_prior:
            return None
        return _PAPER_STEP if name == "step" else [0.0] * self.config.outputs(name)

    def forward(
        self,
        head: str,
        observation: torch.Tensor,
        conditioning: torch.Tensor,
        scalars: torch.Tensor,
        prior: torch.Tensor,
    ) -> torch.Tensor:
        """The parameters of a head's distribution: (a, b) of Beta(1 + e^a, 1 + e^b) for `step`, else logits."""
        outputs: torch.Tensor = self.by_name[head](observation, conditioning, scalars)
        return prior + outputs

    def logits(self, decision: Decision) -> torch.Tensor:
        """As `forward`, of a stored decision."""
        return self.forward(
            decision.head,
            decision.observation,
            decision.conditioning,
            decision.scalars,
            decision.prior,
        )

    def untrained_logits(self, decision: Decision) -> torch.Tensor:
        """As `logits`, of the policy before training: the prior alone, or the biases that heads start from."""
        bias = self._bias(decision.head)
        return decision.prior + (
            0.0 if bias is None else torch.tensor(bias, device=decision.prior.device)
        )

    def evaluate(self, decision: Decision) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of a stored decision in nat, float32 `[B]` each; 0 where it was not live."""
        return _score(decision, self.logits(decision))

    def evaluate_untrained(self, decision: Decision) -> tuple[torch.Tensor, torch.Tensor]:
        """As `evaluate`, of the policy before training."""
        return _score(decision, self.untrained_logits(decision))


def _score(decision: Decision, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if decision.head == "step":
        alpha, beta = concentrations(logits)
        values = beta_log_prob(decision.action, alpha, beta), beta_entropy(alpha, beta)
    else:
        values = choice_log_prob(decision.action, logits), choice_entropy(logits)
    log_prob, entropy = (torch.where(decision.live, value, 0.0) for value in values)
    return log_prob, entropy


def typical_action(head: str, logits: torch.Tensor) -> torch.Tensor:
    """The mode of a step's ratio, the mean of a choice's index: float32 `[B]`."""
    if head == "step":
        return beta_mode(*concentrations(logits))
    actions = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    return logits.softmax(1) @ actions


class LearnedPolicy:
    """Heads in a run.

    Parameters
    ----------
    heads: their distributions. family: whose walk they add to, None for the recipe of the paper. order: of every step.
    budget: what every image gets; dial: b, the mean over images; speed: ticks over the mean of their equivalent steps,
    by the calibration, which says what every dial was measured to cost. takes_nearest: whether a speed beyond it
    becomes the nearest that was measured, with a note, and is no error. costs: of the actions.
    seeds: one per image, to sample in training; None serves modes and the most likely choices. record: told every
    decision of a run. teacher: walks in place of the heads, which only record what they would have to say: the first
    lessons of heads without a prior.
    """

    leaves_grid = True

    def __init__(
        self,
        heads: Heads,
        family: WarpFamily | None,
        *,
        order: int,
        budget: int | None = None,
        dial: float | None = None,
        speed: float | None = None,
        takes_nearest: bool = False,
        name: str = "learned",
        calibration: Sequence[Dial] = (),
        costs: ActionCosts | None = None,
        seeds: Callable[[Run], Sequence[int]] | None = None,
        record: Callable[[Decision], None] | None = None,
        teacher: Prior | None = None,
    ) -> None:
        names = heads.config.heads
        if heads.config.has_prior != (family is not None):
            raise ValueError(
                f"family must {'' if heads.config.has_prior else 'not '}be given for these heads, got {family!r}"
            )
        self.family, self.speed, self.takes_nearest = family, speed, takes_nearest
        self.prior = None
        if family is not None:
            self.prior = Prior(family, budget=budget, dial=dial, stretches="allocation" in names)
        self.heads, self.order, self.name = heads, order, name
        self.calibration = tuple(calibration)
        self.costs = costs or ActionCosts()
        self.reuses = "cache" in names
        self.notes: tuple[str, ...] = ()
        self._seeds, self._record, self._teacher = seeds, record, teacher
        self._noise: Noise | None = None
        self._share, self._is_level = 1.0, False

    @property
    def allocates(self) -> bool:
        """Whether a speed is a mean over images here, and not a cap."""
        return self.prior is not None and self.speed is not None

    def limited(
        self,
        *,
        budget: int | None = None,
        speed: float | None = None,
        takes_nearest: bool = False,
    ) -> LearnedPolicy:
        """The same heads at a budget, which every image keeps, or at a speed, a mean where there is a prior."""
        return LearnedPolicy(
            self.heads,
            self.family,
            order=self.order,
            budget=budget,
            speed=speed,
            takes_nearest=takes_nearest,
            name=self.name,
            calibration=self.calibration,
            costs=self.costs,
        )

    def begin(self, run: Run) -> None:
        """Raises `ValueError` if the run is of another model family, or its speed is beyond the calibration."""
        if run.family != self.heads.config.family:
            raise ValueError(
                f"family must be '{self.heads.config.family}', for which {self.name} was made, got '{run.family}'"
            )
        if self.prior is not None:
            self.notes = ()
            if self.speed is not None:
                self.prior.dial = self._setting(run.ticks, self.speed)
            self.prior.begin(run)
            head = self.heads.allocation if self.prior.allocates else None
            self.notes += misfit_notes(self.prior.family, run, allocates=head is not None)
            self._is_level = head is not None and head.is_level(self.prior.mean)
            self._share = self.heads.config.share(self.prior.mean)
            self.notes += self._tell_level() + self._tell_silence()
        if self._teacher is not None:
            self._teacher.begin(run)
        self._run = run
        self.heads.to(run.device)
        self._noise = None
        if self._seeds is not None:
            self._noise = Noise(self._seeds(run), run.ticks, run.device)
        unknown = torch.full((run.images,), math.nan, device=run.device)
        self._change, self._change_before = unknown, unknown
        self._velocity: torch.Tensor | None = None
        self._stretch = torch.ones(run.images, device=run.device)
        self._left = unknown

    def _tell_level(self) -> tuple[str, ...]:
        assert self.prior is not None
        if not self._is_level or self.prior.is_elsewhere:
            return ()
        return (
            f"allocation: all images get the same at {self.prior.mean:.3g} evaluations in the mean; plans of their own "
            "were no sure gain there when they were tried",
        )

    def _tell_silence(self) -> tuple[str, ...]:
        assert self.prior is not None
        names = ", ".join(self.heads.config.sampled)
        if not names or self._share == 1:
            return ()
        counts = f"counts {self._share:.0%}" if self._share else "is silent"
        return (
            f"{names}: {counts} at {self.prior.mean:.3g} evaluations in the mean; heads were no gain "
            f"{'near there' if self._share else 'there'} when they were tried",
        )

    def _setting(self, ticks: int, speed: float) -> float:
        """The dial of a speed. Raises `ValueError` where it was not measured and the nearest will not do."""
        wanted = ticks / speed
        if not self.calibration:
            return wanted
        low, high = (self.calibration[i].equivalent_steps for i in (0, -1))
        nearest = min(max(wanted, low), high)
        if nearest != wanted and not self.takes_nearest:
            ends = _inward(max(ticks / high, 1), ticks / low)
            instead = f"a speed of {ends}, or a budget" if ticks >= low else "a budget"
            raise ValueError(
                f"speed must ask for {_inward(low, high)} equivalent steps, for which this policy was calibrated, "
                f"got {wanted:.4g}; with {ticks} steps give {instead}"
            )
        if nearest != wanted:
            self.notes = (
                f"speed={speed:g} asks for {wanted:.3g} equivalent steps; {nearest:.3g}, the nearest that this policy "
                "was calibrated for, were taken",
            )
        return setting_for(self.calibration, nearest)

    def decide_compute(self, state: DenoiseState) -> ComputeDecision:
        if state.tick == 0:
            self._check_model(state)
        names = self.heads.config.heads
        action = torch.full_like(state.nfe, COMPUTE, dtype=torch.int8)
        sparsity = torch.zeros_like(state.nfe, dtype=torch.int32)
        if "cache" in names:
            seen = (state.latents - state.reference).masked_fill(
                ~state.has_reference[:, None, None, None], 0.0
            )
            live = state.has_reference & ~state.done & ~self._is_spent(state)
            prior = torch.zeros(len(live), 2, device=live.device)
            if self.prior is not None:  # whose walk computes at every tick
                prior[:, 1:] = _SELDOM
            chosen = self._choose("cache", state, seen, prior, live, self._lesson(state))
            action = torch.where(live, chosen, COMPUTE).to(torch.int8)
        if "sparse" in names:
            live = (action == COMPUTE) & ~state.done & ~self._is_spent(state)
            prior = torch.full((len(live), self.heads.config.levels), _SELDOM, device=live.device)
            prior[:, 0] = 0.0
            taught = self._lesson(state)
            chosen = self._choose("sparse", state, state.latents, prior, live, taught)
            sparsity = chosen.to(torch.int32)
        return ComputeDecision(action=action, sparsity=sparsity)

    def _check_model(self, state: DenoiseState) -> None:
        """Another model of the same family may have other sizes."""
        config, asked = self.heads.config, f"for which {self.name} was made"
        channels, width = state.latents.shape[1], state.conditioning.shape[1]
        if config.sampled and channels != config.channels:
            raise ValueError(
                f"transformer must have latents of {config.channels} channels, {asked}, got {channels}"
            )
        if width != config.conditioning:
            raise ValueError(
                f"transformer must have an embedding of {config.conditioning}, {asked}, got {width}"
            )

    def _lesson(self, state: DenoiseState) -> torch.Tensor | None:
        """What a teacher's images do before the forward: compute, densely. None without a teacher."""
        return None if self._teacher is None else torch.zeros_like(state.nfe, dtype=torch.int64)

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        assert state.computes is not None
        self._note(velocity, state.computes)
        if state.tick == 0:
            self._allocate(state)
        ratio, taught, forced = None, None, torch.zeros_like(state.done)
        if self.prior is not None:
            self._left = self.prior.left(state, velocity, self._stretch)
            ratio, forced = self.prior.ratio(state.sigma, self._left), self._left <= 1
        if self._teacher is not None:
            left = self._teacher.left(state, velocity, self._stretch)
            taught, forced = self._teacher.ratio(state.sigma, left), left <= 1
        if state.tick + 1 >= self._run.ticks:  # the run ends here, whatever anybody says
            forced = torch.ones_like(forced)
        if "step" in self.heads.config.heads:
            prior = (
                torch.zeros(len(forced), 2, device=forced.device)
                if ratio is None
                else step_logits(ratio)
            )
            ratio = self._choose("step", state, velocity, prior, ~forced & ~state.done, taught)
        assert ratio is not None
        following = torch.where(forced, 0.0, state.sigma * ratio)
        following = following.masked_fill(following < SIGMA_MIN, 0.0)
        planned = self._left
        self._left = planned - state.computes.float()  # for who decides before the next forward
        if self.prior is not None and self.prior.fitted is not None and self.order == AUTO:
            return self.prior.fitted.decision(following, state.nfe + planned, state.nfe)
        order = torch.full_like(state.nfe, self.order, dtype=torch.int8)
        return StepDecision(next_sigma=following, order=order)

    @property
    def plans_images(self) -> bool:
        """Whether every image has a number of evaluations of its own in the run that has begun."""
        if self.prior is None or self._is_level:
            return False
        return self.prior.allocates and not self.prior.is_elsewhere

    def _allocate(self, state: DenoiseState) -> None:
        head = self.heads.allocation
        if head is None or not self.plans_images:
            return
        assert self.prior is not None
        dial = torch.full_like(state.sigma, self.prior.mean)
        with torch.no_grad():
            self._stretch = head(state.conditioning.bfloat16(), dial).exp()

    def _choose(
        self,
        head: str,
        state: DenoiseState,
        seen: torch.Tensor,
        prior: torch.Tensor,
        live: torch.Tensor,
        taught: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ask a head about all images, and record what it said; or what it was taught, which is taken instead."""
        observation = observe(seen, self.heads.config.side)
        conditioning = state.conditioning.bfloat16()
        scalars = self._scalars(state, observation)
        logits = prior
        if self._share > 0:
            with torch.no_grad():
                logits = self.heads(head, observation, conditioning, scalars, prior)
            logits = prior.lerp(logits, self._share)
        if taught is not None:
            action = taught
        elif head == "step":
            alpha, beta = concentrations(logits)
            sampled = None if self._noise is None else self._noise.ratio(state.tick, alpha, beta)
            action = beta_mode(alpha, beta) if sampled is None else sampled
        elif self._noise is None:
            action = logits.argmax(1)
        else:
            action = self._noise.choice(state.tick, HEADS.index(head), logits)
        if self._record is not None:
            self._record(
                Decision(
                    head=head,
                    tick=state.tick,
                    observation=observation,
                    conditioning=conditioning,
                    scalars=scalars,
                    prior=prior,
                    action=action,
                    live=live,
                )
            )
        return action

    def _scalars(self, state: DenoiseState, observation: torch.Tensor) -> torch.Tensor:
        """In the order of `SCALARS`."""
        ticks = self._run.ticks
        planned = None if self.prior is None else self.prior.mean * self._stretch
        drift = torch.where(state.has_reference, state.drift, math.nan)
        rms = observation.float().square().mean((1, 2, 3)).sqrt()
        return with_validity(
            [
                None if planned is None else planned / ticks,
                None if planned is None else self._left / planned,
                self._left / (ticks - state.tick),
                state.since_compute / ticks,
                drift,
                self._change,
                self._change_before,
                (rms + 1e-4).log(),
                state.sigma.clamp(min=1e-4).log(),
            ],
            len(state.sigma),
        )

    def _note(self, velocity: torch.Tensor, computes: torch.Tensor) -> None:
        """Remember how much the velocity changed between computes."""
        if self._velocity is None:
            self._velocity = velocity
            return
        change = _norm(velocity - self._velocity) / _norm(velocity).clamp(min=1e-6)
        self._change_before = torch.where(computes, self._change, self._change_before)
        self._change = torch.where(computes, change, self._change)
        self._velocity = torch.where(computes[:, None, None, None], velocity, self._velocity)

    def _is_spent(self, state: DenoiseState) -> torch.Tensor:
        budget = self._run.budget
        return state.nfe >= (self._run.ticks + 1 if budget is None else budget)


def concentrations(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and beta of a step's distribution, `[B]` each, from its logits `[B, 2]`."""
    alpha, beta = (1 + logits.exp()).unbind(1)
    return alpha, beta


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.float().square().sum((1, 2, 3)).sqrt()

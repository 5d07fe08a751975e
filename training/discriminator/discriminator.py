# SPDX-License-Identifier: Apache-2.0
"""The discriminator as a player: what it has seen, how it learns, what it pays (METHOD.md, sections 3 and 4).

An iteration is: score the new pictures with the head as it stands, `add` them with their positives, `update` once.
Rewards of an iteration thus come from one head and one pair of running statistics.

All of it lives on the CPU, in float32, whatever device the encoder is on: the head is small. Data-parallel ranks hold
equal copies: `add` takes the features gathered from all ranks, in one order on all of them. The update is then the same
everywhere, for its draws depend on (seed, step) alone.

Shape letters: B pictures, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

import torch

from rapid3rt.errors import StateError
from training.discriminator.alarms import MESSAGES, Alarms
from training.discriminator.buffer import FIELDS, PairBuffer
from training.discriminator.config import DiscriminatorConfig
from training.discriminator.diagnostics import accuracy, auc, bin_of, by_nfe, paired
from training.discriminator.features import Features
from training.discriminator.head import Head, cross_entropy, r1
from training.discriminator.scale import RewardScale
from training.seeds import seed_of

_IDENTITY: dict[str, Callable[[Mapping[str, torch.Tensor]], object]] = {
    "features": lambda state: bytes(state["features"].tolist()).decode(),
    "seed": lambda state: int(state["seed"]),
    "capacity": lambda state: int(state["buffer/counters"][0]),
    "hidden": lambda state: len(state["head/adapter.weight"]),
}
"""What a saved state and the discriminator that goes on from it must have in common."""


class Discriminator:
    """A head on frozen features that tells accelerated pictures from the frozen generator's own full ones.

    seed: 0 to 2^63 - 1; decides the head's first weights and every draw. Raises ValueError for features too wide.
    """

    def __init__(self, features: Features, config: DiscriminatorConfig, *, seed: int) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in 0..2^63 - 1, got {seed}")
        self.features, self.config, self._seed = features, config, seed
        self._head = Head(features.width, config.hidden, _generator(seed, "weights"))
        self._optimiser = torch.optim.Adam(
            self._head.parameters(), lr=config.learning_rate, betas=config.betas
        )
        self._buffer = PairBuffer(config.capacity)
        self._scale = RewardScale(config.momentum, config.clip)
        self._alarms = Alarms(config.patience, config.saturated_at, config.blind_below)
        self._steps = 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Features as `add` and `score` take them: float32 on the CPU, `[B, width]` or `[B, N, width]`.

        images: float `[B, 3, H, W]` in 0..1, on any device. They are rounded to 8 bits, as they will be saved: a head
        on unrounded ones counts steps by noise that nobody sees. Tiny SD3 at 10 steps: 0.9 of held-out pairs told
        instead of 0.65, and of the pictures of 6 steps those that are least wrong look worst to it.
        """
        _check_images(images)
        saved = (images.float() * 255).round() / 255
        return self._stored("features", self.features(saved)).float()

    def reward(self, images: torch.Tensor) -> torch.Tensor:
        """How much pictures look like those of full runs: `score` of their features, float32 `[B]` on the CPU."""
        return self.score(self.encode(images))

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Reward d = clip((logit - running mean) / running std, -clip, clip): float32 `[B]`.

        The same for the same features until the next update. 0 for all before the first: nothing is known yet.
        """
        logits = self._logits(self._stored("features", features).float())
        return self._scale.pay(logits) if self._scale.is_set else torch.zeros_like(logits)

    def add(
        self, fake_features: torch.Tensor, real_features: torch.Tensor, nfe: torch.Tensor
    ) -> None:
        """Put pairs into the buffer, as float16.

        fake_features: of accelerated pictures, of all ranks, in the same order on all of them.
        real_features: row by row those of the full picture of the same prompt and noise; repeated within a group.
        nfe: evaluations of the accelerated pictures, `[B]` of any dtype: whole numbers, at least 1.

        Raises ValueError for shapes that do not match and for values that are not finite in float16.
        """
        fake = self._stored("fake_features", fake_features)
        real = self._stored("real_features", real_features)
        if real.shape != fake.shape:
            raise ValueError(
                f"real_features must have the shape of fake_features, {tuple(fake.shape)}, got {tuple(real.shape)}"
            )
        self._buffer.add(fake, real, _checked_nfe(nfe, len(fake)))

    def update(self) -> dict[str, float]:
        """Learn from the buffer, then move the running statistics. Returns what is to be logged.

        Of the newest pairs, before anything was learned from them: `accuracy`, `auc`, `paired` (share of pairs in the
        right order), the last two also per bin that has pairs (`auc@8`, its upper edge), `logit_real`, `logit_fake`,
        `clipped` (share of rewards). Over this update's batches: mean `loss` and `gradient_penalty`, and `skipped`, the
        share of them that was not learned from. `running_mean` and `running_std` are those of all rewards from here on.
        `saturated` and `blind` are 0 or 1; `alarm` says what to do.

        Raises StateError where nothing was added yet.
        """
        if not len(self._buffer):
            raise StateError("update must come after add, got an empty buffer")
        if not self._scale.is_set:
            self._head.standardise(self._buffer.rows(self._buffer.all_rows())[1])
        fake, real, nfe = self._buffer.rows(self._buffer.newest())
        diagnostics = self._judge(self._logits(real), self._logits(fake), nfe) | self._learn()
        self._scale.move(self._logits(fake))
        self._buffer.close()
        return diagnostics | {
            "running_mean": self._scale.mean,
            "running_std": self._scale.std,
            "saturated": float(self._alarms.kind in ("saturated", "clipped")),
            "blind": float(self._alarms.kind == "blind"),
        }

    @property
    def alarm(self) -> str:
        """One sentence on what is wrong and what to do; empty where nothing is."""
        return MESSAGES[self._alarms.kind]

    @property
    def num_parameters(self) -> int:
        """Of the head; below a million."""
        return sum(p.numel() for p in self._head.parameters())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that the next update and the next reward depend on, as tensors that safetensors can hold."""
        state = {
            "features": torch.tensor(list(self.features.name.encode()), dtype=torch.uint8),
            "seed": torch.tensor(self._seed),
            "steps": torch.tensor(self._steps),
        }
        for name, part in self._parts():
            state |= {f"{name}/{k}": v.clone() for k, v in part.state_dict().items()}
        for i, moments in self._optimiser.state_dict()["state"].items():
            state |= {f"optimiser/{i}/{k}": v.clone() for k, v in moments.items()}
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave: the next update has the same bits as if there had been no stop.

        Raises ValueError for the state of other features, another seed, head or capacity; nothing has changed then.
        """
        _check_same(state, self.state_dict())
        for name, part in self._parts():
            part.load_state_dict(_under(state, name))
        self._steps = int(state["steps"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in _under(state, "optimiser").items():
            i, field = key.split("/")
            moments.setdefault(int(i), {})[field] = value.clone()
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})

    def _parts(self) -> tuple[tuple[str, Head | PairBuffer | RewardScale | Alarms], ...]:
        return (
            ("head", self._head),
            ("buffer", self._buffer),
            ("scale", self._scale),
            ("alarms", self._alarms),
        )

    def _stored(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """Features as the buffer holds them: rounded to float16, on the CPU. Scoring rounds as training does."""
        shape, width = tuple(features.shape), self.features.width
        if len(shape) not in (2, 3) or shape[-1] != width or not all(shape[1:]):
            raise ValueError(
                f"{name} must be of shape (B, {width}) or (B, N, {width}), got {shape}"
            )
        if self._buffer.shape not in (None, shape[1:]):
            raise ValueError(
                f"{name} must be of the shape of those before, (B, *{self._buffer.shape}), got {shape}"
            )
        stored = features.detach().to("cpu", torch.float16)
        wrong = (~stored.isfinite()).flatten(1).any(1).nonzero()
        if len(wrong):
            row = int(wrong[0])
            value = float(features[row].abs().max())
            raise ValueError(f"{name} must be finite in float16, got {value} in row {row}")
        return stored

    @torch.no_grad()
    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(self._head.normalised(features))
        return logits

    def _judge(self, real: torch.Tensor, fake: torch.Tensor, nfe: torch.Tensor) -> dict[str, float]:
        """Diagnostics of the logits of pairs; the alarms take note."""
        edges = self.config.nfe_bins
        areas, shares = (by_nfe(measure, real, fake, nfe, edges) for measure in (auc, paired))
        area, clipped = auc(real, fake), self._scale.clipped(fake)
        lowest = max(next(iter(areas.values())), next(iter(shares.values())))
        self._alarms.note(area=area, clipped=clipped, lowest=lowest)
        return {
            "accuracy": accuracy(real, fake),
            "auc": area,
            **{f"auc@{edge}": value for edge, value in areas.items()},
            "paired": paired(real, fake),
            **{f"paired@{edge}": value for edge, value in shares.items()},
            "logit_real": float(real.mean()),
            "logit_fake": float(fake.mean()),
            "clipped": clipped,
        }

    def _learn(self) -> dict[str, float]:
        """The steps of one update, and the means of what they tell."""
        steps = self.config.steps if self._scale.is_set else self.config.first_steps
        told = zip(*(self._step() for _ in range(steps)), strict=True)
        names = ("loss", "gradient_penalty", "skipped")
        return {name: fmean(values) for name, values in zip(names, told, strict=True)}

    def _step(self) -> tuple[float, float, float]:
        """One batch: its loss, its gradient penalty, and 1 where it was not learned from."""
        fake, real, _ = self._buffer.rows(self._draw())
        fake, real = (self._head.normalised(x) for x in (fake, real))
        real.requires_grad_()
        real_logits, fake_logits = self._head(real), self._head(fake)
        loss = cross_entropy(real_logits, fake_logits, self.config.label_smoothing)
        penalty = r1(real_logits, real)
        skipped = accuracy(real_logits, fake_logits) > self.config.skip_above
        if not skipped:
            self._optimiser.zero_grad()
            (loss + self.config.r1_weight / 2 * penalty).backward()
            self._optimiser.step()
        self._steps += 1
        return float(loss.detach()), float(penalty.detach()), float(skipped)

    def _draw(self) -> torch.Tensor:
        """Row numbers of a batch, int64 `[batch]`: every bin of evaluations that has pairs is as likely."""
        bins = bin_of(self._buffer.nfe(), self.config.nfe_bins)
        weights = 1 / torch.bincount(bins)[bins].double()
        generator = _generator(self._seed, "batch", self._steps)
        return torch.multinomial(weights, self.config.batch, replacement=True, generator=generator)


def _generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def _under(state: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _check_same(saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where a saved state is not of a discriminator like this one."""
    varying = ("optimiser/", *(f"buffer/{field}" for field in FIELDS))
    missing = sorted(k for k in own.keys() - saved.keys() if not k.startswith(varying))
    if missing:
        raise ValueError(f"state must hold {missing[0]}, got {len(saved)} tensors without it")
    for name, value_of in _IDENTITY.items():
        there, here = value_of(saved), value_of(own)
        if there != here:
            raise ValueError(f"{name} must be that of the saved discriminator, {there}, got {here}")


def _check_images(images: torch.Tensor) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or not all(shape[1:]) or not images.is_floating_point():
        raise ValueError(
            f"images must be floats of shape (B, 3, H, W), got {images.dtype} of {shape}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):  # NaN is refused too
        low, high = (float(bound) for bound in images.aminmax())
        raise ValueError(f"images must be in 0..1, got values of {low:.3g} to {high:.3g}")


def _checked_nfe(nfe: torch.Tensor, count: int) -> torch.Tensor:
    if tuple(nfe.shape) != (count,):
        raise ValueError(f"nfe must be of shape ({count},), got {tuple(nfe.shape)}")
    values = nfe.detach().to("cpu", torch.float64)
    wrong = values[~((values >= 1) & (values == values.round()) & values.isfinite())]
    if len(wrong):
        raise ValueError(f"nfe must be whole numbers of at least 1, got {float(wrong[0])}")
    return values.long()

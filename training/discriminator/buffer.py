# SPDX-License-Identifier: Apache-2.0
"""The replay buffer: features of accelerated pictures, each beside those of the full picture of its prompt and noise.

Float16 features, not pictures. A row is a pair and is overwritten as one, so a negative never loses its positive.
Contract: tests/training/test_discriminator_parts.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

FIELDS = ("fake", "real", "nfe")


class PairBuffer:
    """A ring of at most `capacity` pairs; the oldest are overwritten first. Lives on the CPU.

    The newest generation is what came since the last `close`, or before it where nothing came since.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: dict[str, torch.Tensor] = {}
        self._cursor = self._filled = self._newest = 0
        self._closed = False

    def __len__(self) -> int:
        return self._filled

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the features of one picture; None before the first pair."""
        return tuple(self._rows["fake"].shape[1:]) if self._rows else None

    def add(self, fake: torch.Tensor, real: torch.Tensor, nfe: torch.Tensor) -> None:
        """Append pairs: float16 `[n, ...]` twice and int64 `[n]`. Of more than fit, the last ones stay."""
        count = min(len(fake), self.capacity)
        if not count:
            return
        place = (self._cursor + torch.arange(count)) % self.capacity
        for name, rows in zip(FIELDS, (fake, real, nfe), strict=True):
            if name not in self._rows:
                self._rows[name] = rows.new_zeros(self.capacity, *rows.shape[1:])
            self._rows[name][place] = rows[-count:]
        self._cursor = (self._cursor + count) % self.capacity
        self._filled = min(self._filled + count, self.capacity)
        self._newest = min((0 if self._closed else self._newest) + count, self.capacity)
        self._closed = False

    def close(self) -> None:
        """What is added from here on is a new generation."""
        self._closed = True

    def newest(self) -> torch.Tensor:
        """Row numbers of the newest generation, oldest first: int64 `[n]`."""
        return (self._cursor - self._newest + torch.arange(self._newest)) % self.capacity

    def rows(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pairs by row number: fake and real as float32 `[n, ...]`, nfe int64 `[n]`."""
        fake, real, nfe = (self._rows[name][index] for name in FIELDS)
        return fake.float(), real.float(), nfe

    def all_rows(self) -> torch.Tensor:
        """Row numbers of every pair: int64 `[n]`."""
        return torch.arange(self._filled)

    def nfe(self) -> torch.Tensor:
        """Of every pair: int64 `[n]`."""
        return self._rows["nfe"][: self._filled]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Pairs, in their places, and counters: all that a new buffer of the same capacity needs."""
        counters = (self.capacity, self._cursor, self._filled, self._newest, int(self._closed))
        rows = {name: rows[: self._filled].clone() for name, rows in self._rows.items()}
        return {"counters": torch.tensor(counters), **rows}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become the buffer that was saved, which must be of the same capacity."""
        capacity, cursor, filled, newest, closed = state["counters"].tolist()
        self._rows = {}
        for name in FIELDS:
            if name in state:
                rows = state[name]
                self._rows[name] = rows.new_zeros(capacity, *rows.shape[1:])
                self._rows[name][:filled] = rows
        self._cursor, self._filled, self._newest = cursor, filled, newest
        self._closed = bool(closed)

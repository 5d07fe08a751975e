# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, as accelerate or torchrun started them; one process where nobody did.

Groups are dealt whole, by number and cost. Every reduction is called by all ranks the same number of times, outside of
what depends on data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)
"""Of ranks for each other: while one builds a bank or loads a model, or a server scores."""


class Ranks:
    """This process among all."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator.num_processes < started:
            # Each would run the whole training, and all write to one folder.
            raise ValueError(
                f"WORLD_SIZE must be the number of processes that accelerate joins, {accelerator.num_processes}, got "
                f"{started}"
            )
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.device: torch.device = accelerator.device

    @classmethod
    def join(cls) -> Ranks:
        """Join the others. Without an accelerator that is by gloo: told so, accelerate finds what torchrun started."""
        patience = InitProcessGroupKwargs(timeout=_PATIENCE)
        on_cpu = not torch.accelerator.is_available()
        return cls(Accelerator(cpu=on_cpu, kwargs_handlers=[patience]))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    def share(self, items: Sequence[T], costs: Sequence[float] | None = None) -> list[T]:
        """The items of this rank, in their order: dealt in turn, so that ranks get as many, or one fewer.

        costs: of the items; the dearest is dealt first, each to the rank that has least to do. All ranks wait for the
        last one (simulated, 8 groups of the five dials on 2 ranks: 1.95 times as fast as one, 1.82 in turn).
        """
        weights = [1.0] * len(items) if costs is None else costs
        loads, own = [0.0] * self.count, []
        for i in sorted(range(len(items)), key=lambda i: (-weights[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += weights[i]
            own += [i] if rank == self.index else []
        return [items[i] for i in sorted(own)]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks, in float64. All ranks must name the same values in the same order."""
        if self.count == 1:
            return dict(values)
        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(flat)
        return dict(zip(values, flat.tolist(), strict=True))

    def max(self, value: float) -> float:
        """The largest over ranks."""
        if self.count == 1:
            return value
        flat = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
        return float(flat)

    def add(self, values: torch.Tensor) -> None:
        """Add up a tensor of all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)

    def copy_main(self, module: torch.nn.Module) -> None:
        """Give all ranks the weights of the main one: processors round what is fitted in ways of their own."""
        if self.count == 1:
            return
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks, `[n, ...]` of each, rank by rank, on the CPU; their numbers may differ."""
        if self.count == 1:
            return rows.cpu()
        own = rows.to(self.device).contiguous()
        counts = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        counts[self.index] = len(own)
        dist.all_reduce(counts)
        longest = int(counts.max())
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)]).cpu()

    def require_equal(self, what: str, value: str) -> None:
        """Raise `ValueError` on every rank unless all of them say the same."""
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        said = self.gather(torch.tensor([digest], dtype=torch.int64))
        odd = (said != said[0]).nonzero().flatten().tolist()
        if odd:
            raise ValueError(
                f"{what} must be the same on all ranks, got another one on rank {odd[0]} than on rank 0"
            )

    def main_first(self, do: Callable[[], T]) -> T:
        """Call on the main rank, then on all others. What it raises is raised when no rank waits for this one any more.

        do: must not reduce. It must raise on all ranks or on none, as what looks at the same files does.
        """
        failure: Exception | None = None
        for turn in (True, False):
            if self.is_main == turn:
                try:
                    result = do()
                except Exception as error:
                    failure = error
            self.wait()
        if failure is not None:
            raise failure
        return result

    def wait(self) -> None:
        """Until all ranks are here."""
        self._accelerator.wait_for_everyone()

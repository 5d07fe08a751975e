# SPDX-License-Identifier: Apache-2.0
"""Run one transformer call under a plan: computed rows through the blocks, reused ones from the cache, done ones never.

Reads nothing from the device. When all rows compute densely the tensors pass through untouched: the plain model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from rapid3rt import ops
from rapid3rt.adapters.base import Adapter, Embedded, SparseRows
from rapid3rt.cache import ResidualCache
from rapid3rt.errors import UnsupportedError
from rapid3rt.planning.planner import RowPlan
from rapid3rt.runtime.deferred import deferred_call


class Executor:
    """Bound to one adapter.

    Parameters
    ----------
    adapter: of the transformer's family.
    backend: as in `rapid3rt.ops`. exact: dense rows keep the model's own attention; else the sparse kernel takes all.
    """

    def __init__(self, adapter: Adapter, backend: str | None, exact: bool) -> None:
        self.adapter, self.backend, self.exact = adapter, backend, exact

    @property
    def attention(self) -> str:
        """The mode by its name."""
        return "exact" if self.exact else "fast"

    def run(
        self,
        transformer: Any,
        kwargs: Mapping[str, Any],
        embedded: Embedded,
        position: torch.Tensor | None,
        timestep: torch.Tensor,
        plan: RowPlan,
        branches: tuple[str, ...],
        images: int,
        cache: ResidualCache,
        block: int,
    ) -> torch.Tensor:
        """Velocity of all rows `[R, C, h, w]`, zeros where done.

        Parameters
        ----------
        embedded: rows that are not known to be done. position: int64 `[R]`, where row r sits in `embedded` (None: at
        r). timestep: float32 `[R]`. plan, branches, images: what to run. cache: where residuals live.
        block: tokens per attention block.
        """
        rows = plan.rows.long()
        num_compute = len(plan.compute)
        whole = plan.is_dense and position is None
        if not whole:
            source = rows if position is None else position[rows]
            image = ops.gather_rows(embedded.image, source.int(), backend=self.backend)
            embedded = Embedded(image=image, temb=embedded.temb.index_select(0, source))
        parts = []
        if num_compute:
            computed = Embedded(
                image=embedded.image[:num_compute], temb=embedded.temb[:num_compute]
            )
            taken = None if whole else rows[:num_compute]
            given = self._with_controlnet(kwargs, timestep, plan, images)
            out = self._blocks(transformer, given, computed, taken, timestep, plan, block)
            self._store(plan, branches, images, cache, out, computed.image)
            parts.append(out)
        if plan.reuse:
            parts.append(self._lookup(plan, branches, images, cache, embedded.image[num_compute:]))
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        velocity = self.adapter.finish(transformer, kwargs, hidden, embedded.temb)
        if whole:
            return velocity
        full = velocity.new_zeros(plan.total, *velocity.shape[1:])
        ops.scatter_rows(full, velocity, plan.rows, backend=self.backend)
        return full

    def _with_controlnet(
        self, kwargs: Mapping[str, Any], timestep: torch.Tensor, plan: RowPlan, images: int
    ) -> Mapping[str, Any]:
        """The call's arguments, with what the pipeline's ControlNet gives for the rows that compute."""
        names = self.adapter.controlnet.outputs
        call = deferred_call(kwargs, names)
        if call is None:
            return kwargs
        if call.num_rows not in (images, plan.total):
            raise UnsupportedError(
                f"hidden_states of the ControlNet must have {images} or {plan.total} rows, got {call.num_rows}"
            )
        # One row per image: the branches share it (FLUX true CFG); their rows repeat the images in order.
        rows = [row % call.num_rows for row in plan.compute]
        time = self.adapter.model_time(kwargs, timestep[: call.num_rows])
        samples = call.samples(rows, time)
        handles = {name: kwargs[name] for name in names if kwargs[name] is not None}
        return {**kwargs, **{name: samples[h.which] for name, h in handles.items()}}

    def _blocks(
        self,
        transformer: Any,
        kwargs: Mapping[str, Any],
        embedded: Embedded,
        rows: torch.Tensor | None,
        timestep: torch.Tensor,
        plan: RowPlan,
        block: int,
    ) -> torch.Tensor:
        sparse = nullcontext()
        # Fast: also where no row is sparse, so that an image's kernel never hangs on its neighbours.
        if not self.exact or plan.num_dense < len(plan.compute):
            levels = SparseRows(
                num_dense=plan.num_dense if self.exact else 0,
                levels=plan.levels,
                block=block,
                backend=self.backend,
            )
            sparse = self.adapter.sparse_attention(transformer, kwargs, levels)  # type: ignore[assignment]
        times = timestep if rows is None else timestep[rows]
        with sparse:
            return self.adapter.run_blocks(transformer, kwargs, embedded, rows, times)

    def _store(
        self,
        plan: RowPlan,
        branches: tuple[str, ...],
        images: int,
        cache: ResidualCache,
        out: torch.Tensor,
        embedded: torch.Tensor,
    ) -> None:
        for b, branch in enumerate(branches):
            where = [i for i, row in enumerate(plan.compute) if row // images == b]
            if where:
                kept = [plan.compute[i] % images for i in where]
                chosen = _select(where, out.device)
                slot = torch.tensor(kept, dtype=torch.int32, device=out.device)
                cache.store(branch, kept, slot, out[chosen], embedded[chosen])

    def _lookup(
        self,
        plan: RowPlan,
        branches: tuple[str, ...],
        images: int,
        cache: ResidualCache,
        embedded: torch.Tensor,
    ) -> torch.Tensor:
        parts = []
        for b, branch in enumerate(branches):
            where = [i for i, row in enumerate(plan.reuse) if row // images == b]
            if where:
                slot = torch.tensor(
                    [plan.reuse[i] % images for i in where],
                    dtype=torch.int32,
                    device=embedded.device,
                )
                parts.append(cache.lookup(branch, slot, embedded[_select(where, embedded.device)]))
        # Reuse rows are listed branch by branch, so the parts join in the plan's order.
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _select(where: list[int], device: torch.device) -> Any:
    """A slice where the positions are consecutive (a view, no copy), else an index tensor."""
    if where == list(range(where[0], where[-1] + 1)):
        return slice(where[0], where[-1] + 1)
    return torch.tensor(where, dtype=torch.int64, device=device)

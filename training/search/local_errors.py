# SPDX-License-Identifier: Apache-2.0
"""Local errors of single steps of the solver, from what was recorded along the converged solution.

The local error of a step is where it ends, beginning on the converged solution, less where that is there. Without any
further evaluation it is known for every step between points of the lattice, at every order: order 2 extrapolates from
the compute before, so it depends on three points, h, i and j.

Shape letters: P pairs, M intervals of the lattice, N steps.
"""

from __future__ import annotations

import torch

from rapid3rt.runtime.solver import CALM_LIMIT, LIMIT, MAX_STEP_RATIO
from rapid3rt.types import AUTO, EULER
from training.search.lattice import Lattice
from training.search.recording import Recording, stride

_MOST_CONTENT = 6.0


class LocalErrors:
    """Mean over pairs of the squared local errors of single steps, weighted.

    weights: float64 `[P]`, mean 1. An inverse root of each pair's error makes their mean follow the mean root error,
    which does not hang on the few hardest images.
    """

    def __init__(self, lattice: Lattice, recording: Recording, weights: torch.Tensor) -> None:
        self.lattice, self.recording, self.weights = lattice, recording, weights
        self.sigmas = torch.tensor(lattice.sigmas, dtype=torch.float64)
        self._levels = {
            level: self._over_lattice(recording.levels[:, i])
            for i, level in enumerate(lattice.levels)
        }
        self._stale, self._drift = self._stale_tables() if lattice.reuse else (torch.empty(0),) * 2

    def _mean(self, per_pair: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = torch.tensordot(self.weights, per_pair, dims=1) / len(self.weights)
        return mean

    def _over_lattice(self, per_pair: torch.Tensor) -> torch.Tensor:
        """Values at every second coarse point, `[P, points]`, to all M lattice points, linearly."""
        values, step = self._mean(per_pair), 2 * stride(self.lattice.end)
        at = torch.arange(self.lattice.end, dtype=torch.float64) / step
        low = at.long().clamp(max=len(values) - 1)
        high = (low + 1).clamp(max=len(values) - 1)
        return values[low] + (at - low) * (values[high] - values[low])

    def compute(
        self, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor, order: int
    ) -> torch.Tensor:
        """Of dense steps from i to j, the compute before at h (h = i: none). All int64 `[N]`; float64 `[N]`."""
        gram, size = self.recording.gram, self.recording.size
        d, slope = self.sigmas[j] - self.sigmas[i], self._slope(h, i, j, order)
        a, b = d * (1 + slope), -d * slope
        # The error is x_i - x_j + a v_i + b v_h; its square, from inner products.
        vi, vh = size + 1 + i, size + 1 + h
        square = gram[:, i, i] + gram[:, j, j] - 2 * gram[:, i, j]
        square = square + a * a * gram[:, vi, vi] + b * b * gram[:, vh, vh]
        square = square + 2 * a * b * gram[:, vi, vh]
        square = square + 2 * a * (gram[:, i, vi] - gram[:, j, vi])
        square = square + 2 * b * (gram[:, i, vh] - gram[:, j, vh])
        return self._mean(square.clamp(min=0))

    def _slope(self, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor, order: int) -> torch.Tensor:
        """How much of v_i - v_h the solver adds to v_i, `[P, N]` (`runtime.solver`)."""
        if order == EULER:
            return torch.zeros(1, len(i), dtype=torch.float64)
        d, gap = self.sigmas[j] - self.sigmas[i], self.sigmas[i] - self.sigmas[h]
        there = gap != 0
        safe = torch.where(there, gap, 1.0)
        slope = torch.where(there, (d / 2 / safe).clamp(max=MAX_STEP_RATIO / 2), 0.0)
        return slope * self._stability(h, i, d, safe) if order == AUTO else slope[None]

    def _stability(
        self, h: torch.Tensor, i: torch.Tensor, d: torch.Tensor, gap: torch.Tensor
    ) -> torch.Tensor:
        """The weight of AUTO, `[P, N]`. The compute before h, of which it asks only a sign, is taken to mirror i."""
        size = self.recording.size
        gram, before = self.recording.gram, (2 * h - i).clamp(min=0)
        vi, vh, vb = size + 1 + i, size + 1 + h, size + 1 + before
        dv_dv = gram[:, vi, vi] + gram[:, vh, vh] - 2 * gram[:, vi, vh]
        dv_dx = gram[:, i, vi] - gram[:, i, vh] - gram[:, h, vi] + gram[:, h, vh]
        turned = gram[:, vi, vh] - gram[:, vi, vb] - gram[:, vh, vh] + gram[:, vh, vb]
        limit = torch.where((turned > 0) & (h > 0), CALM_LIMIT, LIMIT)
        reach, ratio = d.abs() * dv_dv, d / gap
        weight = ((limit * dv_dx - reach) / (ratio * reach)).nan_to_num(1.0).clamp(0, 1)
        return torch.where(dv_dx < 0, 1.0, weight)

    def _stale_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Root distance of a velocity from the residual of h reused at i, `[M, M]`, and what it adds up to from h to i.

        Beyond the window as at its end; at h itself the residual is exact.
        """
        reuse, end = self._mean(self.recording.reuse), self.lattice.end
        step, (points, window) = stride(end), reuse.shape
        rows = torch.cat([torch.zeros(points, 1, dtype=torch.float64), reuse], 1)
        h, i = torch.meshgrid(torch.arange(end), torch.arange(end), indexing="ij")
        after = ((i - h) / step).clamp(0, window)
        low = after.long().clamp(max=window - 1)
        row = (h // step).clamp(max=points - 1)
        stale = rows[row, low] + (after - low) * (rows[row, low + 1] - rows[row, low])
        drift = (stale.sqrt() * self.sigmas.diff().abs()).cumsum(1)
        return stale.sqrt(), torch.cat([torch.zeros(end, 1, dtype=torch.float64), drift], 1)

    def reuse(self, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """What a step from i to j adds to the squared error when the residual of h is reused, float64 `[N]`.

        All reuses of one residual err in the same direction, so their errors add up before they are squared.
        """
        here = (self.sigmas[j] - self.sigmas[i]).abs() * self._stale[h, i]
        return self.content(j) * ((self._drift[h, i] + here) ** 2 - self._drift[h, i] ** 2)

    def sparse(self, i: torch.Tensor, j: torch.Tensor, level: int) -> torch.Tensor:
        """The same of a sparse compute, float64 `[N]`."""
        if level == 0:
            return torch.zeros(len(i), dtype=torch.float64)
        step = self.sigmas[j] - self.sigmas[i]
        return self.content(j) * step**2 * self._levels[level][i]

    def content(self, j: torch.Tensor) -> torch.Tensor:
        """Square of an error of x at sigma_j, as one of the image in it: x = (1 - sigma) image + sigma noise.

        Errors of a wrong velocity grow so while the noise goes (disturbed walks of tiny SD3 and FLUX: up to 6 times).
        """
        return (1 - self.sigmas[j]).clamp(min=1 / _MOST_CONTENT) ** -2

# SPDX-License-Identifier: Apache-2.0
"""Residuals of the block stack, one slot per (guidance branch, image).

A residual is the block stack's output minus its embedded input on image tokens. Which slots hold one is known on the
host, because the host planned the computes; nothing here reads the device.
"""

from __future__ import annotations

import torch

from rapid3rt import ops


class ResidualCache:
    """Slots `[B, 1, I, D]` per branch, allocated at the branch's first store.

    Parameters
    ----------
    images: B, the batch of the run.
    backend: as in `rapid3rt.ops`, None for automatic.
    keep: False where nobody will reuse: nothing is stored, no memory is taken.
    """

    def __init__(self, images: int, backend: str | None = None, *, keep: bool = True) -> None:
        self._images = images
        self._backend = backend
        self.keep = keep
        self._slots: dict[str, torch.Tensor] = {}
        self._filled: dict[str, set[int]] = {}

    def holds(self, branch: str, image: int) -> bool:
        """Whether this image has a residual in this branch."""
        return image in self._filled.get(branch, ())

    @property
    def num_bytes(self) -> int:
        """Memory held by all slots."""
        return sum(s.numel() * s.element_size() for s in self._slots.values())

    def clear(self) -> None:
        """Forget all residuals and give their memory back, whoever still holds this object."""
        self._slots.clear()
        self._filled.clear()

    def store(
        self,
        branch: str,
        images: list[int],
        slot: torch.Tensor,
        out: torch.Tensor,
        embedded: torch.Tensor,
    ) -> None:
        """Keep `out - embedded` for some images of a branch.

        Parameters
        ----------
        branch: name of the guidance branch.
        images: the images on the host; slot: the same as int32 `[R']` on the device.
        out, embedded: `[R', I, D]`, block stack output and embedded input.
        """
        if not self.keep:
            return
        if branch not in self._slots:
            self._slots[branch] = out.new_zeros(self._images, 1, *out.shape[1:])
        gap = torch.zeros(len(images), dtype=torch.float32, device=out.device)
        ops.cache_store(self._slots[branch], out, embedded, slot, gap, backend=self._backend)
        self._filled.setdefault(branch, set()).update(images)

    def lookup(self, branch: str, slot: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Embedded input plus the stored residual: `[R', I, D]`. slot: int32 `[R']` images that hold one."""
        coef = torch.ones(len(slot), 1, dtype=torch.float32, device=embedded.device)
        return ops.cache_lookup(embedded, self._slots[branch], slot, coef, backend=self._backend)

# SPDX-License-Identifier: Apache-2.0
"""On which GPUs the CUDA kernels have been proven: what `make gpu-check` has left behind, short and in the package.

The automatic choice takes the kernels only where a record names the GPU's compute capability and the dtype.
`benches/gpu_check.py` writes `proven.json` from its record, which stands under `benches/results/`; an installed wheel
knows this file alone.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_suffix(".json")
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A run of `make gpu-check` in which every part passed.

    capability: compute capability, major and minor. dtypes: names as in "bfloat16". device, driver, torch: of that
    machine. commit: of the sources that were built.
    """

    capability: tuple[int, int]
    dtypes: tuple[str, ...]
    device: str
    driver: str
    torch: str
    commit: str


def parse(text: str) -> tuple[Proof, ...]:
    """Read the text of a `proven.json`. Raises ValueError where it is none."""
    try:
        value: dict[str, Any] = json.loads(text)
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r} instead of {FORMAT}")
        return tuple(_proof(record) for record in value["records"])
    except (TypeError, KeyError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"proven.json must be what benches/gpu_check.py writes: {what}") from None


def _proof(record: dict[str, Any]) -> Proof:
    major, minor = (int(number) for number in record["capability"])
    dtypes = tuple(str(name) for name in record["dtypes"])
    rest = {name: str(record[name]) for name in ("device", "driver", "torch", "commit")}
    return Proof(capability=(major, minor), dtypes=dtypes, **rest)


@functools.cache
def proofs() -> tuple[Proof, ...]:
    """All that this package carries."""
    return parse(PATH.read_text())


def is_proven(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the CUDA kernels have passed `make gpu-check` on such a GPU in this dtype.

    Parameters
    ----------
    capability: as `torch.cuda.get_device_capability` gives it; another minor number is another GPU.
    """
    name = str(dtype).removeprefix("torch.")
    return any(p.capability == tuple(capability) and name in p.dtypes for p in proofs())

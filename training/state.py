# SPDX-License-Identifier: Apache-2.0
"""Nested state as flat tensors and a JSON tree, and back: the same bits, types and order.

Plain JSON knows neither tensors nor tuples, whole-number keys, NaN and infinity. Those become objects of one key that
begins with `$`; everything else stays readable. Tensors come back contiguous, on the CPU, each with storage of its own.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

State = Mapping[str, Any]
"""Text keys to tensors, int, float, str, bool, None, and dicts, lists and tuples of these; inner keys may be int."""

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool}
    | {torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
)
_MARK = "$"


def flatten(state: State) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by readable names (`optimiser/state/0/exp_avg`), and a tree for JSON that refers to them.

    Raises `ValueError` naming the entry that cannot be kept exactly.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a mapping, got {type(state).__name__}")
    tensors: dict[str, torch.Tensor] = {}
    tree: dict[str, Any] = _encode(state, (), tensors)
    return tensors, tree


def unflatten(tensors: Mapping[str, torch.Tensor], tree: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `flatten` took apart. Raises `ValueError` for a tensor that is missing."""
    state: dict[str, Any] = _decode(tree, tensors)
    return state


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of an optimiser's kind, moments and groups, and the shapes of its parameters."""
    moments = copy.deepcopy(optimiser.state_dict())
    return {"kind": type(optimiser).__name__, "parameters": _parameters(optimiser), **moments}


def load_optimiser_state(optimiser: torch.optim.Optimizer, state: State) -> None:
    """Put back a copy of what `optimiser_state` took.

    Raises `ValueError` if the kind, or a parameter's shape or dtype, is another: torch itself would cast the moments,
    or fail at the next step. The optimiser is then untouched.
    """
    if state["kind"] != type(optimiser).__name__:
        raise ValueError(f"optimiser must be {state['kind']}, got {type(optimiser).__name__}")
    for i, (there, here) in enumerate(zip_longest(state["parameters"], _parameters(optimiser))):
        if there != here:
            there, here = ("no parameter" if x is None else x for x in (there, here))
            raise ValueError(f"parameter {i} of the optimiser must be {there}, got {here}")
    optimiser.load_state_dict(
        copy.deepcopy({"state": state["state"], "param_groups": state["param_groups"]})
    )


def random_state() -> dict[str, Any]:
    """The generators of this process: torch's on the CPU and on the current GPU, numpy's and Python's."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
    }


def set_random_state(state: State) -> None:
    """Put back what `random_state` took.

    Raises `ValueError` where one of the two machines has a GPU and the other has none: draws would differ.
    """
    if (state["cuda"] is None) == torch.cuda.is_available():
        there, here = ("without", "with") if state["cuda"] is None else ("with", "without")
        raise ValueError(f"random state must be set on a machine {there} CUDA, got one {here}")
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    of_numpy, of_python = state["numpy"], state["python"]
    key = of_numpy["key"].numpy().astype(np.uint32)
    legacy = ("MT19937", key, of_numpy["position"], of_numpy["has_gauss"], of_numpy["gauss"])
    np.random.set_state(legacy)
    random.setstate((of_python["version"], tuple(of_python["words"].tolist()), of_python["gauss"]))


def _encode(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, torch.Tensor):
        name = _unused("/".join(path), tensors)
        tensors[name] = _stored(value, path)
        return {"$tensor": name}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if type(value) in (list, tuple):
        items = [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    kinds = "a tensor, int, float, str, bool, None, dict, list or tuple"
    raise _refusal(path, f"be {kinds}", type(value).__name__)


def _encode_mapping(
    value: Mapping[Any, Any], path: tuple[str, ...], tensors: dict[str, torch.Tensor]
) -> Any:
    pairs = []
    for key, item in value.items():
        if type(key) not in (str, int):
            raise _refusal(path, "have keys of str or int", repr(key))
        pairs.append([key, _encode(item, (*path, str(key)), tensors)])
    if all(type(key) is str and not key.startswith(_MARK) for key, _ in pairs):
        return dict(pairs)
    return {"$dict": pairs}


def _decode(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, Mapping):
        return node
    match next(iter(node.items()), ("", None)):
        case "$float", text:
            return float(text)
        case "$tuple", items:
            return tuple(_decode(item, tensors) for item in items)
        case "$dict", pairs:
            return {key: _decode(item, tensors) for key, item in pairs}
        case "$tensor", name:
            if name not in tensors:
                raise ValueError(f"tensors must hold '{name}', got none of that name")
            return tensors[name]
    return {key: _decode(item, tensors) for key, item in node.items()}


def _stored(tensor: torch.Tensor, path: tuple[str, ...]) -> torch.Tensor:
    """A dense CPU copy. Cloning resolves lazy conjugates and negatives: safetensors reads raw memory."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise _refusal(path, "be a dense tensor with data", f"{tensor.layout} on {tensor.device}")
    if tensor.dtype not in _DTYPES:
        raise _refusal(path, "have a dtype that safetensors holds", tensor.dtype)
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _unused(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The name, numbered where another path reads the same or the format keeps it for itself."""
    candidate, count = name, 1
    while candidate in tensors or candidate == "__metadata__":
        count += 1
        candidate = f"{name}~{count}"
    return candidate


def _refusal(path: tuple[str, ...], requirement: str, got: object) -> ValueError:
    return ValueError(f"{'.'.join(('state', *path))} must {requirement}, got {got}")


def _parameters(optimiser: torch.optim.Optimizer) -> list[str]:
    """Group, dtype and shape of every parameter, in order."""
    return [
        f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)} in group {i}"
        for i, group in enumerate(optimiser.param_groups)
        for parameter in group["params"]
    ]

# SPDX-License-Identifier: Apache-2.0
"""State taken apart and put together: the same bits, types and order, or an error that names the entry."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.state import (
    flatten,
    load_optimiser_state,
    optimiser_state,
    random_state,
    set_random_state,
    unflatten,
)


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    tensors, tree = flatten(state)
    tensors = safetensors.torch.load(safetensors.torch.save(tensors))
    return unflatten(tensors, json.loads(json.dumps(tree, allow_nan=False)))


def same(a: Any, b: Any) -> bool:
    """Types, order of keys and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        flat = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b) if x.numel())
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and len({bytes(x.tolist()) for x in flat}) <= 1
        )
    if isinstance(a, dict):
        keys = [(type(k), k) for k in a] == [(type(k), k) for k in b]
        return keys and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.hex() == b.hex() if isinstance(a, float) else bool(a == b)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int64]
tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
)
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | tensors
)
keys = (
    st.text(max_size=3)
    | st.integers()
    | st.sampled_from(["$tensor", "$dict", "a/b", "__metadata__"])
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(keys, trees, max_size=4))
def test_any_state_comes_back_exactly(state: dict[str, Any]) -> None:
    assert same(through_files(state), state)


def test_numbers_that_json_lacks() -> None:
    values = [math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 1.7976931348623157e308, 2**80]
    back = through_files({"values": values, "nan": math.nan})
    assert same(back["values"], values)
    assert math.isnan(back["nan"])


def test_tensors_keep_nan_and_signs_bit_for_bit() -> None:
    words = torch.tensor([0x7FC00001, -0x3FFFFF, -(2**31), 0x7F800000, 1], dtype=torch.int32)
    back = through_files({"x": words.view(torch.float32)})["x"]
    assert torch.equal(back.view(torch.int32), words)


def test_names_that_collide_stay_apart() -> None:
    state = {
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "c": {1: torch.tensor(3), "1": torch.tensor(4)},
    }
    flat, _ = flatten(state)
    assert sorted(flat) == ["a/b", "a/b~2", "c/1", "c/1~2"]
    assert same(through_files(state), state)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, 6),
        lambda x: torch.complex(x, x).conj(),
        lambda x: torch.complex(x, x).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "conjugate", "negative"],
)
def test_views_are_stored_by_what_they_show(view: Any) -> None:
    x = view(torch.arange(24.0).reshape(4, 6))
    assert torch.equal(through_files({"x": x})["x"], x)


def test_two_names_of_one_tensor_are_two_tensors() -> None:
    x = torch.zeros(2)
    back = through_files({"a": x, "b": x})
    back["a"] += 1
    assert back["b"].tolist() == [0, 0]


def test_flat_tensors_do_not_follow_later_changes() -> None:
    x = torch.zeros(2)
    flat, _ = flatten({"x": x})
    x += 1
    assert flat["x"].tolist() == [0, 0]


def test_parameters_come_back_as_tensors() -> None:
    back = through_files({"x": torch.nn.Parameter(torch.ones(2))})["x"]
    assert type(back) is torch.Tensor
    assert not back.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float32(1), r"^state\.a\.b must be a tensor, int, .*, got float32$"),
        (np.zeros(2), "got ndarray$"),
        ({1.5: 0}, r"^state\.a\.b must have keys of str or int, got 1\.5$"),
        ({True: 0}, "got True$"),
        ({None: 0}, "got None$"),
        ({1, 2}, "got set$"),
        (torch.Size([1]), "got Size$"),
        (
            torch.zeros(2, dtype=torch.complex128),
            "have a dtype that safetensors holds, got torch.complex128$",
        ),
        (torch.empty(2, device="meta"), "be a dense tensor with data, got torch.strided on meta$"),
        (torch.eye(2).to_sparse(), "got torch.sparse_coo on cpu$"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten({"a": {"b": value}})


def test_only_mappings_are_states() -> None:
    with pytest.raises(ValueError, match=r"^state must be a mapping, got list$"):
        flatten([1])  # type: ignore[arg-type]


def test_a_missing_tensor_is_named() -> None:
    _, tree = flatten({"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"^tensors must hold 'a', got none"):
        unflatten({}, tree)


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


def make_adamw(model: torch.nn.Sequential) -> torch.optim.Optimizer:
    groups = [
        {"params": layer.parameters(), "lr": rate}
        for layer, rate in zip(model, (0.1, 0.3), strict=True)
    ]
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), amsgrad=True)


def make_sgd(model: torch.nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model: torch.nn.Sequential, optimiser: torch.optim.Optimizer, times: int) -> None:
    for i in range(times):
        optimiser.zero_grad()
        model(torch.full((2, 3), float(i + 1))).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("make", [make_adamw, make_sgd])
@pytest.mark.parametrize("before", [0, 3])
def test_an_optimiser_goes_on_with_the_same_bits(make: Any, before: int) -> None:
    model = network()
    optimiser = make(model)
    step(model, optimiser, before)
    optimiser.param_groups[0]["lr"] *= 1 / 3
    saved = {"model": model.state_dict(), "optimiser": optimiser_state(optimiser)}
    saved = through_files(saved)
    other = network()
    other.load_state_dict(saved["model"])
    again = make(other)
    load_optimiser_state(again, saved["optimiser"])
    assert same(optimiser_state(again), saved["optimiser"])
    step(model, optimiser, 3)
    step(other, again, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert same(optimiser_state(again), optimiser_state(optimiser))


def test_states_of_an_optimiser_are_copies() -> None:
    model = network()
    optimiser = make_adamw(model)
    step(model, optimiser, 1)
    state = optimiser_state(optimiser)
    kept = through_files(state)
    load_optimiser_state(optimiser, state)
    step(model, optimiser, 1)
    assert same(state, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: make_sgd(m), "^optimiser must be AdamW, got SGD$"),
        (
            lambda m: torch.optim.AdamW(m.parameters()),
            r"^parameter 2 of the optimiser must be float32 \(1, 4\) in group 1, got float32 \(1, 4\) in group 0$",
        ),
        (
            lambda m: torch.optim.AdamW(m[0].parameters()),
            r"^parameter 2 of the optimiser must be float32 \(1, 4\) in group 1, got no parameter$",
        ),
        (
            lambda m: make_adamw(m.double()),
            r"float32 \(4, 3\) in group 0, got float64 \(4, 3\) in group 0$",
        ),
    ],
    ids=["kind", "groups", "fewer", "dtype"],
)
def test_the_state_of_another_optimiser_is_refused(change: Any, message: str) -> None:
    model = network()
    optimiser = make_adamw(model)
    step(model, optimiser, 1)
    other = change(network())
    before = optimiser_state(other)
    with pytest.raises(ValueError, match=message):
        load_optimiser_state(other, optimiser_state(optimiser))
    assert same(optimiser_state(other), before)


def draws() -> tuple[list[float], list[float], list[float], float, float]:
    normal = np.random.standard_normal(3).tolist()  # an odd number: one normal stays in store
    return torch.rand(3).tolist(), normal, [random.random()], random.gauss(0, 1), random.random()


def test_every_generator_goes_on_where_it_was() -> None:
    before = random_state()
    try:
        draws()
        saved = through_files(random_state())
        first = draws()
        draws()
        set_random_state(saved)
        assert draws() == first
    finally:
        set_random_state(before)


def test_a_gpu_on_one_side_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {**random_state(), "cuda": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"^random state must be set on a machine without CUDA, got one with$"
    ):
        set_random_state(state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"^random state must be set on a machine with CUDA, got one without$"
    ):
        set_random_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)})


@pytest.mark.cuda
def test_the_generator_of_the_gpu_goes_on_where_it_was() -> None:
    saved = through_files(random_state())
    first = torch.rand(4, device="cuda")
    set_random_state(saved)
    assert torch.equal(torch.rand(4, device="cuda"), first)

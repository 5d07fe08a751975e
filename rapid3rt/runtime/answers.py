# SPDX-License-Identifier: Apache-2.0
"""What a policy answered, checked on the host as far as that goes without reading the device.

Values are checked where they are read: actions and levels in `planning.planner.plan`, sigmas and orders through flags
that the next plan reads.
"""

from __future__ import annotations

from typing import Any

import torch

from rapid3rt.types import NUM_WEIGHTS, ComputeDecision, StepDecision


def check_compute(decision: Any, images: int, policy: str, device: torch.device) -> ComputeDecision:
    """Return the answer of `decide_compute`. Raises ValueError for another type, shape, device or dtype."""
    if not isinstance(decision, ComputeDecision):
        raise ValueError(
            f"decide_compute of policy {policy!r} must return a ComputeDecision, got {type(decision).__name__}"
        )
    for name in ("action", "sparsity"):
        _check_integers(name, getattr(decision, name), images, policy, device)
    return decision


def check_step(decision: Any, images: int, policy: str, device: torch.device) -> StepDecision:
    """Return the answer of `decide_step`. Raises ValueError for another type, shape, device or dtype."""
    if not isinstance(decision, StepDecision):
        raise ValueError(
            f"decide_step of policy {policy!r} must return a StepDecision, got {type(decision).__name__}"
        )
    _check_shape("next_sigma", decision.next_sigma, (images,), policy, device)
    if not decision.next_sigma.dtype.is_floating_point:
        raise ValueError(
            f"next_sigma of policy {policy!r} must be of a float dtype, got {decision.next_sigma.dtype}"
        )
    if decision.order is not None:
        _check_integers("order", decision.order, images, policy, device)
    if decision.weights is not None:
        _check_weights(decision.weights, images, policy, device)
    return decision


def _check_weights(value: Any, images: int, policy: str, device: torch.device) -> None:
    _check_shape("weights", value, (images, NUM_WEIGHTS), policy, device)
    if not value.dtype.is_floating_point:
        raise ValueError(
            f"weights of policy {policy!r} must be of a float dtype, got {value.dtype}"
        )


def _check_integers(name: str, value: Any, images: int, policy: str, device: torch.device) -> None:
    _check_shape(name, value, (images,), policy, device)
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise ValueError(
            f"{name} of policy {policy!r} must be of an integer dtype, got {value.dtype}"
        )


def _check_shape(
    name: str, value: Any, shape: tuple[int, ...], policy: str, device: torch.device
) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} of policy {policy!r} must be a tensor, got {type(value).__name__}"
        )
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} of policy {policy!r} must have shape {shape}, got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(
            f"{name} of policy {policy!r} must be on {device}, as the state is, got {value.device}"
        )

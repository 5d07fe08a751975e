# SPDX-License-Identifier: Apache-2.0
"""A made-up run with every metric that a trainer logs: for tests of what draws and prints."""

from __future__ import annotations

import math
import random

DIALS = (5, 6, 8, 10, 14)
HEADS = ("step", "allocation")
SIGMAS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)


def metrics(iteration: int, *, seed: int = 0, iterations: int = 80) -> dict[str, float]:
    """One row. No number in it was measured."""
    source = random.Random(f"{seed}/{iteration}")
    noise = lambda scale: source.gauss(0, scale)  # noqa: E731
    done = iteration / iterations
    learned = 1 - math.exp(-3 * done)
    row = {
        "reward/fidelity": -1 + 0.15 * learned + noise(0.03),
        "reward/cost": -0.4 + noise(0.01),
        "reward/total": -1.4 + 0.15 * learned + noise(0.04),
        "policy/dead_groups": max(0.0, 0.3 * (1 - learned) + noise(0.05)),
        "policy/clip_fraction": abs(0.08 + noise(0.02)),
        "policy/kl": abs(0.006 + noise(0.003)),
        "policy/gradient_norm": math.exp(noise(0.3)) * 0.5,
        "discriminator/loss": 0.69 - 0.1 * learned + noise(0.02),
        "discriminator/accuracy": 0.5 + 0.2 * learned + noise(0.02),
        "time/rollout": 10 + noise(0.5),
        "time/update": 1.2 + noise(0.1),
        "time/discriminator": 0.4 + noise(0.05),
    }
    for head, start, floor in (("step", -0.6, -1.1), ("allocation", 1.2, 0.29)):
        row[f"entropy/{head}"] = start + (floor - start) * learned + noise(0.03)
        row[f"entropy/{head}_floor"] = floor
    for dial in DIALS:
        prior = 20 / dial**2
        row[f"cost/E@{dial}"] = dial * (1 + 0.02 * noise(1))
        row[f"cost/nfe@{dial}"] = dial * (1 + 0.02 * noise(1)) - 0.2
        row[f"quality/m@{dial}"] = prior * (1 - 0.1 * learned + noise(0.02)) * 1e-3
        row[f"quality/m_prior@{dial}"] = prior * 1e-3
    for nfe in (4, 6, 8, 12):
        row[f"discriminator/auc@{nfe}"] = 0.5 + 0.5 * learned / nfe**0.5 + noise(0.01)
    for sigma in SIGMAS:
        row[f"heads/step_shift@{sigma}"] = learned * 0.3 * math.sin(6 * sigma) + noise(0.01)
        row[f"heads/allocation_shift@{sigma}"] = learned * 0.2 * (sigma - 0.5) + noise(0.01)
    return row


def difficulties(iteration: int, *, seed: int = 0) -> list[tuple[float, float, float]]:
    """Difficulty, NFE and dial of 16 images."""
    source = random.Random(f"{seed}/{iteration}/difficulty")
    rows = []
    for i in range(16):
        dial, hard = float(DIALS[i % len(DIALS)]), source.gauss(0, 1)
        rows.append((hard, round(dial * math.exp(0.15 * hard + source.gauss(0, 0.1))), dial))
    return rows

# SPDX-License-Identifier: Apache-2.0
"""Steps of an image's own: what they could win, and how much of that can be known.

    python benches/bench_weights.py [--model tiny-sd3] [--steps 6] [--pairs 160] [--out runs/weights] [--save NAME]

The steps of a bundled family take weights that were fitted to all images alike (`rapid3rt.calibrate.fitting`). Here
every image has a correction of them, in the linear model of Gauss-Newton: from the Jacobian of its last latents. Root
errors and errors that are left, relative to the bundled weights, where the correction is

- own: the best one for each image, which nobody knows before it is made;
- common: one for all, fitted anew to the other images;
- caption: that, and a linear map of the first principal components of the conditioning;
- image: that, and a linear map of what the image shows at each step (as in bench_hardness.py).

All but the first are of images that were held out (8 folds), with the penalty that suits these best. What a head that
decides the steps could learn is what the last two leave less than `common`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_hardness import Watching
from record import run, tiny_parser

import rapid3rt
from rapid3rt.calibrate.fitting import FLOOR, Unknowns, family_grid, last_latents, normal_equations
from rapid3rt.calibrate.measure import Bench, accelerated
from rapid3rt.pipeline import BUNDLED_POLICIES
from rapid3rt.policies.folder import PolicyFolder
from rapid3rt.policies.schedule import WarpFamily
from rapid3rt.tiny.policy import CALL
from rapid3rt.tiny.scenes import sample
from rapid3rt.types import DenoiseState, StepDecision

SEED, FOLDS = 77, 8
COMPONENTS = (1, 2, 4, 8)
PENALTIES = (0.1, 1.0, 10.0)
DAMPING = 0.03


class Witness(Watching):
    """Notes the conditioning too, `[B, D]`."""

    def decide_step(self, state: DenoiseState, velocity: torch.Tensor) -> StepDecision:
        if state.tick == 0:
            self.conditioning = state.conditioning.cpu().double()
        return super().decide_step(state, velocity)


class Model:
    """The linear model: gram `[P, n, n]`, slope `[P, n]`, errors `[P]` at no correction. P pairs, n weights."""

    def __init__(self, gram: torch.Tensor, slope: torch.Tensor, errors: torch.Tensor) -> None:
        self.gram, self.slope, self.errors = gram, slope, errors
        self.floor = FLOOR * errors.median()

    def left(self, correction: torch.Tensor) -> dict[str, float]:
        """Root error and error over those of no correction. correction: what is taken off, `[P, n]`."""
        squared = ((correction[:, None] @ self.gram)[:, 0] * correction).sum(1)
        errors = (self.errors - 2 * (correction * self.slope).sum(1) + squared).clamp(min=0)
        roots = [(e + self.floor).sqrt().mean() for e in (errors, self.errors)]
        return {"root": float(roots[0] / roots[1]), "mean": float(errors.sum() / self.errors.sum())}

    def own(self) -> torch.Tensor:
        """The best correction of every image."""
        return torch.linalg.solve(self.gram + self._damping(self.gram), self.slope)

    def held_out(self, features: torch.Tensor, penalty: float) -> torch.Tensor:
        """Corrections linear in features, fitted to other images. features: `[P, n, m]`, the first of them 1."""
        pairs, n, m = features.shape
        found = torch.zeros(pairs, n, dtype=torch.float64)
        order = torch.randperm(pairs, generator=torch.Generator().manual_seed(0))
        for fold in order.chunk(FOLDS):
            rest = torch.ones(pairs, dtype=torch.bool)
            rest[fold] = False
            x, weight = features[rest], (self.errors[rest] + self.floor) ** -0.5
            gram = torch.einsum("p,pia,pij,pjb->aibj", weight, x, self.gram[rest], x)
            gram = gram.reshape(m * n, m * n)
            slope = torch.einsum("p,pia,pi->ai", weight, x, self.slope[rest]).reshape(m * n)
            ridge = torch.full((m, n), penalty, dtype=torch.float64)
            ridge[0] = DAMPING
            damping = torch.diag(ridge.flatten() * gram.diagonal() + 1e-6 * gram.diagonal().mean())
            map_ = torch.linalg.solve(gram + damping, slope).view(m, n)
            found[fold] = torch.einsum("pia,ai->pi", features[fold], map_)
        return found

    @staticmethod
    def _damping(gram: torch.Tensor) -> torch.Tensor:
        diagonal = gram.diagonal(dim1=1, dim2=2)
        return torch.diag_embed(DAMPING * diagonal + 1e-3 * diagonal.mean(1, keepdim=True))


def linearise(bench: Bench, family: WarpFamily, k: int) -> tuple[Model, Unknowns]:
    """Around the family's own weights of k steps. Raises `ValueError` where it has none."""
    rows = None if family.fit is None else family.fit.rows(k)
    if rows is None:
        raise ValueError(f"steps must be a number that the family has weights for, got {k}")
    unknowns, pairs = Unknowns.of(k), range(len(bench.prompts))
    theta = torch.tensor(rows, dtype=torch.float64)[list(unknowns.nodes)]
    target = last_latents(bench, pairs)
    made = normal_equations(bench, family_grid(family, k), unknowns, theta, pairs, target)
    return Model(*made), unknowns


def observe(bench: Bench, family: WarpFamily, k: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Conditioning `[P, D]`, and what is seen at every step, `[P, features]` each."""
    conditioning, seen = [], []
    for batch in bench.batches(range(len(bench.prompts))):
        witness = Witness(family, budget=k)
        with accelerated(bench.pipe, witness):
            bench.generate(batch, bench.steps, output_type="latent")
        conditioning.append(witness.conditioning)
        seen.append(witness.seen)
    return torch.cat(conditioning), [torch.cat(step) for step in zip(*seen, strict=True)]


def components(conditioning: torch.Tensor) -> torch.Tensor:
    """The principal components, of unit variance, the first ones first: `[P, at most P]`."""
    left, _, _ = torch.linalg.svd(scaled(conditioning), full_matrices=False)
    return left * len(left) ** 0.5


def scaled(x: torch.Tensor) -> torch.Tensor:
    """Columns of mean 0 and variance 1, clipped at 3."""
    return ((x - x.mean(0)) / x.std(0).clamp(min=1e-9)).clamp(-3, 3)


def shown(seen: Sequence[torch.Tensor], unknowns: Unknowns) -> torch.Tensor:
    """For every weight what its step sees, `[P, n, most features]`; 0 where a step sees less."""
    most = max(step.shape[1] for step in seen)
    columns = []
    for node, _ in unknowns.live:
        features = scaled(seen[unknowns.nodes[node]])
        columns.append(torch.nn.functional.pad(features, (0, most - features.shape[1])))
    return torch.stack(columns, 1)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, printed as it is found."""
    name, k = options.model.removeprefix("tiny-"), options.steps
    pipe = rapid3rt.load_tiny(name)
    family = PolicyFolder.load(BUNDLED_POLICIES / name / "policy").schedule
    assert family is not None
    prompts = [scene.caption for scene in sample(options.pairs, SEED, "train")]
    out = options.out / f"{options.model}-{options.pairs}"
    bench = Bench(pipe, prompts, out, 28, SEED, 16, dict(CALL), True)
    model, unknowns = linearise(bench, family, k)
    conditioning, seen = observe(bench, family, k)
    one = torch.ones(*model.slope.shape, 1, dtype=torch.float64)

    def best(*choices: torch.Tensor) -> dict[str, float]:
        found = [
            model.left(model.held_out(torch.cat([one, x], 2), penalty))
            for x in choices
            for penalty in PENALTIES
        ]
        return min(found, key=lambda left: left["root"])

    principal = components(conditioning)
    captions = [principal[:, None, :m].expand(-1, one.shape[1], -1) for m in COMPONENTS]
    image = shown(seen, unknowns)
    left = {
        "own": model.left(model.own()),
        "common": best(one[..., :0]),
        "caption": best(*captions),
        "image": best(*(torch.cat([caption, image], 2) for caption in captions[:2])),
    }
    print(f"{options.model}, {k} steps, {options.pairs} pairs, {one.shape[1]} weights; left of")
    print("correction    root error   error")
    for what, numbers in left.items():
        print(f"{what:12} {numbers['root']:11.3f} {numbers['mean']:7.3f}")
    return {"model": options.model, "steps": k, "pairs": options.pairs, "left": left}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = tiny_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=6, help="evaluations of an image")
    add("--pairs", type=int, default=160, help="captions of the train split, 8 or more")
    add("--out", type=Path, default=Path("runs/weights"), help="where references are kept")
    run(parser, measure, arguments)


if __name__ == "__main__":
    main()

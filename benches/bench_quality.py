# SPDX-License-Identifier: Apache-2.0
"""Error at equal evaluations on the tiny world: every free rival, and ours, over test prompts.

    python benches/bench_quality.py [--pairs 512] [--steps 6 8] [--save NAME] [--split test]

Error m: mean squared difference of decoded pixels (in -1..1) to the converged solution of the same prompt and noise
(second order, 120 steps). Intervals: 95 % bootstrap over pairs. Batches go to a cache folder, so a run resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import save
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rapid3rt
from rapid3rt.tiny.rivals import SOLVERS, solver
from rapid3rt.tiny.scenes import Scene, sample
from rapid3rt.tiny.score import score

PLAIN, REFERENCE, BATCH = 28, 120, 16


@contextmanager
def accelerated(pipe: Any, policy: str, **kwargs: Any) -> Any:
    rapid3rt.accelerate(pipe, policy, **kwargs)
    try:
        yield
    finally:
        rapid3rt.restore(pipe)


@contextmanager
def plainly() -> Any:
    yield


class World:
    """The pairs, and every way's images for them, from the cache where they exist."""

    def __init__(
        self, pipe: Any, scenes: list[Scene], seed: int, tokens: int, cache: Path | None
    ) -> None:
        self.pipe, self.scenes, self.seed, self.tokens, self.cache = (
            pipe,
            scenes,
            seed,
            tokens,
            cache,
        )

    def images(
        self, name: str, steps: int, way: Callable[[], AbstractContextManager[Any]]
    ) -> torch.Tensor:
        """float32 `[n, 3, 64, 64]` in -1..1."""
        chunks = []
        for start in tqdm(range(0, len(self.scenes), BATCH), desc=name, leave=False):
            path = (
                self.cache / f"{name.replace('/', '_').replace(' ', '_')}-{start}.safetensors"
                if self.cache
                else None
            )
            if path is not None and path.exists():
                chunks.append(load_file(path)["images"].float())
                continue
            scenes = self.scenes[start : start + BATCH]
            generators = [
                torch.Generator().manual_seed(self.seed * 100_003 + start + i)
                for i in range(len(scenes))
            ]
            with way():
                images = self.pipe(
                    [s.caption for s in scenes],
                    num_inference_steps=steps,
                    generator=generators,
                    output_type="pt",
                    max_sequence_length=self.tokens,
                ).images
            chunks.append(images.float() * 2 - 1)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file({"images": chunks[-1].contiguous()}, path)
        return torch.cat(chunks)


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over pairs."""
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 8])
    parser.add_argument(
        "--iso", type=int, nargs="*", default=[7, 10, 12], help="further k for ours alone"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokens", type=int, default=32, help="T5 tokens (silent); the pipeline's default is 256"
    )
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--save", default=None)
    options = parser.parse_args()
    pipe = rapid3rt.load_tiny("sd3")
    pipe.set_progress_bar_config(disable=True)
    scenes = sample(options.pairs, options.seed, options.split)
    world = World(pipe, scenes, options.seed, options.tokens, options.cache)
    rng = np.random.default_rng(0)
    reference = world.images(
        "reference", REFERENCE, lambda: accelerated(pipe, f"steps:{REFERENCE}/trim/ab2")
    )

    def errors(images: torch.Tensor) -> np.ndarray:
        return (images - reference).square().mean((1, 2, 3)).numpy()

    plain = world.images("plain-28", PLAIN, plainly)
    results: dict[str, Any] = {}
    scenes_score = {
        "plain-28": score((plain + 1) / 2, scenes),
        "reference": score((reference + 1) / 2, scenes),
    }
    table: dict[str, np.ndarray] = {"plain-28": errors(plain)}
    psnr: dict[str, float] = {}

    def add(name: str, steps: int, way: Callable[[], AbstractContextManager[Any]]) -> None:
        images = world.images(name, steps, way)
        table[name] = errors(images)
        scenes_score[name] = score((images + 1) / 2, scenes)
        to_plain = (images - plain).square().mean((1, 2, 3)).clamp(min=1e-12)
        psnr[name] = float((10 * torch.log10(4 / to_plain)).mean())

    for k in options.steps:
        add(f"plain k={k}", k, plainly)
        for s in SOLVERS:
            add(f"{s} k={k}", k, lambda s=s: solver(pipe, s))
        for suffix in ("trim", "trim/ab2"):
            add(
                f"steps/{suffix} k={k}",
                PLAIN,
                lambda k=k, suffix=suffix: accelerated(pipe, f"steps:{k}/{suffix}"),
            )
    for k in sorted({*options.steps, *options.iso}):
        add(f"rapid3rt k={k}", PLAIN, lambda k=k: accelerated(pipe, "auto", budget=k))
    print(f"{'way':<24}{'m x 1e3':>9}  {'95 % interval':<18}{'score':>7}{'PSNR to plain':>15}")
    for name, m in table.items():
        low, high = interval(m, rng)
        results[name] = {
            "m": float(m.mean()),
            "interval": [low, high],
            "worst_tenth": float(np.sort(m)[-max(1, len(m) // 10) :].mean()),
            "score": float(scenes_score[name].mean()),
            "psnr_to_plain": psnr.get(name),
        }
        shown = f"{psnr[name]:>13.1f} dB" if name in psnr else ""
        points = scenes_score[name].mean()
        print(
            f"{name:<24}{1000 * m.mean():>9.3f}  {1000 * low:.3f} .. {1000 * high:<9.3f}{points:>7.3f}{shown}"
        )
    ratios = {}
    for k in options.steps:
        ours = table[f"rapid3rt k={k}"]
        for name in [n for n in table if n.endswith(f"k={k}") and not n.startswith("rapid3rt")]:
            ratios[f"rapid3rt / {name}"] = float(ours.mean() / table[name].mean())
    spread = float(np.log(table[f"steps/trim/ab2 k={options.steps[0]}"]).std())
    ours_k = sorted(int(n.split("=")[1]) for n in table if n.startswith("rapid3rt"))
    good = [k for k in ours_k if table[f"rapid3rt k={k}"].mean() <= table["plain-28"].mean()]
    iso = PLAIN / good[0] if good else None
    for name, value in ratios.items():
        print(f"{name:<40}{value:>7.3f}")
    print(f"spread of log m({options.steps[0]}) at order 2: {spread:.2f}")
    print(
        f"iso-accuracy speed-up over plain {PLAIN} steps: {'not reached' if iso is None else f'{iso:.2f}x'}"
    )
    if options.save:
        summary = {
            "pairs": options.pairs,
            "split": options.split,
            "ratios": ratios,
            "spread": spread,
            "iso": iso,
        }
        print(f"saved to {save(options.save, {**summary, 'ways': results})}")


if __name__ == "__main__":
    main()

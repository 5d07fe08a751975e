# SPDX-License-Identifier: Apache-2.0
"""The command line: demo, generate, calibrate, doctor, bench."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit("the rapid3rt command needs the extra rapid3rt[cli]: pip install 'rapid3rt[cli]'")

from rapid3rt.calibrate.command import load_pipeline, make_folder, read_prompts

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Diffusion Transformers, several times faster."
)
# Paths, names and messages are a user's words: what looks like markup or an emoji in them is neither.
console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)


def _say(text: str, style: str | None = None) -> None:
    """Print lines as they are: a terminal may wrap them, a pipe or a copied command gets them whole."""
    console.print(text, style=style, soft_wrap=True)


def _quiet() -> None:
    """Other libraries' notes about optional parts have no place between a user and a table."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # Set here, not in the environment: the entry point has imported both already.
    for name, library in (("DIFFUSERS", diffusers_logging), ("TRANSFORMERS", transformers_logging)):
        if f"{name}_VERBOSITY" not in os.environ:
            library.set_verbosity_error()


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number, got {value}")
    return value


def _seed(value: int) -> int:
    if abs(value) >= 2**63:
        raise typer.BadParameter(f"must be an integer of 64 bits, got {value}")
    return value


def _load(model: str) -> Any:
    """A bundled tiny pipeline by name, else a folder or hub id."""
    from rapid3rt.tiny import bundled_names, load_tiny

    if model in bundled_names():
        return load_tiny(model)
    return load_pipeline(model)


def _print_table(rows: list[list[str]], title: str) -> None:
    # No vertical lines and two spaces between columns: the table of images then fits 80 columns.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    _say(title, style="bold")  # as a title of the table it would wrap at the table's width
    console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for pictures and traces")] = Path("demo"),
    model: Annotated[str, typer.Option(help="bundled tiny pipeline")] = "sd3",
    policy: Annotated[str, typer.Option(help="any policy that accelerate takes")] = "auto",
    speed: Annotated[
        float | None, typer.Option(help="plain steps over ours; 4.5 where the policy takes one")
    ] = None,
    rival: Annotated[str, typer.Option(help="diffusers solver of the fourth row")] = "DPM++ 2M",
    quick: Annotated[bool, typer.Option(help="time one round instead of three")] = False,
) -> None:
    """Make eight prompts plain and accelerated; print tables, write pictures and the trace."""
    _quiet()
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from rapid3rt.tiny import demo as show
    from rapid3rt.tiny.rivals import find_solver

    find_solver(rival)
    make_folder(out)
    pipe = _load(model)
    pipe.set_progress_bar_config(disable=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True
    ) as bar:
        bar.add_task("eight prompts, four ways, timed side by side (a minute or two on a laptop)")
        result = show.run(pipe, policy, speed, rival, rounds=1 if quick else 3)
    result.report.save(out / "trace.json")  # first: whatever fails below, the minutes are not lost
    ways, per_image = show.tables(result)
    _print_table(ways, "eight prompts in a batch, four ways (MSE and PSNR to plain 28 steps)")
    _print_table(per_image, "rapid3rt, image by image")
    for note in result.report.notes:
        console.print(f"note: {note}")
    show.draw_comparison(result, out / "comparison.png")
    try:
        result.report.plot(out / "timeline.png", labels=[s.caption for s in result.scenes])
    except ImportError as error:
        _say(f"note: no timeline.png, {error}")
    _say(
        f"total speed-up {result.speedup:.2f}x, measured here; pictures and trace in {out}/",
        style="bold",
    )


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="one image each")],
    model: Annotated[str, typer.Option(help="bundled tiny pipeline, folder or hub id")] = "sd3",
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("images"),
    policy: Annotated[str, typer.Option(help="any policy that accelerate takes")] = "auto",
    budget: Annotated[
        int | None, typer.Option(help="evaluations per image, hard cap", min=1)
    ] = None,
    speed: Annotated[float | None, typer.Option(help="plain steps over ours")] = None,
    steps: Annotated[int, typer.Option(help="steps of the plain pipeline", min=1)] = 28,
    guidance: Annotated[float | None, typer.Option(help="guidance scale", callback=_finite)] = None,
    seed: Annotated[int, typer.Option(help="noise of the first image", callback=_seed)] = 0,
) -> None:
    """Generate images with an accelerated pipeline and print what each one was spared."""
    _quiet()
    import torch

    import rapid3rt

    make_folder(out)
    pipe = _load(model)
    rapid3rt.accelerate(pipe, policy, budget=budget, speed=speed)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    further = {} if guidance is None else {"guidance_scale": guidance}
    images = pipe(prompts, num_inference_steps=steps, generator=generators, **further).images
    for i, image in enumerate(images):
        image.save(out / f"{i:03d}.png")
    _say(str(rapid3rt.report(pipe)))
    _say(f"{len(images)} images in {out}/")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="bundled tiny pipeline, folder or hub id")],
    prompts: Annotated[Path, typer.Option(help="text file, a prompt per line")],
    out: Annotated[Path, typer.Option(help="policy folder; the same folder resumes")],
    steps: Annotated[int, typer.Option(help="steps of the plain pipeline", min=1)] = 28,
    evaluations: Annotated[int, typer.Option(help="grids to try", min=1)] = 40,
    guidance: Annotated[
        float | None,
        typer.Option(help="guidance scale that users will call with", callback=_finite),
    ] = None,
    seed: Annotated[int, typer.Option(help="noise", min=0, max=2**32 - 1)] = 0,
) -> None:
    """Fit a sigma grid to a model from a dozen prompts; minutes, no training."""
    _quiet()
    import rapid3rt
    from rapid3rt.calibrate import format_table

    lines = read_prompts(prompts)
    make_folder(out)
    folder = rapid3rt.calibrate(
        _load(model),
        lines,
        out,
        num_inference_steps=steps,
        evaluations=evaluations,
        seed=seed,
        call={} if guidance is None else {"guidance_scale": guidance},
    )
    _say(format_table(folder.provenance["mean_squared_error"]))
    _say(f"use it with rapid3rt.accelerate(pipe, policy={str(out)!r}, speed=2.5)")


@app.command()
def doctor() -> None:
    """Say what this machine has and what will run."""
    _quiet()
    import platform

    import diffusers
    import torch

    import rapid3rt
    from rapid3rt import ops

    facts = [
        ("rapid3rt", rapid3rt.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("diffusers", diffusers.__version__),
        ("kernels", ops.describe_backend()),
        *_cuda_facts(),
    ]
    for name, value in facts:
        _say(f"{name:<10} {value}")


def _driver() -> str:
    """Version of the NVIDIA driver, as its packages are numbered."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not tell)"
    return told.stdout.partition("\n")[0].strip()


def _cuda_facts() -> list[tuple[str, str]]:
    """What there is to say of the GPU: device and driver, what was built, what is proven, why kernels cannot run."""
    from rapid3rt import ops
    from rapid3rt.ops import cuda, proven

    built = cuda.info()
    if "device" not in built:
        return [("CUDA", f"no device, {built['reason']}")]
    capability = "{}.{}".format(*built["capability"])
    device = f"{built['device']}, compute capability {capability}, driver {_driver()}"
    facts = [("CUDA", device)]
    if built["built"]:
        goes_to = f"the driver goes up to {built['driver']}" if built["driver"] else "no driver"
        facts.append(("built for", f"{built['architectures']}, CUDA {built['runtime']}, {goes_to}"))
    runs = ("runs", ops.describe_backend("cuda"))
    if not built["available"]:
        return [*facts, ("not usable", built["reason"]), runs]
    found = [p for p in proven.proofs() if p.capability == built["capability"]]
    told = [f"{', '.join(p.dtypes)} on {p.device}, driver {p.driver}, {p.commit}" for p in found]
    nothing = f"nothing on {capability}: `make gpu-check` in a checkout proves it"
    return [*facts, ("proven", "; ".join(told) or nothing), runs]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the microbenchmarks of a checkout: arguments go to benches/bench_ops.py."""
    script = Path(__file__).parent.parent / "benches" / "bench_ops.py"
    if not script.is_file():
        raise typer.BadParameter(
            "benchmarks live in a checkout of the project, this is an installed wheel"
        )
    import subprocess

    raise typer.Exit(subprocess.call([sys.executable, str(script), *context.args]))


def main() -> None:
    """Entry point: errors of the caller's making are one line, not a traceback."""
    from rapid3rt.errors import StateError, UnsupportedError

    try:
        app()
    except (ValueError, OSError, ImportError, UnsupportedError, StateError) as error:
        errors.print(f"error: {' '.join(str(error).split())}", style="red", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

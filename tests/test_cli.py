# SPDX-License-Identifier: Apache-2.0
"""The command line as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import transformers
from PIL import Image
from typer.testing import CliRunner

import rapid3rt
from rapid3rt import cli, ops
from rapid3rt.cli import app
from rapid3rt.ops import cuda, proven
from rapid3rt.planning.trace import Trace
from rapid3rt.tiny import ASSETS
from rapid3rt.tiny import demo as show


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file."""
    with Image.open(path) as image:
        return image.size


@pytest.mark.slow
def test_the_demo_shows_four_ways_and_writes_pictures_and_a_trace(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["demo", "--quick", "--out", str(tmp_path)], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in result.output
    for words in ("plain, 28 steps", "DPM++ 2M", "rapid3rt", "total speed-up"):
        assert words in result.output
    assert picture_size(tmp_path / "comparison.png")[0] > 1000
    assert picture_size(tmp_path / "timeline.png")[0] > 400
    assert len(Trace.load(tmp_path / "trace.json").images) == 8


def test_generate_writes_one_image_per_prompt(tmp_path: Path) -> None:
    prompts = ["a red circle center on plain navy ground", "a green ring top on dotted teal ground"]
    arguments = ["generate", *prompts, "--out", str(tmp_path), "--steps", "8", "--budget", "3"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["000.png", "001.png"]
    assert picture_size(tmp_path / "000.png") == (64, 64)


def test_doctor_names_what_runs() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "torch" in result.output
    assert "kernels" in result.output


def fail_to_load(_model: str) -> Any:
    """In place of `cli._load`: a mistake must be found before."""
    pytest.fail("loads a model before it looks at its arguments")


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the entry point with arguments that it must refuse; gives what it says on stderr."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rapid3rt", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert (stop.value.code, captured.out) == (2, "")
        return captured.err

    return call


@pytest.mark.parametrize(
    "error",
    [OSError("cannot load\nthe model"), ImportError("needs\npart"), ValueError("got " + 99 * "x")],
)
def test_a_mistake_is_one_line_on_stderr(
    say: Any, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_model: str) -> Any:
        raise error

    monkeypatch.setattr(cli, "_load", load)
    said = say("generate", "a prompt", "--out", str(tmp_path))
    assert said == f"error: {' '.join(str(error).split())}\n"


def test_an_unknown_rival_is_refused_before_any_work(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_load", fail_to_load)
    said = say("demo", "--rival", "Heun", "--out", str(tmp_path / "new"))
    assert said == "error: rival must be one of DPM++ 2M, UniPC, DEIS, got 'Heun'\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["demo", "generate", "calibrate"])
def test_an_unusable_folder_is_found_before_any_work(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(cli, "_load", fail_to_load)
    file = tmp_path / "file.txt"
    file.write_text("a prompt\n")
    further = {"demo": [], "generate": ["a prompt"], "calibrate": ["sd3", "--prompts", str(file)]}
    said = say(command, *further[command], "--out", str(file))
    start = f"error: --out must be a folder that can be written to, got '{file}': "
    assert said.startswith(start)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    ["--steps=0", "--steps=-3", "--budget=0", "--guidance=nan", f"--seed={10**22}"],
)
def test_a_number_without_a_meaning_is_refused_by_its_option(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(cli, "_load", fail_to_load)
    said = say("generate", "a prompt", "--out", str(tmp_path), option)
    assert option.partition("=")[0] in said


def test_a_prompt_is_a_line_whatever_wrote_the_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n\r\n one\u2028two \nlast".encode())
    assert cli.read_prompts(path) == ["a red circle", "one\u2028two", "last"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"caf\xe9", "not UTF-8"), (None, "No such file"), (b" \n\n", "at least one prompt")],
)
def test_prompts_that_cannot_be_read_are_one_line_that_names_the_file(
    say: Any, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    said = say("calibrate", "sd3", "--prompts", str(path), "--out", str(tmp_path / "out"))
    assert said.startswith("error: --prompts must ")
    assert f"'{path}'" in said
    assert reason in said
    assert said.count("\n") == 1


def test_a_folder_of_prompts_is_no_file(say: Any, tmp_path: Path) -> None:
    said = say("calibrate", "sd3", "--prompts", str(tmp_path), "--out", str(tmp_path / "out"))
    assert said.endswith(f"got '{tmp_path}': Is a directory\n")


@pytest.mark.parametrize("model", ["/no/such/folder", "a/b/c", "./x"])
def test_a_model_that_can_be_none_is_one_line(say: Any, tmp_path: Path, model: str) -> None:
    said = say("generate", "a prompt", "--model", model, "--out", str(tmp_path))
    assert said == (
        f"error: model must be a bundled one, a folder that is there or a hub id, got '{model}'\n"
    )


def test_an_absolute_folder_is_loaded_as_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, **_options: Any) -> Any:
        return SimpleNamespace(to=lambda _device: path)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    for folder in (ASSETS / "sd3", ASSETS / "sd3" / ".." / "sd3"):
        assert cli._load(str(folder)) == str(folder)


def test_what_is_printed_is_neither_markup_nor_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pipe:
        def __call__(self, prompts: list[str], **_options: Any) -> Any:
            return SimpleNamespace(images=[Image.new("RGB", (2, 2)) for _ in prompts])

    row = "0 " + 120 * "C"
    monkeypatch.setattr(cli, "_load", lambda _model: Pipe())
    monkeypatch.setattr(rapid3rt, "accelerate", lambda *_arguments, **_options: None)
    monkeypatch.setattr(rapid3rt, "report", lambda _pipe: row)
    out = tmp_path / "[bold]x[" / "b] :pizza:"
    arguments = ["generate", "a prompt", "--out", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "40"})
    assert result.output.splitlines() == [row, f"1 images in {out}/"]
    assert (out / "000.png").exists()


def test_the_demo_without_matplotlib_keeps_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plot(*_arguments: Any, **_options: Any) -> None:
        raise ImportError("plot needs matplotlib")

    report = SimpleNamespace(notes=[], plot=plot, save=lambda path: path.write_text("{}"))
    result = SimpleNamespace(report=report, scenes=[], speedup=2.0)
    pipe = SimpleNamespace(set_progress_bar_config=lambda disable: None)
    monkeypatch.setattr(cli, "_load", lambda _model: pipe)
    monkeypatch.setattr(show, "run", lambda *_arguments, **_options: result)
    monkeypatch.setattr(show, "tables", lambda _result: ([["way"]], [["scene"]]))
    monkeypatch.setattr(show, "draw_comparison", lambda _result, path: path.write_text(""))
    told = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert told.exit_code == 0, told.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.png", "trace.json"]
    assert "note: no timeline.png, plot needs matplotlib" in told.output


def test_other_libraries_are_quiet_unless_the_user_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    libraries = {
        "DIFFUSERS_VERBOSITY": diffusers.utils.logging,
        "TRANSFORMERS_VERBOSITY": transformers.utils.logging,
    }
    for variable, library in libraries.items():
        before = library.get_verbosity()
        try:
            library.set_verbosity_info()
            monkeypatch.setenv(variable, "info")
            cli._quiet()
            assert library.get_verbosity() == library.INFO
            monkeypatch.delenv(variable)
            cli._quiet()
            assert library.get_verbosity() == library.ERROR
        finally:
            library.set_verbosity(before)


def test_doctor_tells_a_wrong_backend_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAPID3RT_BACKEND", "bogus")
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "40"})
    assert result.exit_code == 0
    line = "kernels    none: RAPID3RT_BACKEND must be one of native, flex, reference, got 'bogus'"
    assert line in result.output.splitlines()


H100 = {"device": "NVIDIA H100", "capability": (9, 0), "built": True, "architectures": "90-real"}
H100 |= {"runtime": "13.0", "driver": "13.1", "available": True}


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (
            H100,
            [
                "CUDA       NVIDIA H100, compute capability 9.0, driver 580.95.05",
                "built for  90-real, CUDA 13.0, the driver goes up to 13.1",
                "proven     nothing on 9.0: `make gpu-check` in a checkout proves it",
                "runs       flex for attention",
            ],
        ),
        (
            {**H100, "available": False, "reason": "no kernels for it", "driver": None},
            [
                "built for  90-real, CUDA 13.0, no driver",
                "not usable no kernels for it",
                "runs       flex for attention",
            ],
        ),
        (
            {**H100, "built": False, "available": False, "reason": "no CUDA kernels: build"},
            ["not usable no CUDA kernels: build", "runs       flex for attention"],
        ),
        (
            {"available": False, "built": False, "reason": "torch sees no CUDA GPU"},
            ["CUDA       no device, torch sees no CUDA GPU"],
        ),
    ],
)
def test_doctor_tells_what_a_gpu_has_and_what_would_help(
    facts: dict[str, Any], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "info", lambda: facts)
    monkeypatch.setattr(cli, "_driver", lambda: "580.95.05")
    monkeypatch.setattr(proven, "proofs", tuple)
    monkeypatch.setattr(ops, "describe_backend", lambda _="cpu": "flex for attention")
    lines = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "40"}).output.splitlines()
    assert [line for line in lines if line in told] == told


def test_doctor_names_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = proven.Proof(
        capability=(9, 0), dtypes=("bfloat16",), device="NVIDIA H200", driver="580.1",
        torch="2.11.0", commit="0123abc",
    )  # fmt: skip
    monkeypatch.setattr(cuda, "info", lambda: H100)
    monkeypatch.setattr(cli, "_driver", lambda: "580.1")
    monkeypatch.setattr(proven, "proofs", lambda: (proof,))
    output = CliRunner().invoke(app, ["doctor"]).output
    assert "proven     bfloat16 on NVIDIA H200, driver 580.1, 0123abc" in output.splitlines()


def test_a_driver_that_nobody_names_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli._driver() == "unknown (nvidia-smi does not tell)"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert cli._driver() == "580.95.05"

# SPDX-License-Identifier: Apache-2.0
"""The reference bank: what it holds is what the pipeline makes, and no stop and no second builder spoils it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_world
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import rapid3rt
from rapid3rt.policies.schedule import ScheduleFamily
from training.bank import CONVERGED, REFERENCE_STEPS, Bank, accelerated
from training.seeds import seed_of
from training.subject import Subject

BUILDER = """
import sys, pathlib, small_world, torch
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
bank = small_world.make_bank(pathlib.Path(sys.argv[1]), batch_size=1)
bank.converged()
bank.searched(small_world.FAMILY, 4)
"""


def direct(bank: Bank, policy, steps: int, **dial) -> torch.Tensor:
    """By calls of the pipeline alone, one image at a time."""
    rapid3rt.accelerate(bank.pipe, policy, **dial)
    images = [
        bank.pipe(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed_of(bank.seed, pair, "noise")),
            output_type="pt",
            **bank.call,
        ).images
        for pair, prompt in enumerate(bank.prompts)
    ]
    rapid3rt.restore(bank.pipe)
    return torch.cat(images) * 2 - 1


@pytest.mark.slow
def test_references_are_what_the_pipeline_makes(subject: Subject) -> None:
    bank = subject.training
    assert f"steps:{REFERENCE_STEPS}/trim/auto" == CONVERGED
    converged = direct(bank, CONVERGED, REFERENCE_STEPS)
    torch.testing.assert_close(bank.converged(), converged, rtol=0, atol=2e-3)
    plain = torch.cat(
        [
            bank.pipe(
                prompt,
                num_inference_steps=8,
                generator=bank.noise(pair),
                output_type="pt",
                **bank.call,
            ).images
            for pair, prompt in enumerate(bank.prompts)
        ]
    )
    torch.testing.assert_close(bank.full(), plain * 2 - 1, rtol=0, atol=2e-3)
    images = direct(bank, ScheduleFamily(small_world.FAMILY), 8, budget=5)
    table = bank.searched(small_world.FAMILY, 5)
    errors = (images - converged).square().mean((1, 2, 3))
    assert table.error.tolist() == pytest.approx(errors.tolist(), rel=0.02)
    assert table.nfe.tolist() == [5.0] * 6
    assert table.error.shape == (6,)
    assert len(set(table.error.tolist())) == 6


def test_a_table_is_of_its_family(subject: Subject) -> None:
    """Calibrated anew, a family of the same name must not be taken for what is in the folder."""
    other = replace(small_world.FAMILY, knots=((0.3, 0.5), (0.7, 0.9)))
    known, new = (subject.training.searched(f, 4).error for f in (small_world.FAMILY, other))
    assert not torch.allclose(known, new, rtol=0.05)


def test_the_folder_is_read_and_not_made_again(subject: Subject, monkeypatch) -> None:
    bank = subject.training
    expected, table = bank.converged(), bank.searched(small_world.FAMILY, 4)
    again = small_world.make_bank(bank.folder)
    monkeypatch.setattr(Bank, "_make", lambda *_: pytest.fail("made again"))
    assert torch.equal(again.converged(), expected)
    assert torch.equal(again.searched(small_world.FAMILY, 4).error, table.error)


def used(folder: Path, **changes) -> Bank:
    """A bank with a file in its folder."""
    bank = small_world.make_bank(folder, **changes)
    bank.save({"x": torch.zeros(1)}, folder / "x.safetensors")
    return bank


def test_a_call_that_fails_claims_no_folder(tmp_path) -> None:
    """A mistyped resolution fails in the first call; the right one must find the folder free."""
    wrong = small_world.make_bank(tmp_path, call={"height": 33, "width": 33})
    with pytest.raises(ValueError, match="divisible"):
        wrong.run("four", lambda: accelerated(wrong.pipe, "steps:4"))
    bank = used(tmp_path)
    with pytest.raises(ValueError, match=r"another call\.guidance_scale"):  # filled since
        wrong.save({"x": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert len(list(bank.folder.glob("*.safetensors"))) == 1


def test_files_of_another_size_serve(tmp_path, monkeypatch) -> None:
    first = small_world.make_bank(tmp_path, batch_size=4)
    four = first.run("four", lambda: accelerated(first.pipe, "steps:4"))
    again = small_world.make_bank(tmp_path, batch_size=3)
    sizes, images = [], Bank.images
    monkeypatch.setattr(
        Bank,
        "images",
        lambda self, pairs, *rest: sizes.append(len(pairs)) or images(self, pairs, *rest),
    )
    assert torch.equal(
        again.run("four", lambda: accelerated(again.pipe, "steps:4")).images, four.images
    )
    five = again.run("five", lambda: accelerated(again.pipe, "steps:5"))
    assert sizes == [3, 1, 2]
    assert five.images.shape == (6, 3, 32, 32)
    assert five.nfe.tolist() == [5.0] * 6


def test_a_bank_without_a_note_of_other_weights_serves_and_gets_one(tmp_path) -> None:
    bank, note = used(tmp_path), tmp_path / "bank.json"
    whole = json.loads(note.read_text())
    older = {name: value for name, value in whole.items() if name != "other_weights"}
    note.write_text(json.dumps(older))
    small_world.make_bank(tmp_path)
    assert json.loads(note.read_text()) == whole
    weight = bank.pipe.vae.decoder.conv_in.weight
    before = weight.flatten()[0].item()
    try:
        weight.data.view(-1)[0] += 1e-3
        with pytest.raises(ValueError, match=r"another other_weights\.vae"):
            small_world.make_bank(tmp_path)
    finally:
        weight.data.view(-1)[0] = before


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_note_says_what_to_delete(tmp_path, content) -> None:
    used(tmp_path)
    (tmp_path / "bank.json").write_text(content)
    with pytest.raises(ValueError, match=r"bank\.json' must say .* or delete"):
        small_world.make_bank(tmp_path)


def test_a_damaged_file_says_what_to_delete(tmp_path) -> None:
    bank = small_world.make_bank(tmp_path)
    bank.run("four", way := lambda: accelerated(bank.pipe, "steps:4"))
    for path in tmp_path.glob("four*"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"must be as it was written.*delete it to make it again"):
        small_world.make_bank(tmp_path).run("four", way)


def test_images_that_are_no_numbers_are_refused(tmp_path, monkeypatch) -> None:
    bank = small_world.make_bank(tmp_path)
    bank.run("four", way := lambda: accelerated(bank.pipe, "steps:4"))
    (path,) = tmp_path.glob("four*-4.safetensors")
    tensors = load_file(path)
    tensors["images"][1, 0, 3, 3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"images of 'four' must be finite.* in pairs \[5\] of.*del"
    ):
        small_world.make_bank(tmp_path).run("four", way)
    monkeypatch.setattr(Bank, "images", lambda self, pairs, *_: tensors["images"][[1] * len(pairs)])
    monkeypatch.setattr(rapid3rt, "report", lambda _: SimpleNamespace(images=[]))
    with pytest.raises(ValueError, match="use another --dtype"):
        bank.run("five", lambda: accelerated(bank.pipe, "steps:5"))
    assert not list(tmp_path.glob("five*"))


def test_a_full_disk_names_the_file(tmp_path, monkeypatch) -> None:
    def fill_the_disk(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("training.bank.save_file", fill_the_disk)
    with pytest.raises(OSError, match=r"x\.safetensors' could not be written .*No space left"):
        used(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 12}, "seed"),
        ({"steps": 9}, "steps"),
        ({"call": {"guidance_scale": 1.0}}, 'call.guidance_scale ."3.5" there, "1.0" here.'),
        ({"prompts": ("a red circle",) * 6}, "prompts"),
    ],
)
def test_a_folder_of_other_pairs_is_refused_by_what_differs(tmp_path, change, field) -> None:
    bank = used(tmp_path)
    prompts = change.pop("prompts", bank.prompts)
    values = {"seed": bank.seed, "steps": 8, "call": bank.call, "batch_size": 4, **change}
    with pytest.raises(
        ValueError, match=f"folder of a bank must be new.* made with another {field}.*give another"
    ):
        Bank(bank.pipe, prompts, tmp_path, **values)
    Bank(bank.pipe, bank.prompts, tmp_path, **{**values, **{k: getattr(bank, k) for k in change}})


@pytest.mark.parametrize("place", [0, -1])
def test_a_folder_of_other_weights_is_refused(tmp_path, place: int) -> None:
    bank = used(tmp_path)
    weight = bank.pipe.transformer.proj_out.weight
    before = weight.flatten()[place].item()
    try:
        weight.data.view(-1)[place] += 1e-3
        with pytest.raises(ValueError, match="another weights"):
            small_world.make_bank(tmp_path)
    finally:
        weight.data.view(-1)[place] = before


def test_without_prompts_there_is_no_bank(tmp_path) -> None:
    with pytest.raises(ValueError, match="prompts must hold at least one prompt"):
        Bank(small_world.make_pipe(), [], tmp_path)


def test_pairs_have_noise_of_their_own(tmp_path) -> None:
    bank, other = (
        small_world.make_bank(tmp_path / "a"),
        small_world.make_bank(tmp_path / "b", seed=1),
    )
    draws = [torch.randn(4, generator=b.noise(pair)) for b in (bank, other) for pair in (0, 1)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws[0], torch.randn(4, generator=bank.noise(0)))


def test_a_build_that_fails_goes_on(tmp_path, monkeypatch) -> None:
    bank = small_world.make_bank(tmp_path, batch_size=2)
    way, calls = (lambda: accelerated(bank.pipe, "steps:4")), []
    original = Bank._make

    def failing(self, start, *rest):
        calls.append(start)
        if start == 2 and len(calls) == 2:
            raise OSError("no space left")
        return original(self, start, *rest)

    monkeypatch.setattr(Bank, "_make", failing)
    with pytest.raises(OSError, match="no space"):
        bank.run("four", way)
    again = small_world.make_bank(tmp_path, batch_size=2)
    outcome = again.run("four", way)
    assert calls == [0, 2, 2, 4]
    assert outcome.images.shape == (6, 3, 32, 32)
    monkeypatch.undo()
    fresh = small_world.make_bank(tmp_path / "fresh", batch_size=2).run("four", way)
    assert torch.equal(outcome.images, fresh.images)
    assert outcome.nfe.tolist() == [4.0] * 6


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path, monkeypatch) -> None:
    bank = small_world.make_bank(tmp_path)

    def fill_the_disk(_, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("training.bank.save_file", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        bank.run("four", lambda: accelerated(bank.pipe, "steps:4"))
    assert [path.name for path in tmp_path.iterdir()] == ["bank.json"]


@contextmanager
def builder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A builder that waits to be told to begin."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder)],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path) -> None:
    with builder(tmp_path) as process:
        go(process)
        patience = time.monotonic() + 200
        while len(list(tmp_path.glob("*.safetensors"))) < 2 and time.monotonic() < patience:
            time.sleep(0.01)
        process.kill()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert 2 <= len(done) < 12
    torch.set_num_threads(1)
    bank = small_world.make_bank(tmp_path, batch_size=1)
    fresh = small_world.make_bank(tmp_path / "fresh", batch_size=1)
    assert torch.equal(bank.converged(), fresh.converged())
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.slow
def test_two_builders_of_one_bank_do_not_spoil_it(tmp_path) -> None:
    folder = tmp_path / "shared"
    with builder(folder) as one, builder(folder) as other:
        go(one)
        go(other)
        assert [process.wait(timeout=300) for process in (one, other)] == [0, 0]
    torch.set_num_threads(1)
    shared = small_world.make_bank(folder, batch_size=1)
    fresh = small_world.make_bank(tmp_path / "fresh", batch_size=1)
    assert torch.equal(shared.converged(), fresh.converged())
    tables = [bank.searched(small_world.FAMILY, 4).error for bank in (shared, fresh)]
    assert torch.equal(*tables)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

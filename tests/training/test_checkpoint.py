# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact, whole or absent whatever kills the process or fills the disk, and of this recipe."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from training import checkpoint
from training.checkpoint import Checkpoints

RECIPE = {"seed": 1, "optimiser": {"rate": 3e-4, "betas": (0.9, 0.99)}, "heads": ["step"]}


def state_of(iteration: int) -> dict[str, Any]:
    """A state whose every part tells its iteration."""
    return {
        "iteration": iteration,
        "x": torch.full((100,), float(iteration)),
        "moments": {
            0: {"step": torch.tensor(float(iteration)), "rates": (iteration / 3, iteration)}
        },
    }


def assert_consistent(run: Checkpoints, iteration: int | None = None) -> None:
    loaded = run.load(iteration)
    i, wanted = loaded["iteration"], state_of(loaded["iteration"])
    assert torch.equal(loaded["state"]["x"], wanted["x"])
    assert loaded["state"]["moments"] == wanted["moments"]
    assert loaded["state"]["iteration"] == i
    assert loaded["warnings"] == []


def opened(tmp_path: Path, **options: Any) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", fingerprint=RECIPE, **options)


def saved(tmp_path: Path, *iterations: int, **options: Any) -> Checkpoints:
    run = opened(tmp_path, **options)
    for i in iterations:
        run.save(i, state_of(i))
    return run


def names(run: Checkpoints) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


def iterations(run: Checkpoints) -> list[int]:
    return [int(name.split("-")[1]) for name in names(run)]


def test_a_checkpoint_is_two_plain_files(tmp_path: Path) -> None:
    path = saved(tmp_path).save(12, state_of(12), score=0.5)
    assert path.name == "iteration-00000012"
    assert sorted(p.name for p in path.iterdir()) == ["state.json", "tensors.safetensors"]
    document = json.loads((path / "state.json").read_text())
    assert (document["format"], document["version"]) == ("rapid3rt.checkpoint", 1)
    assert (document["torch"], document["iteration"]) == (torch.__version__, 12)
    assert document["score"] == 0.5
    assert document["recipe"]["optimiser"]["betas"] == [0.9, 0.99]


def test_another_process_reads_what_was_saved(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    again = opened(tmp_path)
    assert again.latest() == 2
    assert_consistent(again)
    assert_consistent(again, 1)


def test_files_are_as_public_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    folder = saved(tmp_path, 1).folder / "iteration-00000001"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "other", *folder.iterdir())}
    assert len(modes) == 1


def test_nothing_is_made_before_the_first_save(tmp_path: Path) -> None:
    run = opened(tmp_path)
    assert run.latest() is None
    assert run.best() is None
    run.rewind(3)
    assert not run.folder.exists()
    with pytest.raises(
        ValueError, match=r"^folder must hold a checkpoint, got none in '.*checkpoints'$"
    ):
        run.load()


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    run = opened(tmp_path, keep_last=2)
    scores = [0.1, 0.9, float("nan"), 0.9, None, float("inf"), -1.0]
    for i, score in enumerate(scores):
        run.save(i, state_of(i), score=score)
    assert iterations(run) == [1, 5, 6]
    assert run.best() == 1
    assert run.load(1)["score"] == 0.9
    assert run.load()["score"] == -1.0
    assert run.load(5)["score"] is None
    run.save(7, state_of(7), score=2)
    assert iterations(run) == [6, 7]


def test_one_alone_may_stay(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, 2, 3, keep_last=1)
    assert iterations(run) == [3]
    assert_consistent(run)


def test_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    run = saved(tmp_path, 4, 5, keep_last=1)
    for _ in range(2):
        path = run.save(5, {**state_of(5), "note": "after the evaluation"}, score=1.0)
    assert names(run) == [path.name] == ["iteration-00000005-3"]
    assert run.load(5)["state"]["note"] == "after the evaluation"
    run.save(6, state_of(6), score=0.0)
    assert names(run) == ["iteration-00000005-3", "iteration-00000006"]


def test_a_run_goes_back_only_when_asked(tmp_path: Path) -> None:
    run = saved(tmp_path, 3, 6, 9)
    with pytest.raises(
        ValueError, match=r"^iteration must be a number from 9 on, got 4; call rewind first"
    ):
        run.save(4, state_of(4))
    run.rewind(3)
    assert iterations(run) == [3]
    run.save(4, state_of(4))
    assert_consistent(opened(tmp_path))


@pytest.mark.parametrize("wrong", [-1, 1.0, True, None, "3"])
def test_iterations_are_numbers(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^iteration must be a number from 0 on, got"):
        opened(tmp_path).save(wrong, {})


def test_an_iteration_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^iteration must be one of 2, 3, got 7$"):
        saved(tmp_path, 2, 3).load(7)


def test_keep_last_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^keep_last must be at least 1, got 0$"):
        opened(tmp_path, keep_last=0)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=r"^folder must be a folder, got the file"):
        opened(tmp_path)


def test_other_files_beside_are_left_alone(tmp_path: Path) -> None:
    run = saved(tmp_path, 1, keep_last=1)
    for name in ("iteration-x", "notes.txt", "iteration-00000009.bak"):
        (run.folder / name).mkdir()
    run.save(2, state_of(2))
    assert run.latest() == 2
    assert names(run) == [
        "iteration-00000002",
        "iteration-00000009.bak",
        "iteration-x",
        "notes.txt",
    ]


# Recipes and versions.


def test_another_recipe_is_refused_by_its_fields(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    other = {"seed": 2, "optimiser": {"rate": 3e-4, "betas": [0.9, 0.95]}, "dials": [5]}
    with pytest.raises(
        ValueError, match=r"^recipe must be that of '.*00000001', got other values: "
    ) as error:
        Checkpoints(tmp_path / "checkpoints", fingerprint=other)
    assert str(error.value).endswith(
        'dials (nothing there, [5] here); heads (["step"] there, nothing here); '
        "optimiser.betas ([0.9, 0.99] there, [0.9, 0.95] here); seed (1 there, 2 here)"
    )


def test_a_recipe_may_change_while_the_folder_is_open(tmp_path: Path) -> None:
    run = opened(tmp_path)
    Checkpoints(tmp_path / "checkpoints", fingerprint={"seed": 2}).save(1, state_of(1))
    with pytest.raises(ValueError, match=r"seed \(2 there, 1 here\)"):
        run.load()


def test_tuples_and_odd_numbers_in_a_recipe_equal_themselves(tmp_path: Path) -> None:
    for _ in range(2):
        recipe = {"clip": float("inf"), "floor": float("nan"), "betas": (0.9, 0.99)}
        Checkpoints(tmp_path, fingerprint=recipe).save(1, {})
    with pytest.raises(ValueError, match=r"clip \(\"Infinity\" there, 1.0 here\)$"):
        Checkpoints(tmp_path, fingerprint={**recipe, "clip": 1.0})


def test_a_recipe_is_json(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^fingerprint must be JSON, got: Object of type PosixPath"
    ):
        Checkpoints(tmp_path, fingerprint={"out": tmp_path})


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields as another version would have written them: with a checksum that fits."""
    document = json.loads(path.read_text()) | changes
    del document["sha256"]
    document["sha256"] = checkpoint._digest(document)
    path.write_text(json.dumps(document))


def test_another_torch_is_a_warning(tmp_path: Path) -> None:
    run = saved(tmp_path, 1)
    rewrite(run.folder / "iteration-00000001" / "state.json", torch="1.0", rapid3rt="0.0.1")
    torch_line, own_line = run.load()["warnings"]
    assert torch_line.startswith(f"written by torch 1.0, read by torch {torch.__version__}: ")
    assert own_line.startswith("written by rapid3rt 0.0.1, read by rapid3rt ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2, "rapid3rt": "9.1"}, r"version must be 1, got 2, written by rapid3rt 9\.1$"),
        ({"format": "other"}, r"format must be 'rapid3rt\.checkpoint', got 'other'$"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = saved(tmp_path, 1)
    rewrite(run.folder / "iteration-00000001" / "state.json", **change)
    with pytest.raises(ValueError, match=message):
        run.load()
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


# Damage.


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
def test_damage_is_found_named_and_has_a_way_out(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = saved(tmp_path, 3, 6)
    damage(run.folder / "iteration-00000006" / name)
    with pytest.raises(
        ValueError,
        match=rf"{name}: .* must .*; delete '.*-00000006' to go on from iteration-00000003$",
    ):
        run.load()
    assert_consistent(run, 3)
    shutil.rmtree(run.folder / "iteration-00000006")
    assert_consistent(opened(tmp_path))


def test_every_byte_counts(tmp_path: Path) -> None:
    run = opened(tmp_path)
    folder = run.save(1, {"x": torch.ones(3), "rate": 0.25})
    for path in folder.iterdir():
        whole = path.read_bytes()
        for i in range(0, len(whole), 5):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 2]) + whole[i + 1 :])
            with pytest.raises(ValueError, match=r"iteration-00000001|^recipe must"):
                run.load()
        path.write_bytes(whole)
    assert run.load()["state"]["rate"] == 0.25


def test_the_only_checkpoint_damaged(tmp_path: Path) -> None:
    run = saved(tmp_path, 3)
    truncate(run.folder / "iteration-00000003" / "state.json")
    with pytest.raises(ValueError, match=r"delete '.*-00000003' to begin anew: none is before it$"):
        opened(tmp_path)


def test_a_run_saves_on_beside_a_damaged_one(tmp_path: Path) -> None:
    run = saved(tmp_path, 3, 6)
    truncate(run.folder / "iteration-00000003" / "state.json")
    for i in (9, 12):
        run.save(i, state_of(i), score=1.0)
    assert iterations(run) == [6, 9, 12]
    assert run.best() == 9


def test_a_half_written_folder_is_ignored_and_cleaned(tmp_path: Path) -> None:
    run = saved(tmp_path, 3)
    half = run.folder / ".incomplete-00ff"
    half.mkdir()
    (half / "state.json").write_text("{")
    again = opened(tmp_path)
    assert_consistent(again)
    again.save(4, state_of(4))
    assert names(again) == ["iteration-00000003", "iteration-00000004"]


def test_a_state_that_cannot_be_kept_touches_nothing(tmp_path: Path) -> None:
    run = saved(tmp_path, 3)
    with pytest.raises(ValueError, match=r"^state\.x must be a tensor"):
        run.save(4, {"x": object()})
    assert names(run) == ["iteration-00000003"]


# Full disks.


class FillingFile:
    """A new file on a disk with little room."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> FillingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> None:
        self.file.write(content[: self.room[0]])
        self.room[0] -= len(content)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def full_disk(room: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All new files together take so many bytes and no more."""
    real, left = Path.open, [room]

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        file = real(path, mode, **options)
        return FillingFile(file, left) if "x" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        yield


@pytest.mark.parametrize("room", [0, 100, 700])
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    run = saved(tmp_path, 3)
    message = r"iteration 4 \(0\.0 MB\) could not be written"
    with full_disk(room, monkeypatch), pytest.raises(OSError, match=message) as error:
        run.save(4, state_of(4))
    assert error.value.errno == errno.ENOSPC
    assert str(error.value).endswith("(No space left on device); that of 3 is intact")
    assert names(run) == ["iteration-00000003"]
    assert_consistent(run)
    run.save(4, state_of(4))
    assert_consistent(opened(tmp_path), 4)


FULL = """
import sys, torch
from training.checkpoint import Checkpoints
run = Checkpoints(sys.argv[1], fingerprint={})
for i in range(100):
    try:
        run.save(i, {"x": torch.full((40_000,), float(i))}, score=float(i == 0))
    except OSError as error:
        left = run.load()
        assert left["state"]["x"].eq(left["iteration"]).all()
        print(left["iteration"], sorted(p.name for p in run.folder.iterdir()), error, sep="|")
        break
"""


@pytest.mark.slow
def test_a_real_full_disk(tmp_path: Path) -> None:
    """A memory disk of 512 KB in a namespace of its own: three checkpoints of 160 KB fit, a fourth does not."""
    room = tmp_path / "disk"
    room.mkdir()
    inside = ["bash", "-c", 'mount -t tmpfs -o size=512k none "$0" && exec "$@"', str(room)]
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-Urm", *inside, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine mounts no memory disk without root")
    paths = os.pathsep.join(
        map(str, (Path(checkpoint.__file__).parents[1], *filter(None, sys.path)))
    )
    done = subprocess.run(
        ["unshare", "-Urm", *inside, sys.executable, "-c", FULL, str(room / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    latest, left, message = done.stdout.strip().split("|")
    assert (latest, left) == ("2", str([f"iteration-{i:08d}" for i in range(3)]))
    assert message.endswith("(No space left on device); that of 2 is intact")


# Kills.


class Killed(BaseException):
    """No handler of the code sees it: what is done is done, nothing more happens."""


CALLS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir", "scandir")


@contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Die before the given call to the system."""
    seen: list[str] = []
    with monkeypatch.context() as patch:

        def counted(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def run(*args: Any, **options: Any) -> Any:
                seen.append(name)
                if len(seen) > call:
                    raise Killed
                return real(*args, **options)

            return run

        for name in CALLS:
            patch.setattr(os, name, counted(name))
        yield seen


def test_killed_before_any_call_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At iteration 4 of a folder that holds 1 (best), 2 and 3 of two revisions: written, renamed, two taken away."""
    start = tmp_path / "start"
    run = Checkpoints(start, fingerprint=RECIPE, keep_last=2)
    for i in (1, 2, 3):
        run.save(i, state_of(i), score=-i)
    outcomes = []
    for call in range(100):
        folder = tmp_path / str(call)
        shutil.copytree(start, folder)
        run = Checkpoints(folder, fingerprint=RECIPE, keep_last=1)
        try:
            with killed_at(call, monkeypatch) as seen:
                run.save(3, state_of(3))
                run.save(4, state_of(4))
        except Killed:
            pass
        again = Checkpoints(folder, fingerprint=RECIPE, keep_last=1)
        outcomes.append(again.latest())
        for i in sorted(again._folders()):
            assert_consistent(again, i)
        assert 1 in again._folders(), "the best stays"
        again.save(5, state_of(5))
        assert names(again) == ["iteration-00000001", "iteration-00000005"]
        if len(seen) <= call:
            break
    assert call > 30
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {3, 4}


KILL = """
import os, random, signal, sys, time
import torch
from training.checkpoint import Checkpoints
torch.set_num_threads(1)
folder, rounds = sys.argv[1], int(sys.argv[2])
def state(i): return {"x": torch.full((20_000,), float(i)), "list": [i] * 500, "i": i}
def run():
    checkpoints = Checkpoints(folder, fingerprint={}, keep_last=2)
    last = checkpoints.latest()
    i = -1 if last is None else last
    while True:
        i += 1
        checkpoints.save(i, state(i), score=-abs(i - 7))
source, reached, halves = random.Random(0), [], 0
watch = Checkpoints(folder, fingerprint={})
for _ in range(rounds):
    before = watch.latest()
    child = os.fork()
    if child == 0:
        run()
    while watch.latest() == before:
        time.sleep(0.001)
    time.sleep(source.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    halves += any(name.startswith(".incomplete") for name in os.listdir(folder))
    checkpoints = Checkpoints(folder, fingerprint={}, keep_last=2)
    for i in checkpoints._folders():
        loaded = checkpoints.load(i)["state"]
        assert loaded["x"].eq(i).all() and loaded["list"] == [i] * 500 and loaded["i"] == i
    reached.append(checkpoints.latest())
assert reached == sorted(reached), reached
assert reached[-1] < 8 or 7 in checkpoints._folders()
print(reached[-1], halves, len(os.listdir(folder)))
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    paths = os.pathsep.join(
        map(str, (Path(checkpoint.__file__).parents[1], *filter(None, sys.path)))
    )
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path / "run"), "20"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    reached, halves, left = map(int, done.stdout.split())
    assert reached >= 19
    assert halves > 0, "some kills met a checkpoint half written"
    assert left <= 8

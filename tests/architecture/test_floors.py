# SPDX-License-Identifier: Apache-2.0
"""What keeps the house in shape: imports go down only, and every op, variable and name stands where it must."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rapid3rt import envs, ops
from rapid3rt.ops import library, native, reference
from rapid3rt.testing.cases import CASES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rapid3rt"
TRAINING = ROOT / "training"

# A room may import rooms of lower floors and itself, nothing else.
FLOORS = {
    "errors": 0,
    "envs": 0,
    "types": 0,
    "ops": 1,
    "cache": 2,
    "planning": 2,
    "adapters": 3,
    "policies": 3,
    "runtime": 4,
    "pipeline": 5,
    "support": 5,
    "calibrate": 5,
    "tiny": 5,
    "cli": 5,
    "__init__": 5,
    "__main__": 5,
    "testing": 2,
}
TOP = 5
TESTING_USES = {"errors", "envs", "types", "ops"}
POLICY_METHODS = {
    "begin",
    "decide_compute",
    "decide_step",
}  # documented once, by the protocol in types.py
DIFFUSERS_ROOMS = {"adapters", "runtime", "pipeline", "tiny", "cli", "calibrate"}


def sources(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, at the top or inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            yield module
            if module == "rapid3rt":
                yield from (f"rapid3rt.{alias.name}" for alias in node.names)


def rooms_used(path: Path) -> set[str]:
    used = {name.split(".")[1] for name in imports(path) if name.startswith("rapid3rt.")}
    return {room for room in used if room in FLOORS} - {room_of(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in sources()} <= set(FLOORS)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    used = rooms_used(path)
    if room == "testing":
        assert used <= TESTING_USES
        return
    wrong = {other for other in used if FLOORS[other] >= FLOORS[room]}
    if FLOORS[room] == TOP:
        wrong = set()  # the top floor wires concretes together
    assert not wrong, f"{name_of(path)} on floor {FLOORS[room]} imports {sorted(wrong)}"
    assert "testing" not in used or FLOORS[room] == TOP


@pytest.mark.parametrize("path", sources(PACKAGE / "runtime"), ids=name_of)
def test_the_runtime_knows_protocols_only(path: Path) -> None:
    allowed = {"rapid3rt.adapters.base", "rapid3rt.policies.base"}
    concrete = {
        name
        for name in imports(path)
        if name.startswith(("rapid3rt.adapters", "rapid3rt.policies"))
    } - allowed
    assert not concrete


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_the_package_never_imports_training(path: Path) -> None:
    assert not [
        name for name in imports(path) if name.split(".")[0] in ("training", "benches", "tests")
    ]


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_diffusers_stays_in_its_rooms(path: Path) -> None:
    if room_of(path) not in DIFFUSERS_ROOMS:
        assert "diffusers" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_nothing_is_pickled(path: Path) -> None:
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & {
        n.split(".")[0] for n in imports(path)
    }
    assert not re.search(r"torch\.(save|load)\(", path.read_text())


def test_environment_variables_are_declared_once() -> None:
    for path in sources():
        text = path.read_text()
        if path.name != "envs.py":
            read = re.findall(r"(?:environ(?:\.get)?|getenv)[\[(]\s*[\"'](RAPID3RT_\w+)", text)
            assert not read, f"{name_of(path)} reads {read}; use rapid3rt.envs"
    declared = re.findall(r"environ\.get\(\"(\w+)\"", (PACKAGE / "envs.py").read_text())
    assert sorted(declared) == sorted(envs.VARIABLES)


def test_an_op_has_one_name_everywhere() -> None:
    registered = set(library.SCHEMAS)
    assert registered == {case.op for case in CASES}
    kernels = (ROOT / "csrc" / "cpu" / "ops.h").read_text()
    for op in registered:
        assert callable(getattr(reference, op))
        assert callable(getattr(native, op))
        assert op in ops.__all__
        # The in-place form and the fused lookup share a kernel with their plain form.
        assert f"void {op.removesuffix('_').removesuffix('_norm')}(" in kernels


def test_sources_are_ascii_and_carry_their_licence() -> None:
    files = [*sources(), *sources(ROOT / "tests"), *sources(ROOT / "benches"), *sources(TRAINING)]
    files += [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    for path in files:
        text = path.read_text()
        assert text.isascii(), f"{name_of(path)} is not ASCII"
        if text:
            assert "SPDX-License-Identifier: Apache-2.0" in text.splitlines()[0], name_of(path)


def public_definitions(tree: ast.Module) -> Iterator[ast.AST]:
    """The module, its public functions and classes, and public methods of those classes."""
    yield tree
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, kinds) and not member.name.startswith("_"):
                        yield member


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    if not path.read_text():
        return
    tree = ast.parse(path.read_text())
    missing = [
        getattr(node, "name", "module")
        for node in public_definitions(tree)
        if ast.get_docstring(node) is None  # type: ignore[arg-type]
        and getattr(node, "name", "") not in POLICY_METHODS
    ]
    assert not missing, f"{name_of(path)}: no docstring on {missing}"

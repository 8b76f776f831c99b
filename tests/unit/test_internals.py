"""Private names of torch, pytest and Hypothesis: behind one door each, refused when missing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import pytest_dcp
from pytest_dcp._torch_internals import supported_versions
from pytest_dcp._torch_internals.supported_versions import TORCH
from pytest_dcp.errors import UnsupportedVersionError

ROOT = Path(pytest_dcp.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
LIBRARIES = ("torch", "pytest", "_pytest", "hypothesis")
TORCH_DOOR = "_torch_internals/"
PYTEST_DOOR = "_pytest_internals.py"
HYPOTHESIS_DOOR = "_harness/lockstep/hypothesis_"
FACES = "checkpoint/"
"""Modules that have the names of torch's module of the same name; see `is_face_of`."""
STANDARD = {
    "_exit", "_getframe", "_fields", "_clear", "_run_exitfuncs", "_exit_function",
    "_finalizer_registry", "_registered_with_atexit", "_index_iter", "_exitfunc",
    "_threading_atexits", "_handlerList", "_data", "_signal", "_lock", "_state", "_target",
    "_initializing", "_normal_accessor", "_popen", "_Popen", "_args", "_kwargs",
}  # fmt: skip
"""Private names of the standard library, which its own versions keep."""
NAMES = {"_own", "_theirs_too"}, {"_theirs_too"}
"""Of a package and of a door, for the examples below."""
OTHERS = {"_data_suffix_specified"}
"""Of coverage.py, which `rank/coverage` alone talks to."""


def doors() -> list[Path]:
    return [*sorted((ROOT / TORCH_DOOR).glob("*.py")), ROOT / PYTEST_DOOR]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_private_path(module: str) -> bool:
    parts = module.split(".")
    of_hypothesis = parts[0] == "hypothesis" and parts[1:2] in (["internal"], ["core"])
    return of_hypothesis or any(map(is_private, parts))


def is_face_of(path: Path, module: str) -> bool:
    if not path.is_relative_to(ROOT / FACES):
        return False
    inside = path.relative_to(ROOT / FACES).with_suffix("").parts
    return module == ".".join(["torch.distributed.checkpoint", *inside])


def imports_of(tree: ast.AST) -> Iterator[tuple[ast.stmt, str, str, str]]:
    """Of the libraries: (statement, module, name in it or "", the local name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    yield node, alias.name, "", alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                yield node, str(node.module), alias.name, alias.asname or alias.name


def defined_names() -> set[str]:
    """Names that the package gives to functions, classes, attributes and variables of its own."""
    found: set[str] = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and root_of(node.value) in ("self", "cls")
            ):
                found.add(node.attr)
    return found


def read_names(tree: ast.AST) -> Iterator[tuple[int, ast.expr, str]]:
    """Every attribute that is read or set, also by getattr: (line, of what, its name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.value, node.attr
        elif isinstance(node, ast.Call):
            match node.func, node.args:
                case ast.Name("getattr" | "hasattr" | "setattr"), [of, ast.Constant(str(name)), *_]:
                    yield node.lineno, of, name


def root_of(value: ast.expr) -> str:
    while isinstance(value, ast.Attribute):
        value = value.value
    return value.id if isinstance(value, ast.Name) else ""


def private_uses(path: Path, tree: ast.AST, ours: set[str], theirs: set[str]) -> list[str]:
    """Where a module uses a private name of torch, pytest or Hypothesis, in words.

    ours: names that the package has too. theirs: names that the doors use; of `self` only ours.
    """
    found = []
    roots = set()
    for node, module, name, local in imports_of(tree):
        roots.add(local)
        whole = f"{module}.{name}" if name else module
        if is_private_path(whole) and not is_face_of(path, module):
            found.append(f"{node.lineno}: import of {module} {name}")
    for line, value, name in read_names(tree):
        if not is_private(name) or name in STANDARD | OTHERS:
            continue
        of_self = isinstance(value, ast.Name) and value.id in ("self", "cls")
        if root_of(value) in roots or name not in ours or (name in theirs and not of_self):
            found.append(f"{line}: {ast.unparse(value)}.{name}")
    return found


def test_private_names_of_other_packages_are_used_behind_their_doors_only() -> None:
    ours = defined_names()
    theirs = {name for door in doors() for _, _, name in read_names(TREES[door])}
    found = {}
    for path, tree in TREES.items():
        place = path.relative_to(ROOT).as_posix()
        if place.startswith((TORCH_DOOR, PYTEST_DOOR, HYPOTHESIS_DOOR, "demo/")):
            continue
        if place.startswith(FACES) and is_private(path.stem):
            continue
        if uses := private_uses(path, tree, ours, theirs):
            found[place] = uses
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "from torch.distributed.checkpoint.filesystem import _StorageInfo",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "import torch._dynamo.config",
        "from _pytest.nodes import Node",
        "def f():\n    from _pytest import nodes",
        "from hypothesis import core",
        "from hypothesis.internal.entropy import deterministic_PRNG",
        "def f(test): return test._hypothesis_internal_use_settings",
        "def f(test): return getattr(test, '_hypothesis_internal_use_seed', None)",
        "import torch\ntorch._C",
        "import torch.distributed as dist\ndist.distributed_c10d._world",
        "def f(tensor): return tensor._local_tensor",
        "def f(item): return getattr(item, '_fixtureinfo', None)",
        "def f(item): item._request = 1",
        "def f(item): return item._theirs_too",
        "class C:\n    def f(self): return self._own._theirs_too",
    ],
)
def test_the_search_finds_each_kind_of_use(code: str) -> None:
    assert private_uses(ROOT / "plan.py", ast.parse(code), *NAMES)


@pytest.mark.parametrize(
    "code",
    [
        "from torch.distributed.checkpoint.filesystem import FileSystemWriter",
        "def f(thing): return thing._own, thing.__dict__",
        "import os\nos._exit(1)",
        "from hypothesis.errors import StopTest",
        "class C:\n    def f(self): return self._theirs_too",
    ],
)
def test_the_search_leaves_public_and_own_names_alone(code: str) -> None:
    assert private_uses(ROOT / "plan.py", ast.parse(code), *NAMES) == []


@pytest.mark.parametrize("door", doors(), ids=lambda path: path.stem)
def test_every_import_behind_a_door_has_its_reason_above_it(door: Path) -> None:
    lines = door.read_text().split("\n")
    for node in ast.walk(ast.parse(door.read_text())):
        if not isinstance(node, ast.With):
            continue
        for before, statement in zip([None, *node.body], node.body, strict=False):
            above = lines[statement.lineno - 2].strip()
            follows = before is not None and before.end_lineno == statement.lineno - 1
            assert above.startswith("#") or follows, f"{door.name}:{statement.lineno}"


@pytest.mark.parametrize("door", doors(), ids=lambda path: path.stem)
def test_the_installed_versions_have_every_name(door: Path) -> None:
    importlib.import_module(".".join(door.relative_to(ROOT.parent).with_suffix("").parts))


def test_a_torch_without_a_name_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytest_dcp._torch_internals.checkpoint_classes"
    filesystem = importlib.import_module("torch.distributed.checkpoint.filesystem")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(filesystem, "_StoragePrefix")
    monkeypatch.setattr(supported_versions, "TORCH", replace(TORCH, installed="2.16.0"))
    with pytest.raises(UnsupportedVersionError) as refused:
        importlib.import_module(name)
    assert str(refused.value).startswith(
        "torch 2.16.0 has no torch.distributed.checkpoint.filesystem._StoragePrefix, which "
        "pytest_dcp needs: it supports torch 2.10 to 2.14"
    )
    assert isinstance(refused.value, ImportError)


def test_a_torch_without_a_module_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytest_dcp._torch_internals.dtensors"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor._dtensor_spec", None)
    with pytest.raises(
        UnsupportedVersionError, match=r" has no torch\.distributed\.tensor\._dtensor_spec, which"
    ):
        importlib.import_module(name)


class Declares:
    by_annotation: int

    def method(self) -> None: ...


def test_an_attribute_may_be_declared_by_an_annotation_and_is_else_refused() -> None:
    TORCH.require_attributes(Declares, "by_annotation", "method")
    with pytest.raises(UnsupportedVersionError, match=r"has no .*Declares\.missing, which"):
        TORCH.require_attributes(Declares, "method", "missing")
    module = ModuleType("torch.somewhere")
    with pytest.raises(UnsupportedVersionError, match=r"has no torch\.somewhere\._world, which"):
        TORCH.require_attributes(module, "_world")


def test_a_pytest_without_a_name_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pytest_dcp._pytest_internals", raising=False)
    monkeypatch.setitem(sys.modules, "_pytest.raises", None)
    with pytest.raises(UnsupportedVersionError) as refused:
        importlib.import_module("pytest_dcp._pytest_internals")
    assert str(refused.value).startswith(
        f"pytest {pytest.__version__} has no _pytest.raises, which pytest_dcp needs: it supports "
        "pytest 8.4 to "
    )


@pytest.mark.parametrize("marked", [True, False])
def test_an_unknown_pytest_is_an_error_of_suites_with_worlds_alone(
    tmp_path: Path, marked: bool
) -> None:
    mark = "@pytest.mark.world_size(2)\n" if marked else ""
    (tmp_path / "test_it.py").write_text(f"import pytest\n\n{mark}def test_it(): pass\n")
    conftest = "import _pytest.raises\ndel _pytest.raises.AbstractRaises\n"
    (tmp_path / "conftest.py").write_text(conftest)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_dcp", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    refusal = f"\npytest {pytest.__version__} has no _pytest.raises.AbstractRaises, which"
    assert (refusal in done.stdout) is marked
    assert "Traceback" not in done.stdout
    assert done.returncode == (pytest.ExitCode.INTERRUPTED if marked else pytest.ExitCode.OK)

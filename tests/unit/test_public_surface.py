"""The public names: four modules, and every name that the manual mentions.

A name that is added to or removed from a public module belongs in this file too.
"""

from __future__ import annotations

import ast
import importlib
import operator
import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

import pytest_dcp
from pytest_dcp import errors
from pytest_dcp.checkpoint import StepError

ROOT = Path(pytest_dcp.__file__).parent
PAGES = [ROOT.parent / "README.md", *sorted((ROOT / "guide").glob("*.md"))]
FOR_USERS = [page for page in PAGES if page.stem not in ("architecture", "changelog")]
PUBLIC = ("pytest_dcp", "pytest_dcp.checkpoint", "pytest_dcp.faults", "pytest_dcp.properties")
BESIDE = (
    "pytest_dcp.checkpoint._pg_transport",
    "pytest_dcp.checkpoint.convert",
    "pytest_dcp.checkpoint.format_utils",
    "pytest_dcp.api",
    "pytest_dcp.checkpoint.fsspec_storage",
    "pytest_dcp.checkpoint.state_dict",
    "pytest_dcp.checkpoint.staging",
)
"""Public modules beside them, whose names are not all in the package above."""
UNLISTED = {"StateDictStager"}
"""Names of modules whose `__all__` is empty, as torch's is."""
LIGHT = {"pytest_dcp", "pytest_dcp.errors"}
WORLD = """World Worlds FunctionWorld Running FaultyStorage announce_death LeftBehindWarning
DcpError WorldError RankFailure LostRank pytest_plugins"""


def public_names(module: str) -> list[str]:
    names: list[str] = importlib.import_module(module).__all__
    return names


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there_once_and_is_listed(module: str) -> None:
    found = importlib.import_module(module)
    names = public_names(module)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(found, name)] == []
    assert set(names) <= set(dir(found))


def test_the_package_itself_exports_the_classes_of_fixtures() -> None:
    assert set(WORLD.split()) <= set(public_names("pytest_dcp"))
    from pytest_dcp._harness.controller import worlds_fixture as worlds
    from pytest_dcp._harness.rank import world_fixture as lockstep_world

    assert pytest_dcp.World is lockstep_world.RankWorld
    assert pytest_dcp.Worlds is worlds.Worlds
    assert pytest_dcp.FaultyStorage is importlib.import_module("pytest_dcp.faults").FaultyStorage


def test_every_warning_of_the_harness_is_exported_by_the_package() -> None:
    warned = {"ChangedStateWarning", "LeftBehindWarning", "LostStateWarning", "NotAdoptedWarning"}
    assert warned <= {name for name in defined_names() if name.endswith("Warning")}
    assert warned <= set(public_names("pytest_dcp"))
    assert all(issubclass(getattr(pytest_dcp, name), pytest.PytestWarning) for name in warned)


def test_a_failed_step_is_shown_and_pickled_under_its_public_name() -> None:
    wrapped = (FileNotFoundError(2, "gone"), traceback.StackSummary())
    for failures in ({}, {0: wrapped}):
        error = StepError("plan", failures, "save")
        assert traceback.format_exception_only(error)[0].startswith(
            "pytest_dcp.checkpoint.StepError: step 'plan'"
        )
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pytest_dcp' has no attribute 'Wrold'"):
        _ = pytest_dcp.Wrold  # type: ignore[attr-defined]  # that is the point


def test_every_error_is_exported_by_the_package_and_where_it_is_raised() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    classes = {name for name in classes if getattr(errors, name).__module__ == errors.__name__}
    assert classes <= set(public_names("pytest_dcp"))
    below = {n for n in classes if issubclass(getattr(errors, n), errors.CheckpointError)}
    assert below <= set(public_names("pytest_dcp.checkpoint"))
    assert {"FaultError", "RecordingError"} <= set(public_names("pytest_dcp.faults"))
    assert {"LawError", "RecordingError"} <= set(public_names("pytest_dcp.properties"))


def defined_names() -> set[str]:
    """Public classes, and functions whose names no manual uses for something else."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        if "demo" in path.parts:
            continue
        for node in ast.parse(path.read_text()).body:
            is_law = isinstance(node, ast.FunctionDef) and node.name.startswith("assert_")
            if is_law or isinstance(node, ast.ClassDef):
                found.add(node.name)
    return {name for name in found if not name.startswith("_")}


def manual_names() -> set[str]:
    """Words of the manual's code, but for the page on how it is built and the changelog."""
    text = "\n".join(page.read_text() for page in FOR_USERS)
    blocks = re.findall(r"```.*?```", text, re.S)
    code = [*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    return {word for part in code for word in re.findall(r"[A-Za-z_]\w+", part)}


def test_every_name_of_the_manual_can_be_imported_from_a_public_module() -> None:
    exported = {name for module in (*PUBLIC, *BESIDE) for name in public_names(module)}
    methods = {name for name in manual_names() if hasattr(pytest_dcp.FaultyStorage, name)}
    mentioned = manual_names() & defined_names()
    assert len(mentioned) > 60
    assert mentioned - exported - methods - UNLISTED == set()


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: page.stem)
def test_every_path_of_the_manual_leads_to_something_public(page: Path) -> None:
    for module, attributes in re.findall(
        r"\b(pytest_dcp(?:\.\w+)+)(?::([\w.]+))?", page.read_text()
    ):
        of_torch = {
            "pytest_dcp.checkpoint._experimental",
            "pytest_dcp.checkpoint._fsspec_filesystem",
            "pytest_dcp.checkpoint._pg_transport",
        }
        assert "._" not in module or module in of_torch, module
        try:
            found: object = importlib.import_module(module)
        except ModuleNotFoundError:
            found = operator.attrgetter(module.removeprefix("pytest_dcp."))(pytest_dcp)
        if attributes:
            operator.attrgetter(attributes)(found)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, pytest_dcp; print(*(m for m in sys.modules if m.startswith('pytest_dcp')))"
    code += "; print(*(m for m in ('torch', 'numpy', 'pytest', 'hypothesis') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, heavy = done.stdout.splitlines()
    assert set(ours.split()) == LIGHT
    assert heavy == ""


def test_a_lazy_name_is_imported_when_it_is_asked_for() -> None:
    code = "from pytest_dcp import World, Worlds; print(World.__name__, Worlds.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "RankWorld Worlds\n"

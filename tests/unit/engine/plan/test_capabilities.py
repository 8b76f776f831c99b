"""Optional members of planners and storages beyond torch's hooks."""

from __future__ import annotations

import ast
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import pytest_dcp
from pytest_dcp._engine.plan import capabilities
from pytest_dcp._engine.plan.capabilities import (
    gives_data,
    has_disk,
    idle_renames_of,
    knows_saves,
    may_repeat,
    numbers_of,
    pickle_choice_of,
    place_of,
    plans_alone,
    prepares_values,
    report_of,
    targets_of,
)
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader

ENGINE = Path(pytest_dcp.__file__).parent / "_engine"
CAPABILITIES = {
    name: found
    for name, found in vars(capabilities).items()
    if inspect.isclass(found) and found.__module__ == capabilities.__name__
}
ITEMS: Any = object()


class Has:
    """An object with the attributes that a test gives it."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


class PassesOn:
    """A wrapper, as users write them."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_an_object_without_any_capability_takes_the_way_through_hooks() -> None:
    bare = object()
    assert not gives_data(bare)
    assert targets_of(bare, ITEMS) is None
    assert not prepares_values(bare)
    assert list(numbers_of(bare)) == []  # type: ignore[call-overload]  # of what is known here
    assert not plans_alone(bare)
    assert not may_repeat(bare, has_read=False)
    assert not may_repeat(bare, has_read=True)
    assert report_of(bare) == LoadReport()
    assert idle_renames_of(bare) == {}
    assert pickle_choice_of(bare) is None
    assert place_of(bare) is None
    assert not knows_saves(bare)
    assert not has_disk(bare)


def test_an_object_has_the_capabilities_whose_attributes_it_has() -> None:
    asked = []
    assert gives_data(Has(source=print))
    assert targets_of(Has(targets=lambda items: asked.append(items) or len), ITEMS) is len
    assert asked == [ITEMS]
    assert prepares_values(Has(takes_values=True))
    assert "n" in numbers_of(Has(takes_numbers={"n"}))
    assert plans_alone(Has(plans_alone=True))
    report = LoadReport(missing=("a",))
    assert report_of(Has(report=report)) is report
    assert idle_renames_of(Has(idle_renames={"a.": "'a.' renames nothing"})) != {}
    assert pickle_choice_of(Has(pickles_between_ranks=False)) is False
    assert place_of(Has(checkpoint_id="here")) == "here"
    assert knows_saves(Has(has_manifest=True))


def test_a_planner_may_say_no() -> None:
    assert not prepares_values(Has(takes_values=False))
    assert not plans_alone(Has(plans_alone=False))
    assert targets_of(Has(targets=lambda items: None), ITEMS) is None
    assert report_of(Has(report="a text of the user's own")) == LoadReport()


@pytest.mark.parametrize(("plans_again", "repeatable"), [(True, False), (False, True)])
def test_repeating_depends_on_whether_targets_may_have_been_filled(
    plans_again: bool, repeatable: bool
) -> None:
    planner = Has(plans_again=plans_again, repeatable=repeatable)
    assert may_repeat(planner, has_read=False) is plans_again
    assert may_repeat(planner, has_read=True) is repeatable


def test_a_wrapper_has_the_capabilities_of_its_storage_except_the_disk() -> None:
    class Filesystem:
        disk = "a disk"

    assert plans_alone(PassesOn(Has(plans_alone=True)))
    assert place_of(PassesOn(Has(checkpoint_id="here"))) == "here"
    assert has_disk(Filesystem())
    assert not has_disk(PassesOn(Filesystem()))


def test_our_own_classes_have_the_capabilities(tmp_path: Path) -> None:
    planner = DefaultLoadPlanner()
    assert gives_data(DefaultSavePlanner())
    assert prepares_values(planner)
    assert plans_alone(planner)
    assert may_repeat(planner, has_read=False)
    assert may_repeat(planner, has_read=True)
    assert place_of(FileSystemReader(tmp_path)) == tmp_path


def test_each_attribute_is_looked_up_only_here() -> None:
    """But by the classes that have it, on themselves."""
    attributes = {name for one in CAPABILITIES.values() for name in _members(one)}
    assert {"plans_alone", "repeatable", "targets", "source", "disk"} <= attributes
    found = []
    for path in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    ast.Name("getattr" | "hasattr"), [of, ast.Constant(str(name)), *_]
                ) if name in attributes and path.name != "capabilities.py":
                    if not isinstance(of, ast.Name) or of.id != "self":
                        found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == []


@pytest.mark.parametrize("name", CAPABILITIES)
def test_each_capability_is_listed_with_its_promise(name: str) -> None:
    assert f"`{name}`" in (capabilities.__doc__ or "")
    assert CAPABILITIES[name].__doc__
    uses = ("Used by", "Checked once for each save or load")
    assert any(use in (CAPABILITIES[name].__doc__ or "") for use in uses), "who uses it?"
    tree = ast.parse(inspect.getsource(CAPABILITIES[name]))
    for member in tree.body[0].body:  # type: ignore[attr-defined]  # a class
        if isinstance(member, ast.FunctionDef):
            assert ast.get_docstring(member)


def test_the_example_of_the_module_runs() -> None:
    results = doctest.testmod(capabilities)
    assert (results.attempted, results.failed) == (3, 0)


def _members(kind: type) -> set[str]:
    own = {*vars(kind), *vars(kind).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}

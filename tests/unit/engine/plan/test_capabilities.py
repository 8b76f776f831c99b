"""Optional members of planners and storages beyond torch's hooks."""

from __future__ import annotations

import ast
import doctest
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.planner import LoadPlan

import pytest_dcp
from pytest_dcp._engine.plan import capabilities, storage_capabilities
from pytest_dcp._engine.plan.capabilities import (
    compares_replicas,
    gives_data,
    pickle_choice_of,
)
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.plan.storage_capabilities import (
    cleans_up,
    has_disk,
    holds_copy,
    ignores_plans,
    keeps_files,
    knows_saves,
    names_saves,
    place_of,
    prepares_data,
    shares_folder,
    stages_at_will,
    verifies_bytes,
)
from pytest_dcp._engine.planners import load_capabilities
from pytest_dcp._engine.planners.load_capabilities import (
    ask_load_planner,
    idle_renames_of,
    numbers_of,
    report_of,
    targets_of,
)
from pytest_dcp.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    FsspecReader,
    FsspecWriter,
)
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

ENGINE = Path(pytest_dcp.__file__).parent / "_engine"
MODULES = (capabilities, storage_capabilities)
CAPABILITIES = {
    name: (module, found)
    for module in MODULES
    for name, found in vars(module).items()
    if inspect.isclass(found) and found.__module__ == module.__name__
}
OF_WRITERS = (cleans_up, names_saves, stages_at_will, shares_folder, holds_copy)
OF_READERS = (keeps_files, prepares_data, verifies_bytes, ignores_plans, shares_folder)
OF_CLASSES = (*OF_WRITERS, *OF_READERS, compares_replicas, has_disk)
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
    assert not ask_load_planner(bare).prepares_values
    assert list(numbers_of(bare)) == []  # type: ignore[call-overload]  # of what is known here
    assert not ask_load_planner(bare).plans_alone
    assert not ask_load_planner(bare).may_repeat(has_read=False)
    assert not ask_load_planner(bare).may_repeat(has_read=True)
    assert report_of(bare) == LoadReport()
    assert idle_renames_of(bare) == {}
    assert pickle_choice_of(bare) is None
    assert place_of(bare) is None
    assert not knows_saves(bare)
    assert not any(asks(bare) for asks in OF_CLASSES)


def test_an_object_has_the_capabilities_whose_attributes_it_has() -> None:
    asked = []
    assert gives_data(Has(source=print))
    assert targets_of(Has(targets=lambda items: asked.append(items) or len), ITEMS) is len
    assert asked == [ITEMS]
    assert ask_load_planner(Has(takes_values=True)).prepares_values
    assert "n" in numbers_of(Has(takes_numbers={"n"}))
    assert ask_load_planner(Has(plans_alone=True)).plans_alone
    report = LoadReport(missing=("a",))
    assert report_of(Has(report=report)) is report
    assert idle_renames_of(Has(idle_renames={"a.": "'a.' renames nothing"})) != {}
    assert pickle_choice_of(Has(pickles_between_ranks=False)) is False
    assert place_of(Has(checkpoint_id="here")) == "here"
    assert knows_saves(Has(has_manifest=True))


def test_a_planner_may_say_no() -> None:
    assert not ask_load_planner(Has(takes_values=False)).prepares_values
    assert not ask_load_planner(Has(plans_alone=False)).plans_alone
    assert targets_of(Has(targets=lambda items: None), ITEMS) is None
    assert report_of(Has(report="a text of the user's own")) == LoadReport()


@pytest.mark.parametrize(("plans_again", "repeatable"), [(True, False), (False, True)])
def test_repeating_depends_on_whether_targets_may_have_been_filled(
    plans_again: bool, repeatable: bool
) -> None:
    planner = Has(plans_again=plans_again, repeatable=repeatable)
    assert ask_load_planner(planner).may_repeat(has_read=False) is plans_again
    assert ask_load_planner(planner).may_repeat(has_read=True) is repeatable


def test_a_wrapper_has_the_capabilities_of_its_storage_except_the_disk() -> None:
    class Filesystem:
        disk = "a disk"

    assert ask_load_planner(PassesOn(Has(plans_alone=True))).plans_alone
    assert place_of(PassesOn(Has(checkpoint_id="here"))) == "here"
    assert has_disk(Filesystem())
    assert not has_disk(PassesOn(Filesystem()))


@pytest.mark.parametrize("asks", OF_WRITERS)
def test_a_wrapper_of_a_writer_gets_no_capability_by_forwarding(
    asks: Callable[[object], bool], tmp_path: Path
) -> None:
    assert not asks(PassesOn(FileSystemWriter(tmp_path)))


@pytest.mark.parametrize("asks", OF_READERS)
def test_a_wrapper_of_a_reader_gets_no_capability_by_forwarding(
    asks: Callable[[object], bool], tmp_path: Path
) -> None:
    assert not asks(PassesOn(FileSystemReader(tmp_path)))


@pytest.mark.parametrize("kind", [FileSystemWriter, FsspecWriter, HuggingFaceStorageWriter])
def test_our_writers_have_the_capabilities_of_writers(
    kind: type[FileSystemWriter], tmp_path: Path
) -> None:
    assert all(asks(kind(str(tmp_path))) for asks in OF_WRITERS)


@pytest.mark.parametrize("kind", [FileSystemReader, FsspecReader, HuggingFaceStorageReader])
def test_our_readers_have_the_capabilities_of_readers(
    kind: type[FileSystemReader], tmp_path: Path
) -> None:
    assert all(asks(kind(str(tmp_path))) for asks in OF_READERS)


def test_a_method_of_the_same_name_alone_is_no_capability() -> None:
    """Users' classes may have methods called `discard`, `verify` or `lookup`."""

    class Users:
        discard = new_save_id = must_stage = verify = lookup = leased = prepares = print

    assert not any(asks(Users()) for asks in OF_CLASSES)


def test_a_reader_that_wants_the_plans_of_all_ranks_gets_them(tmp_path: Path) -> None:
    class Wants(FileSystemReader):
        def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
            return plans

    assert not ignores_plans(Wants(tmp_path))


@pytest.mark.parametrize(("overrides", "must"), [(False, False), (True, True)])
def test_a_writer_must_stage_if_a_subclass_says_how(
    overrides: bool, must: bool, tmp_path: Path
) -> None:
    class Own(FileSystemWriter):
        if overrides:

            def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
                return state_dict

    writer = Own(tmp_path)
    assert stages_at_will(writer)
    assert writer.must_stage() is must


def test_our_own_classes_have_the_capabilities(tmp_path: Path) -> None:
    planner = DefaultLoadPlanner()
    assert gives_data(DefaultSavePlanner())
    assert compares_replicas(DefaultSavePlanner())
    assert ask_load_planner(planner).prepares_values
    assert ask_load_planner(planner).plans_alone
    assert ask_load_planner(planner).may_repeat(has_read=False)
    assert ask_load_planner(planner).may_repeat(has_read=True)
    assert place_of(FileSystemReader(tmp_path)) == tmp_path


def test_each_attribute_is_looked_up_only_here() -> None:
    """But by the classes that have it, on themselves."""
    attributes = {name for _, one in CAPABILITIES.values() for name in _members(one)}
    assert {"plans_alone", "repeatable", "targets", "source", "disk"} <= attributes
    modules = (*MODULES, load_capabilities)
    here = {f"{module.__name__.rpartition('.')[2]}.py" for module in modules}
    found = []
    for path in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    ast.Name("getattr" | "hasattr"), [of, ast.Constant(str(name)), *_]
                ) if name in attributes and path.name not in here:
                    if not isinstance(of, ast.Name) or of.id != "self":
                        found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == []


OURS = ("FileSystemWriter", "FileSystemReader", "DefaultSavePlanner", "DefaultLoadPlanner",
        "BlockingAsyncStager", "DefaultStager")  # fmt: skip


def test_the_steps_never_ask_whether_an_object_is_one_of_ours() -> None:
    """They ask for a capability, which others can have too."""
    found = [
        f"{path.parent.name}/{path.name}:{node.lineno}"
        for room in ("verbs", "background", "planners", "staging")
        for path in (ENGINE / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and any(isinstance(n, ast.Name) and n.id in OURS for n in ast.walk(node.args[1]))
    ]
    assert found == []


@pytest.mark.parametrize("name", CAPABILITIES)
def test_each_capability_is_listed_with_its_promise(name: str) -> None:
    module, kind = CAPABILITIES[name]
    assert f"`{name}`" in (module.__doc__ or "")
    uses = ("Used by", "Checked once for each save or load")
    assert any(use in (kind.__doc__ or "") for use in uses), "who uses it?"
    tree = ast.parse(inspect.getsource(kind))
    for member in tree.body[0].body:  # type: ignore[attr-defined]  # a class
        if isinstance(member, ast.FunctionDef):
            assert ast.get_docstring(member)


def test_the_examples_of_the_modules_run() -> None:
    results = doctest.testmod(load_capabilities)
    assert (results.attempted, results.failed) == (4, 0)
    results = doctest.testmod(storage_capabilities)
    assert (results.attempted, results.failed) == (3, 0)


def _members(kind: type) -> set[str]:
    own = {*vars(kind), *vars(kind).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}

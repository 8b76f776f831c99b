"""A caller's loader: its error counts against a folder only if it can load a good one."""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as torch_dcp

import pytest_dcp.checkpoint as dcp
from pytest_dcp.faults import recorded
from pytest_dcp.faults.crashes.crash_state import CrashState, loads_one_of
from pytest_dcp.faults.storage import FaultyStorage

NEW = {"step": 2}


def save(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps(NEW))


def states() -> list[CrashState]:
    return recorded(save).crash_states("kill")


def load(state: dict[str, Any], checkpoint_id: str | os.PathLike[str]) -> None:
    state.update(json.loads((Path(checkpoint_id) / "state.json").read_text()))


def only_the_folder(folder: Path) -> Any:
    return json.loads((folder / "state.json").read_text())


def always_wrong(state: dict[str, Any], checkpoint_id: str | os.PathLike[str]) -> None:
    raise TypeError("a mistake of the loader")


def wrong_where_nothing_is(state: dict[str, Any], checkpoint_id: str | os.PathLike[str]) -> None:
    assert os.listdir(checkpoint_id), "the loader expects a file"
    load(state, checkpoint_id)


def wrong_name_where_nothing_is(state: dict[str, Any], checkpoint_id: Any) -> None:
    if not os.listdir(checkpoint_id):
        no_such_name()  # type: ignore[name-defined]  # noqa: F821 - that is the mistake
    load(state, checkpoint_id)


def looks_up(state: dict[str, Any], checkpoint_id: Any) -> None:
    files = {name: name for name in os.listdir(checkpoint_id)}
    load({**state, "file": files["state.json"]}, checkpoint_id)
    load(state, checkpoint_id)


def wrong_argument_where_nothing_is(state: dict[str, Any], checkpoint_id: Any) -> None:
    len(None if not os.listdir(checkpoint_id) else "")  # type: ignore[arg-type]  # the mistake
    load(state, checkpoint_id)


def wrong_attribute_where_nothing_is(state: dict[str, Any], checkpoint_id: Any) -> None:
    if not os.listdir(checkpoint_id):
        None.loader  # type: ignore[attr-defined]  # noqa: B018 - the mistake
    load(state, checkpoint_id)


def wrong_in_a_library_where_nothing_is(state: dict[str, Any], checkpoint_id: Any) -> None:
    os.path.join(checkpoint_id, None if not os.listdir(checkpoint_id) else "loader")  # type: ignore[arg-type]
    load(state, checkpoint_id)


def looks_elsewhere_where_nothing_is(state: dict[str, Any], checkpoint_id: Any) -> None:
    if not os.listdir(checkpoint_id):
        open("/nowhere/loader.cfg").close()
    load(state, checkpoint_id)


def says_so_in_its_own_words(state: dict[str, Any], checkpoint_id: Any) -> None:
    if not os.listdir(checkpoint_id):
        raise ValueError("the loader has no state here")
    load(state, checkpoint_id)


class Stumbling(dcp.DefaultLoadPlanner):
    """Makes a mistake of its own where the engine calls it."""

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        state_dict.loader  # noqa: B018 - the mistake


def wrong_planner_where_nothing_is(state: dict[str, Any], checkpoint_id: Any) -> None:
    if not os.listdir(checkpoint_id):
        with tempfile.TemporaryDirectory() as whole:
            dcp.save({"step": 1}, checkpoint_id=whole, no_dist=True)
            dcp.load({"step": 0}, checkpoint_id=whole, planner=Stumbling(), no_dist=True)
    load(state, checkpoint_id)


def test_a_loader_may_refuse_the_folder_that_a_crash_left() -> None:
    found = [loads_one_of(state, None, NEW, load) for state in states()]
    assert set(found) == {"nothing", "new"}


def test_a_loader_of_another_signature_is_named_before_anything_is_tried() -> None:
    said = r"load= is called as load\(state_dict, checkpoint_id=folder\), to fill the state dict"
    for state in states():
        with pytest.raises(TypeError, match=said):
            loads_one_of(state, None, NEW, only_the_folder)


def test_keywords_are_part_of_the_signature() -> None:
    with pytest.raises(TypeError, match=r"checkpoint_id=folder, no_dist=\.\.\.\)"):
        loads_one_of(states()[0], None, NEW, load, no_dist=True)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (always_wrong, TypeError),
        (wrong_where_nothing_is, AssertionError),
        (wrong_name_where_nothing_is, NameError),
        (looks_up, KeyError),
        (wrong_argument_where_nothing_is, TypeError),
        (wrong_attribute_where_nothing_is, AttributeError),
        (wrong_in_a_library_where_nothing_is, TypeError),
        (looks_elsewhere_where_nothing_is, FileNotFoundError),
        (says_so_in_its_own_words, ValueError),
        (wrong_planner_where_nothing_is, dcp.CheckpointException),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_mistake_of_the_loader_is_no_verdict(
    wrong: Callable[..., None], error: type[Exception]
) -> None:
    """With no old checkpoint a load that fails is a right answer: a mistake must not be one."""
    empty = next(state for state in states() if not state.files)
    assert loads_one_of(empty, None, NEW, load) == "nothing"
    with pytest.raises(error) as caught:
        loads_one_of(empty, None, NEW, wrong)
    assert re.search(r"load|no_such_name|len\(\)|state\.json|join\(\)", str(caught.value))
    (note,) = caught.value.__notes__
    assert "no verdict" in note or "says nothing about crashes" in note


def refuses_with_a_checkpoint_error(state: dict[str, Any], checkpoint_id: Any) -> None:
    if not os.listdir(checkpoint_id):
        raise dcp.CheckpointError("nothing is here")
    load(state, checkpoint_id)


def refuses_for_a_reason(state: dict[str, Any], checkpoint_id: Any) -> None:
    try:
        load(state, checkpoint_id)
    except (OSError, ValueError) as error:
        raise RuntimeError("my storage cannot be read") from error


@pytest.mark.parametrize(
    "right", [refuses_with_a_checkpoint_error, refuses_for_a_reason, load], ids=lambda f: f.__name__
)
def test_a_refusal_is_a_verdict(right: Callable[..., None]) -> None:
    found = [loads_one_of(state, None, NEW, right) for state in states()]
    assert set(found) == {"nothing", "new"}


def test_an_error_of_a_function_in_c_about_bytes_is_a_verdict() -> None:
    def unpickles(state: dict[str, Any], checkpoint_id: Any) -> None:
        state.update(pickle.loads((Path(checkpoint_id) / "state.pkl").read_bytes()))

    trace = recorded(lambda folder: (folder / "state.pkl").write_bytes(pickle.dumps(NEW)))
    found = [loads_one_of(state, None, NEW, unpickles) for state in trace.crash_states("kill")]
    assert set(found) == {"nothing", "new"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_engine_refuses_by_its_own_exception(tmp_path: Path) -> None:
    def torch_load(state: dict[str, Any], checkpoint_id: Any) -> None:
        torch_dcp.load(state, checkpoint_id=checkpoint_id, no_dist=True)

    new = {"step": 2}
    trace = recorded(lambda folder: dcp.save(new, checkpoint_id=folder, no_dist=True))
    found = [loads_one_of(state, None, new, torch_load) for state in trace.crash_states("kill", 9)]
    assert set(found) == {"nothing", "new"}


def test_a_mistake_says_that_it_is_no_verdict_on_a_crash() -> None:
    with pytest.raises(TypeError, match="a mistake of the loader") as caught:
        loads_one_of(states()[0], None, NEW, always_wrong)
    assert "says nothing about crashes" in caught.value.__notes__[0]


def returns_a_state(state: dict[str, Any], checkpoint_id: Any) -> dict[str, Any]:
    filled = dict(state)
    load(filled, checkpoint_id)
    return filled


def test_a_loader_that_returns_a_state_and_fills_none_is_named() -> None:
    with pytest.raises(TypeError, match="returned a dict and did not fill the state dict"):
        loads_one_of(states()[0], None, NEW, returns_a_state)


def test_assert_loads_names_it_too(faulty_storage: FaultyStorage) -> None:
    (faulty_storage.checkpoint_dir / "state.json").write_text(json.dumps(NEW))
    with pytest.raises(TypeError, match="returned a dict and did not fill the state dict"):
        faulty_storage.assert_loads(NEW, load=returns_a_state)


def test_a_loader_may_fill_the_state_and_return_it() -> None:
    def fills_and_returns(state: dict[str, Any], checkpoint_id: Any) -> dict[str, Any]:
        load(state, checkpoint_id)
        return dict(state)

    assert loads_one_of(states()[-1], None, NEW, fills_and_returns) == "new"


def test_a_loader_is_tried_on_the_finished_folder_once() -> None:
    folders: list[str] = []

    def counted(state: dict[str, Any], checkpoint_id: Any) -> None:
        folders.append(os.fspath(checkpoint_id))
        load(state, checkpoint_id)

    several = states()
    for state in several:
        loads_one_of(state, None, NEW, counted)
    assert len(folders) == len(several) + 1


def test_a_refusal_is_the_cause_of_the_verdict() -> None:
    def refuses(state: dict[str, Any], checkpoint_id: Any) -> None:
        if not (Path(checkpoint_id) / "state.json").exists():
            raise ValueError("no state here")
        load(state, checkpoint_id)

    with pytest.raises(AssertionError, match="ValueError: no state here") as caught:
        loads_one_of(states()[0], {"step": 1}, NEW, refuses)
    assert isinstance(caught.value.__cause__, ValueError)


def test_assert_loads_names_a_wrong_signature_too(faulty_storage: FaultyStorage) -> None:
    with pytest.raises(TypeError, match="load= is called as load"):
        faulty_storage.assert_loads(NEW, load=only_the_folder)


def test_a_restored_state_can_be_passed_as_a_path() -> None:
    last = states()[-1]
    assert only_the_folder_of(last.restored()) == NEW
    folder = last.restored()
    assert os.listdir(folder) == ["state.json"]
    assert (Path(folder) / "state.json").exists()
    assert str(folder) == os.fspath(folder)


def only_the_folder_of(folder: os.PathLike[str]) -> Any:
    with open(os.path.join(folder, "state.json")) as file:
        return json.load(file)


def test_a_restored_folder_goes_with_its_object_or_its_block() -> None:
    last = states()[-1]
    folder = last.restored()
    path = Path(folder)
    assert path.is_dir()
    del folder
    assert not path.exists()
    opened = last.restored()
    with opened as inside:
        assert isinstance(inside, Path)
        assert inside.is_dir()
    assert not inside.exists()
    with pytest.raises(FileNotFoundError, match="when its `with` block ended"):
        os.fspath(opened)


def test_a_fork_does_not_remove_the_folder() -> None:
    folder = states()[-1].restored()
    child = os.fork()
    if not child:
        folder._remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(folder).is_dir()

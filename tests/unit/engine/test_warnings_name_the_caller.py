"""A warning of the engine shows the line of the user's call, as Python's own warnings do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pytest_dcp
import pytest_dcp.checkpoint as dcp


class ShortPlanner(dcp.DefaultSavePlanner):
    """Has the arguments of an older torch."""

    def set_up_planner(self, state_dict, is_coordinator):  # type: ignore[override,no-untyped-def]
        super().set_up_planner(state_dict, is_coordinator=is_coordinator)


class Unlisted:
    """A load refuses a value of this class."""


STATE = {"w": torch.ones(2)}


def overwrite(folder: Path) -> None:
    for _ in range(2):
        dcp.save(STATE, checkpoint_id=folder)


def save_with_the_storage_second(folder: Path) -> None:
    dcp.save(STATE, dcp.FileSystemWriter(folder))


def save_by_an_older_planner(folder: Path) -> None:
    dcp.save(STATE, checkpoint_id=folder, planner=ShortPlanner())


def save_an_unlisted_class(folder: Path) -> None:
    dcp.save({"value": Unlisted()}, checkpoint_id=folder)


CALLS = [
    (overwrite, "Detected an existing checkpoint"),
    (overwrite, "torch.distributed is disabled"),
    (save_with_the_storage_second, "argument order of save has been changed"),
    (save_by_an_older_planner, "set_up_planner has been updated"),
    (save_an_unlisted_class, "are refused by load unless"),
]


def test_the_engine_warns_by_warn_caller_alone() -> None:
    """`warnings.warn` counts frames, which change with every function in between."""
    root = Path(pytest_dcp.__file__).parent
    modules = [*root.glob("_engine/**/*.py"), *root.glob("checkpoint/**/*.py")]
    assert len(modules) > 200
    assert [path for path in modules if "warnings.warn(" in path.read_text()] == []


@pytest.mark.parametrize(("call", "text"), CALLS)
@pytest.mark.filterwarnings("default")
def test_a_warning_names_the_line_of_the_call(
    tmp_path: Path, call: Callable[[Path], None], text: str
) -> None:
    with pytest.warns(UserWarning, match=text) as warned:
        call(tmp_path / "checkpoint")
    named = [one for one in warned if text in str(one.message)]
    first = call.__code__.co_firstlineno
    assert {one.filename for one in named} == {__file__}
    assert all(first < one.lineno <= first + 4 for one in named)

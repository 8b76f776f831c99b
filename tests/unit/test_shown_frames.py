"""Which frames of a traceback are shown."""

from __future__ import annotations

import logging
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pytest_dcp
from pytest_dcp import tracebacks
from pytest_dcp.errors import DcpError
from pytest_dcp.tracebacks import (
    HIDE,
    drop_inner_frames,
    hides_frames,
    hides_frames_except_of_groups,
    is_explained,
    is_explained_at,
    mark_frames,
    owner_of,
    set_cause,
    without_ours,
)

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup  # pytest needs it there

PACKAGE = Path(pytest_dcp.__file__).parent
SOURCE = """
import json, os, warnings

def refuse(kind):
    raise kind("refused")

def slip():
    return {}["key"]

def open_file():
    os.stat("/no/such/file")

def warn():
    warnings.warn("outdated")

def call(function):
    return function()

def parse():
    json.loads("no json")
"""


@pytest.fixture
def ours() -> Any:
    """Functions that lie in a module of the package."""
    names: dict[str, Any] = {"__name__": "pytest_dcp.made_up"}
    exec(compile(SOURCE, str(PACKAGE / "made_up.py"), "exec"), names)
    return SimpleNamespace(**names, names=names)


def raised(function: Callable[..., object], *args: object) -> BaseException:
    try:
        function(*args)
    except Exception as error:  # noqa: BLE001 - any
        return error
    raise AssertionError("it raised nothing")


def users_mistake() -> None:
    raise ValueError("mine")


@pytest.mark.parametrize(
    ("file", "owner"),
    [
        (PACKAGE / "checkpoint" / "loading.py", "package"),
        (PACKAGE / "demo" / "test_fault.py", "user"),
        (PACKAGE / "properties" / "suite" / "errors.py", "user"),
        (Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py", "library"),
        (Path(sysconfig.get_path("purelib")) / "torch" / "serialization.py", "library"),
        ("<frozen importlib._bootstrap>", "library"),
        (__file__, "user"),
        ("<string>", "user"),
        ("/home/me/pytest_dcp_tests/test_it.py", "user"),
    ],
)
def test_a_file_is_the_packages_a_librarys_or_the_users(file: str | Path, owner: str) -> None:
    assert owner_of(str(file)) == owner


def test_errors_that_the_package_raises_on_purpose_are_explained(ours: Any) -> None:
    assert is_explained(raised(ours.refuse, ValueError))
    assert is_explained(raised(ours.refuse, AssertionError))
    assert is_explained(raised(ours.call, lambda: ours.refuse(TypeError)))
    assert is_explained(raised(ours.open_file))
    assert is_explained(raised(ours.warn)), "warnings are errors here"
    assert is_explained(DcpError("ours, wherever it was raised"))


def test_bugs_inside_or_outside_the_package_are_not_explained(ours: Any) -> None:
    for error in (
        raised(ours.slip),
        raised(ours.parse),
        raised(ours.call, users_mistake),
        raised(users_mistake),
        ValueError("never raised"),
    ):
        assert not is_explained(error)


@pytest.mark.parametrize(
    ("function", "argument", "hidden"),
    [
        ("refuse", ValueError, True),
        ("call", users_mistake, True),
        ("open_file", None, True),
        ("slip", None, False),
        ("parse", None, False),
    ],
)
def test_frames_of_ours_are_hidden_unless_something_of_ours_broke(
    ours: Any, function: str, argument: object, hidden: bool
) -> None:
    error = raised(getattr(ours, function), *([] if argument is None else [argument]))
    mark_frames(error)
    assert hides_frames(pytest.ExceptionInfo.from_exception(error)) is hidden
    assert ours.names[HIDE] is hides_frames
    shown = pytest.ExceptionInfo.from_exception(error).traceback
    shown = shown.filter(pytest.ExceptionInfo.from_exception(error))
    assert any("made_up" in str(entry.path) for entry in shown) is not hidden


def test_frames_of_causes_and_groups_are_marked_too(ours: Any) -> None:
    outer = ExceptionGroup("several", [ValueError("other")])
    outer.__cause__ = raised(ours.refuse, ValueError)
    mark_frames(outer)
    assert HIDE in ours.names
    del ours.names[HIDE]
    mark_frames(ExceptionGroup("several", [raised(ours.refuse, ValueError)]))  # type: ignore[type-var]  # it is an Exception
    assert HIDE in ours.names


def test_a_group_keeps_its_frames_where_pytest_cannot_show_it_without(ours: Any) -> None:
    error = raised(ours.refuse, lambda text: ExceptionGroup(text, [ValueError("one")]))
    mark_frames(error, hides_frames_except_of_groups)
    info = pytest.ExceptionInfo.from_exception(error)
    assert [str(entry.path) for entry in info.traceback.filter(info)][-1].endswith("made_up.py")
    other = pytest.ExceptionInfo.from_exception(raised(ours.refuse, ValueError))
    assert not any("made_up" in str(entry.path) for entry in other.traceback.filter(other))


def test_frames_of_the_user_are_never_marked() -> None:
    mark_frames(raised(users_mistake))
    assert HIDE not in globals()


def test_a_stack_that_arrived_as_text_is_judged_alike(ours: Any) -> None:
    in_ours = traceback.FrameSummary(str(PACKAGE / "x.py"), 3, "f", line="raise ValueError(")
    slip = traceback.FrameSummary(str(PACKAGE / "x.py"), 3, "f", line="return {}['key']")
    users = traceback.FrameSummary("/home/me/test_it.py", 3, "g", line="raise ValueError()")
    assert is_explained_at(ValueError(), [users, in_ours])
    assert is_explained_at(OSError(), [slip])
    assert not is_explained_at(KeyError(), [slip])
    assert not is_explained_at(ValueError(), [in_ours, users])
    assert not is_explained_at(ValueError(), [])
    assert without_ours([in_ours, users]) == [users]
    assert without_ours([users, slip]) == [users, slip]
    assert without_ours([]) == []


def test_a_boundary_leaves_the_callers_line_alone(ours: Any) -> None:
    error = raised(drop_inner_frames(ours.refuse), ValueError)
    # Python 3.10 keeps the frame that raises the error again.
    names = ["raised"] if sys.version_info >= (3, 11) else ["raised", "called"]
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)] == names
    assert is_explained(error)
    assert [*drop_inner_frames(lambda: [1])()] == [1]


def test_a_boundary_keeps_the_frames_of_an_unexplained_error(ours: Any) -> None:
    error = raised(drop_inner_frames(ours.slip))
    assert traceback.extract_tb(error.__traceback__)[-1].name == "slip"


def test_a_boundary_logs_the_whole_at_debug(ours: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pytest_dcp"):
        raised(drop_inner_frames(ours.refuse), ValueError)
    assert "in refuse" in caplog.text


def test_an_explained_cause_is_the_context_alone(ours: Any) -> None:
    outer, refused, slipped = DcpError("x"), raised(ours.refuse, ValueError), raised(ours.slip)
    set_cause(outer, refused)
    assert (outer.__cause__, outer.__context__) == (None, refused)
    assert "refused" not in "".join(traceback.format_exception(outer))
    set_cause(outer, slipped)
    assert outer.__cause__ is slipped


def test_a_text_leaves_out_the_same_frames(ours: Any) -> None:
    refused, slipped = raised(ours.refuse, ValueError), raised(ours.slip)
    refused.__cause__ = slipped
    text = tracebacks.format_error(refused, refused.__traceback__)
    assert "in refuse" not in text
    assert "in slip" in text
    assert text.endswith("ValueError: refused\n")

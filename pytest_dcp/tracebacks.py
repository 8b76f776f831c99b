"""Which frames of a traceback help its reader, and which are only this package's own.

An error is **explained** if its text says everything that the reader needs: the package raised it
on purpose (a `raise` statement of ours ran last), or the operating system raised it for a file that
the package asked for. Our frames add nothing to such an error, and nothing to an error of the
user's own code that we call (a planner, a progress function). They stay if our own code broke
unexpectedly. So the rule looks at the innermost frame, not at lists of exception classes:

- ours, at a `raise` statement, or with an OSError or a warning: explained, our frames go;
- the user's: theirs to fix, our frames go;
- ours at anything else, or a library's: everything stays.

The demo and the test classes for storages are read as the user's tests, though they lie here.
Standard library only.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from traceback import FrameSummary, StackSummary, TracebackException, walk_tb
from types import FrameType, TracebackType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar

from pytest_dcp.errors import DcpError

P = ParamSpec("P")
R = TypeVar("R")

PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
TESTS = (PACKAGE + "demo" + os.sep, os.path.join(PACKAGE, "properties", "suite") + os.sep)
STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
RAISE = dis.opmap["RAISE_VARARGS"]
ASKED: tuple[type[BaseException], ...] = (OSError, Warning)
"""Raised by the system for a call that the package made, or by a warning filter."""
EXPLAINED = "_dcp_explained"
"""Set on an error that left through a boundary: the frames that proved it explained are gone by
then.
"""
HIDE = "__tracebackhide__"
"""The name that pytest looks up among a frame's locals and globals."""

logger = logging.getLogger("pytest_dcp")

Owner = Literal["package", "library", "user"]


def add_note(error: BaseException, note: str) -> None:
    """Add a line that tracebacks show below the error's text.

    Python 3.10 keeps it where later versions do, and pytest shows it there; Python itself does not.
    """
    error.__dict__.setdefault("__notes__", []).append(note)


def owner_of(file: str) -> Owner:
    """Whose code a file holds. Pure (no I/O)."""
    if file.startswith(TESTS):
        return "user"
    if file.startswith(PACKAGE):
        return "package"
    is_library = file.startswith(("<frozen ", STANDARD_LIBRARY)) or any(
        part in file for part in INSTALLED
    )
    return "library" if is_library else "user"


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the line of the first caller outside the package, at any depth.

    In a thread that only the package and the standard library run in, the line is ours.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _is_between(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=2 if frame is None else level)


def _is_between(file: str) -> bool:
    """Whether a file's frames may lie between a warning and the line to name: ours, Python's."""
    owner = owner_of(file)
    return owner == "package" or (
        owner == "library" and not any(part in file for part in INSTALLED)
    )


def is_explained(error: BaseException) -> bool:
    """Whether the error's text says everything that its reader needs; see the module's
    docstring.
    """
    if isinstance(error, DcpError) or EXPLAINED in getattr(error, "__dict__", ()):
        return True
    if isinstance(error, ASKED):
        files = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
        return _is_called_by_package(files)
    return owner_of_innermost(error) == "package" and is_raised_on_purpose(error)


def is_explained_at(error: BaseException, stack: Sequence[FrameSummary]) -> bool:
    """`is_explained` for an error whose stack arrived as text."""
    if isinstance(error, ASKED):
        return _is_called_by_package([frame.filename for frame in stack])
    last = stack[-1] if stack else None
    return (
        last is not None
        and owner_of(last.filename) == "package"
        and (last.line or "").startswith("raise ")
    )


def _is_called_by_package(files: Sequence[str]) -> bool:
    """Whether the innermost frame outside of libraries is ours; files outermost first."""
    owners = (owner_of(file) for file in reversed(files))
    return next((owner for owner in owners if owner != "library"), "user") == "package"


def without_ours(stack: Sequence[FrameSummary]) -> list[FrameSummary]:
    """The frames to show of an error that is not explained."""
    if not stack or owner_of(stack[-1].filename) != "user":
        return list(stack)
    return [frame for frame in stack if owner_of(frame.filename) != "package"]


def _innermost(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def set_cause(error: BaseException, cause: BaseException | None) -> None:
    """Make `cause` the cause of an error whose text has that of the cause in it.

    An explained cause becomes the context only, for debuggers: as the cause it would be printed
    too, and repeat everything.
    """
    if cause is not None and is_explained(cause):
        error.__context__, error.__suppress_context__ = cause, True
    else:
        error.__cause__ = cause


class ExceptionInfo(Protocol):
    """pytest's own class, as passed to `__tracebackhide__`."""

    @property
    def value(self) -> BaseException: ...


def hides_frames(excinfo: ExceptionInfo) -> bool:
    """For pytest's `__tracebackhide__`: whether frames of the package are left out."""
    return _hides_frames_of(excinfo.value)


def hides_frames_except_of_groups(excinfo: ExceptionInfo) -> bool:
    """`hides_frames` for a pytest that fails to show a group of exceptions without frames."""
    return not _is_group(excinfo.value) and hides_frames(excinfo)


def _is_group(error: BaseException) -> bool:
    # Python 3.10 has no such class of its own.
    return isinstance(getattr(error, "exceptions", None), tuple)


def is_raised_by_user(error: BaseException) -> bool:
    """Whether the innermost frame of an error is in the user's code."""
    return owner_of_innermost(error) in ("user", None)


def owner_of_innermost(error: BaseException) -> Owner | None:
    """The owner of the code of an error's innermost frame; None for an error without frames."""
    innermost = _innermost(error.__traceback__)
    return None if innermost is None else owner_of(innermost.tb_frame.f_code.co_filename)


def is_raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement of Python code made the error."""
    innermost = _innermost(error.__traceback__)
    if innermost is None:
        return False
    return innermost.tb_frame.f_code.co_code[innermost.tb_lasti] == RAISE


def _hides_frames_of(error: BaseException) -> bool:
    return is_explained(error) or is_raised_by_user(error)


def format_error(error: BaseException, traceback: TracebackType | None) -> str:
    """The text of an error and of its causes, without unhelpful frames."""
    text = TracebackException(type(error), error, traceback)
    todo: list[tuple[BaseException | None, TracebackException | None]] = [(error, text)]
    while todo:
        link, link_text = todo.pop()
        if link is None or link_text is None:
            continue
        todo += [
            (link.__cause__, link_text.__cause__),
            (link.__context__, link_text.__context__),
        ]
        if _hides_frames_of(link):
            frames = [f for f in link_text.stack if owner_of(f.filename) != "package"]
            link_text.stack = StackSummary.from_list(frames)
    return "".join(text.format())


__tracebackhide__ = hides_frames


def mark_frames(
    error: BaseException, hides: Callable[[ExceptionInfo], bool] = hides_frames
) -> bool:
    """Make pytest call `hides` for each frame of the package, in the error and its causes.

    The mark is set in the frame's module globals, so no module or function must set it itself, and
    none can be forgotten. Returns whether there is such a frame.
    """
    ours = [f for f in _frames_of(error) if owner_of(f.f_code.co_filename) == "package"]
    for frame in ours:
        frame.f_globals.setdefault(HIDE, hides)
    return bool(ours)


def _frames_of(error: BaseException) -> Iterator[FrameType]:
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        chained = todo.pop()
        if chained is None or id(chained) in seen:
            continue
        seen.add(id(chained))
        todo += [chained.__cause__, chained.__context__]
        todo += getattr(chained, "exceptions", ())
        yield from (frame for frame, _ in walk_tb(chained.__traceback__))


class Boundary:
    """Where errors leave the package: drops the inner frames of explained ones.

    Their traceback then shows only the user's own line and the text. At level DEBUG the logger
    "pytest_dcp" logs all frames.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if error is None:
            return
        frames = error.__traceback__
        forget_frames(error)
        # The interpreter raises the error again with the traceback that it has now. Python 3.10
        # takes the one that it had on entry here, so we cut that; the caller's frame stays in it.
        if sys.version_info < (3, 11) and frames is not None and error.__traceback__ is None:
            frames.tb_next = None


BOUNDARY = Boundary()


def forget_frames(error: BaseException) -> None:
    """Drop the frames of an explained error that leaves the package, at once or in a future."""
    if is_explained(error):
        logger.debug("raised to the caller: %s", type(error), exc_info=error)
        error.__traceback__ = None
        with contextlib.suppress(AttributeError, TypeError):
            setattr(error, EXPLAINED, True)


def forget_locals(error: BaseException) -> None:
    """Empty the frames of an error, and of the errors that led to it, which may be kept for long:
    they hold the memory of the work that failed. Tracebacks show the same lines afterwards.
    """
    found: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in found:
            found[id(one)] = one
            traceback.clear_frames(one.__traceback__)
            ranks = getattr(one, "failures", {})
            failures = ranks.values() if isinstance(ranks, Mapping) else ()
            waiting += [one.__cause__, one.__context__, *(failed for failed, _ in failures)]


def drop_inner_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Make errors of a public function hide its internals."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with BOUNDARY:
            return function(*args, **kwargs)

    return called

"""A caller's `load=`: when its exception is a verdict on the folder, and when a mistake of the
loader.

A crash may leave a folder that cannot be loaded, so a loader may raise there. Its exception refuses
the folder only if the loader

- can be called as it will be: `load(state_dict, checkpoint_id=folder, **keywords)`;
- loads the folder as the recorded save left it when it ended;
- and the exception is about the folder: it is a `CheckpointError`, torch's `CheckpointException`,
  an OSError about a file of the folder or about none, a library's exception for bytes that it
  cannot read, or an exception that names one of these as its cause (`raise Mine() from error`).

Nothing else makes a state right, an exception of the caller's own code least of all: it would make
a wrong loader look like a checkpoint that is safe.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from traceback import StackSummary
from typing import Any

from pytest_dcp.errors import CheckpointError
from pytest_dcp.faults.crashes import folder_trees
from pytest_dcp.faults.crashes.disk_model import DiskModel, Rules
from pytest_dcp.faults.crashes.enumerate import in_order
from pytest_dcp.faults.crashes.trace import Trace
from pytest_dcp.faults.state_differences import blank, differences
from pytest_dcp.tracebacks import (
    add_note,
    is_raised_by_user,
    is_raised_on_purpose,
    owner_of,
    owner_of_innermost,
)

Load = Callable[..., Any]
"""`load(state_dict, checkpoint_id=folder, **keywords)`: fills the state dict from the folder."""
MISTAKES = (
    *(AssertionError, NameError, ImportError, NotImplementedError),
    *(TypeError, AttributeError, RecursionError),
)
"""Exceptions that point to a mistake in code, not to the folder."""
READ = (EOFError, UnicodeError)
"""Of Python's built-in exceptions, those about bytes."""
NO_VERDICT = (
    "raised by load= in a folder that a crash could have left: an exception of the loader's own "
    "code is no verdict on the folder. To refuse one, let it raise FileNotFoundError or "
    "pytest_dcp.checkpoint.CheckpointError"
)


def check_signature(load: Load, keywords: Mapping[str, Any]) -> None:
    """Raise TypeError unless a loader can be called as `dcp.load` is."""
    try:
        signature = inspect.signature(load)
    except ValueError:
        return  # a built-in function has no signature
    try:
        signature.bind({}, checkpoint_id="folder", **keywords)
    except TypeError as error:
        more = "".join(f", {name}=..." for name in keywords)
        raise TypeError(
            f"load= is called as load(state_dict, checkpoint_id=folder{more}), to fill the state "
            f"dict; {load!r} cannot be: {error}"
        ) from None


def check_filled(returned: object, state_dict: Mapping[str, Any]) -> None:
    """Raise TypeError if a loader returned a state, and the one it was given is blank still."""
    if not isinstance(returned, Mapping) or returned is state_dict:
        return
    if not any(differences(state_dict, blank(state_dict))):
        raise TypeError(
            f"load= returned a {type(returned).__name__} and did not fill the state dict that it "
            "was given, which is compared: state_dict.update(...) fills it"
        )


def is_own_mistake(error: BaseException) -> bool:
    """Whether a loader's exception points to a mistake in its code, not to the folder."""
    return isinstance(error, (*MISTAKES, LookupError)) and is_raised_by_user(error)


def is_refusal(error: BaseException, folder: str) -> bool:
    """Whether a loader's exception is about the folder, not about the loader."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        return not any(_is_mistake_of_user(*failure) for failure in error.failures.values())
    if isinstance(error, CheckpointError):
        return True
    if isinstance(error, OSError):
        return _may_be_in(folder, error.filename)
    if error.__cause__ is not None and is_refusal(error.__cause__, folder):
        return True
    match owner_of_innermost(error):
        case "library":
            return not isinstance(error, MISTAKES)
        case "user":
            return not is_raised_on_purpose(error) and _may_report_damage(error)
    return False


def _is_mistake_of_user(error: BaseException, stack: StackSummary) -> bool:
    """Whether an engine's step failed because of a mistake in user code that it called."""
    last = stack[-1].filename if stack else ""
    return isinstance(error, MISTAKES) and bool(last) and owner_of(last) == "user"


def _may_report_damage(error: BaseException) -> bool:
    """Whether a C function that the user called could have found its input to be damaged."""
    return isinstance(error, READ) or type(error).__module__ != "builtins"


def _may_be_in(folder: str, name: object) -> bool:
    """Whether the path in an OSError may be that of a file in the folder."""
    if not isinstance(name, str | bytes):
        return True
    inside, path = os.path.realpath(folder), os.path.realpath(os.fsdecode(name))
    return path == inside or path.startswith(inside + os.sep)


class Finished:
    """The folder as the recorded block left it, and the loaders that have loaded it."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._proven: list[Load] = []

    def prove(self, load: Load, likeness: Mapping[str, Any], keywords: Mapping[str, Any]) -> None:
        """Have a loader load the finished folder, once. Its exception is raised with a note.

        Does nothing if some rank's block did not end: the folder may hold no whole checkpoint.
        """
        ranks = {operation.rank for operation in self._trace.operations}
        if not ranks <= self._trace.returned_ns.keys() or any(load is one for one in self._proven):
            return
        machine = DiskModel.of(self._trace.base, Rules())
        in_order(machine, self._trace.operations, range(len(self._trace.operations)))
        with folder_trees.restore_tree(machine.visible_tree()) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                filled = blank(likeness)
                check_filled(load(filled, checkpoint_id=folder, **keywords), filled)
            except BaseException as error:
                add_note(
                    error,
                    "raised by load= in the folder as the finished save left it, so it says "
                    "nothing about crashes",
                )
                raise
        self._proven.append(load)

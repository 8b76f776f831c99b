"""A caller's `load=`: when its exception is a word on the folder, and when its own mistake.

A crash may leave a folder that cannot be loaded, so a loader may raise there. An exception counts
as a refusal of the folder only if the loader

- can be called as it will be: `load(state_dict, checkpoint_id=folder, **keywords)`;
- loads the folder as the recorded save left it when it ended;
- does not fail an assertion, or miss a name, in the caller's own code.

Anything else is raised as it is: it would make a wrong loader look like a checkpoint that is safe.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from pytest_dcp.faults import replay
from pytest_dcp.faults.holdings import blank
from pytest_dcp.faults.machine import Machine, Rules
from pytest_dcp.faults.states import in_order
from pytest_dcp.faults.trace import Trace
from pytest_dcp.tracebacks import is_raised_by_user

Load = Callable[..., Any]
"""`load(state_dict, checkpoint_id=folder, **keywords)`: fills the state dict from the folder."""
MISTAKES = (AssertionError, NameError, ImportError, NotImplementedError)
"""What code raises that is wrong, whatever the folder holds."""


def check_signature(load: Load, keywords: Mapping[str, Any]) -> None:
    """Raise TypeError unless a loader can be called as `dcp.load` is."""
    try:
        signature = inspect.signature(load)
    except ValueError:
        return  # of a built-in function: it cannot be asked
    try:
        signature.bind({}, checkpoint_id="folder", **keywords)
    except TypeError as error:
        more = "".join(f", {name}=..." for name in keywords)
        raise TypeError(
            f"load= is called as load(state_dict, checkpoint_id=folder{more}), to fill the state "
            f"dict; {load!r} cannot be: {error}"
        ) from None


def is_own_mistake(error: BaseException) -> bool:
    """Whether a loader's exception tells of the loader, not of the folder."""
    return isinstance(error, MISTAKES) and is_raised_by_user(error)


class Finished:
    """The folder as a recorded block left it when it ended, and the loaders that load it."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._proven: list[Load] = []

    def prove(self, load: Load, likeness: Mapping[str, Any], keywords: Mapping[str, Any]) -> None:
        """Have a loader load the finished folder, once. What it raises is raised, with a note.

        Nothing where some rank's block did not end: the folder may hold no whole checkpoint.
        """
        ranks = {operation.rank for operation in self._trace.operations}
        if not ranks <= self._trace.returned_ns.keys() or any(load is one for one in self._proven):
            return
        machine = Machine.of(self._trace.base, Rules())
        in_order(machine, self._trace.operations, range(len(self._trace.operations)))
        with replay.restored(machine.seen()) as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(blank(likeness), checkpoint_id=folder, **keywords)
            except BaseException as error:
                error.add_note(
                    "raised by load= in the folder as the finished save left it, so it tells "
                    "nothing of crashes"
                )
                raise
        self._proven.append(load)

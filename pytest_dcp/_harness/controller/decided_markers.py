"""Which markers ask for an item's world, and whether they came in time. No torch at import.

Enters: items, when collection has ended and again when the session starts to run them. Leaves: each
item's `decided` markers. A marker that is added later comes too late: `plugin` fails the test, in
the controller and in ranks, and does not run its body.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import pytest

from pytest_dcp.errors import LateMarkerError

DECIDED_KEY = pytest.StashKey[tuple[pytest.Mark, ...]]()
"""The markers that an item had when its world was decided; absent if it had none."""
REPORTED_KEY = pytest.StashKey[tuple[pytest.Mark, ...]]()
"""Late markers that an earlier phase of the running test has reported."""


def markers_of(item: pytest.Item, name: str) -> tuple[pytest.Mark, ...]:
    """The item's markers called `name`, the closest first; empty if `name` is.

    A marker of a module or class applies to its test functions. Other items, such as doctests, have
    only the markers of their own.
    """
    if not name:
        return ()
    if isinstance(item, pytest.Function):
        return tuple(item.iter_markers(name))
    return tuple(mark for mark in item.own_markers if mark.name == name)


def decide(items: Iterable[pytest.Item], name: str) -> None:
    """Note the markers that these items have now; later ones do not count."""
    for item in items:
        if marks := markers_of(item, name):
            item.stash[DECIDED_KEY] = marks


def late_markers(item: pytest.Item, name: str) -> tuple[pytest.Mark, ...]:
    """The item's markers that were added after its world was decided."""
    decided = item.stash.get(DECIDED_KEY, ())
    return tuple(mark for mark in markers_of(item, name) if mark not in decided)


def refuse_late_markers(item: pytest.Item, name: str) -> None:
    """Raise `LateMarkerError` if the item has a marker that was added too late."""
    if late := late_markers(item, name):
        raise LateMarkerError(_explain(late))


def fail_for_late_markers(
    item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport, name: str
) -> None:
    """Fail a phase's report, even with xfail, for a late marker that no earlier phase reported."""
    reported = () if call.when == "setup" else item.stash.get(REPORTED_KEY, ())
    late = late_markers(item, name)
    refused = call.excinfo is not None and isinstance(call.excinfo.value, LateMarkerError)
    if refused or any(mark not in reported for mark in late):
        item.stash[REPORTED_KEY] = late
        _fail(call, report, _explain(late) if late else "", refused=refused)


def _fail(
    call: pytest.CallInfo[None], report: pytest.TestReport, text: str, *, refused: bool
) -> None:
    """text: empty if a rank has refused the marker; the report then shows the rank's error."""
    if report.failed and not refused:
        report.sections.append(("late marker", text))
        return
    report.outcome = "failed"
    if text:
        report.longrepr = text
    if hasattr(report, "wasxfail"):
        del report.wasxfail
    if call.excinfo is None:  # a rank sends the failure's kind to the controller
        call.excinfo = pytest.ExceptionInfo.from_exc_info(_exc_info(LateMarkerError(text)))


def _exc_info(
    error: LateMarkerError,
) -> tuple[type[LateMarkerError], LateMarkerError, TracebackType]:
    """The triple of an exception raised here."""
    try:
        raise error
    except LateMarkerError as raised:
        traceback = raised.__traceback__
    if traceback is None:  # never, once it was raised
        raise error
    return type(error), error, traceback


def _explain(late: tuple[pytest.Mark, ...]) -> str:
    """For a report of the test, which names it."""
    marks = ", ".join(_show(mark) for mark in late)
    return (
        f"{marks} was added too late to give the test a world. Decorate the test, "
        "its class or its module, or add the marker in pytest_itemcollected or "
        "pytest_collection_modifyitems."
    )


def _show(mark: pytest.Mark) -> str:
    arguments = [repr(arg) for arg in mark.args]
    arguments += [f"{name}={value!r}" for name, value in mark.kwargs.items()]
    return f"@pytest.mark.{mark.name}({', '.join(arguments)})"

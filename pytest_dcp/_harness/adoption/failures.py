"""How processes of an adopted test failed -> the exception it sees, and pytest's report of it.

The exception is raised in the test's own process, where the test may catch it; if it reaches
pytest, the report shows all ranks, as that of a marked test does.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterator

import pytest

from pytest_dcp._harness.controller import headings, report
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.world.outcome import Outcome, peers

SKIPPED = "Skipped: "
"""How pytest begins the reason of a skip."""
PROCESSES = "processes of the test"


class Failures:
    """The failures of one item's processes."""

    def __init__(self, item: pytest.Item, harness: Harness) -> None:
        self._item = item
        self._harness = harness
        self._raised_outcomes: list[tuple[BaseException, Outcome]] = []
        self._beside: list[Outcome] = []

    def error_for(self, outcome: Outcome) -> BaseException:
        """The exception to raise in the test for an outcome that did not pass."""
        if outcome.kind == "skipped":
            error: BaseException = unittest.SkipTest(outcome.reason.removeprefix(SKIPPED))
        else:
            if outcome.kind == "failed" and outcome.session_end is not None:
                self._harness.end_after_item(outcome.session_end, self._item.nodeid)
            error = report.exception_for(outcome, self._item.nodeid)
        return self.remember(error, outcome)

    def remember(self, error: BaseException, outcome: Outcome) -> BaseException:
        """Show the outcome if this exception ends the test."""
        self._raised_outcomes.append((error, outcome))
        return error

    def show_beside(self, outcome: Outcome) -> None:
        """Show the outcome below another failure of the test."""
        self._beside.append(outcome)

    def amend_report(self, call: pytest.CallInfo[None], rep: pytest.TestReport) -> None:
        """Show the ranks' own failure instead of the exception that was raised for it."""
        outcome = self._outcome_of(call.excinfo.value) if call.excinfo is not None else None
        path, line, _ = self._item.reportinfo()
        location = (str(path), (line or 0) + 1)
        if outcome is not None and outcome.kind == "skipped" and rep.skipped:
            rep.longrepr = (*location, SKIPPED + outcome.reason.removeprefix(SKIPPED))
        elif outcome is not None and outcome.first is not None and rep.failed:
            # A report's attribute, since it goes along between xdist's processes.
            setattr(rep, report.HEADING, report.heading_marks(outcome))
            config = self._item.config
            rep.longrepr = report.longrepr_for(outcome, outcome.first, config, location, "")
            if not hasattr(config, "workerinput"):
                headings.colour_headings(rep)
        if rep.failed:
            others = [
                one for one in self._beside if outcome is None or one.reason != outcome.reason
            ]
            rep.sections += [(PROCESSES, _in_words(one)) for one in others]
            self._beside.clear()

    def _outcome_of(self, error: BaseException) -> Outcome | None:
        """The outcome behind an exception, or behind one that it was raised from."""
        for one in _chain(error):
            for raised, outcome in self._raised_outcomes:
                if raised is one:
                    return outcome
        return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _in_words(outcome: Outcome) -> str:
    lines = [outcome.reason, *(f"  {line}" for line in peers(outcome))]
    details = [group.failure.detail for group in outcome.groups if not group.echo]
    return "\n".join([*lines, *filter(None, details)])

"""Colours for the lines on top of a report: causes red, their consequences dim.

Enters: reports, where they are made, or where they arrive. A report travels between processes
(xdist) as pytest's own classes, which know no colours, and an attribute of it says which lines name
a cause.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pytest_dcp._harness.controller.report import HEADING
from pytest_dcp._pytest_internals import ExceptionChainRepr, ReprEntryNative, TerminalWriter


class HeadingEntry(ReprEntryNative):
    """The lines on top, of which some name a cause."""

    def __init__(self, lines: Sequence[str], marks: Sequence[bool]) -> None:
        super().__init__(lines)
        self.marks = marks

    def toterminal(self, tw: TerminalWriter) -> None:
        """Write each line in its colour, if the terminal has colours."""
        for number, (line, is_cause) in enumerate(zip(self.lines, self.marks, strict=True)):
            tw.line(line.rstrip("\n"), red=is_cause, bold=number == 0, light=not is_cause)


def colour_headings(report: pytest.TestReport) -> None:
    """Let the heading of a world's failure write itself in colours."""
    marks = getattr(report, HEADING, None)
    if marks is None or not isinstance(report.longrepr, ExceptionChainRepr):
        return
    traceback = report.longrepr.chain[-1][0]
    entries = traceback.reprentries
    if entries and type(entries[0]) is ReprEntryNative and len(entries[0].lines) == len(marks):
        traceback.reprentries = [HeadingEntry(entries[0].lines, marks), *entries[1:]]


# Writers of reports name entries by their class, and know pytest's own.
HeadingEntry.__name__ = ReprEntryNative.__name__

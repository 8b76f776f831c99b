"""How a phase of an item ended in this rank: pytest's report of it -> a `Done`.

Enters: an item before a phase (`begin_phase`), and the phase's call. Leaves: the answer for the
controller, with the output, logs and properties that the phase added.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest

from pytest_dcp._harness.protocol.group_use import PlainGroups, to_plain
from pytest_dcp._harness.protocol.messages import Done, Phase, RankOutcome
from pytest_dcp._harness.rank import coverage, log_capture
from pytest_dcp._harness.rank.captured_output import clip
from pytest_dcp._harness.rank.debugger import RankDebugger
from pytest_dcp._harness.rank.exception_facts import is_echo, lines_of, outcome_of
from pytest_dcp._harness.rank.group_counter import Totals
from pytest_dcp._harness.rank.this_rank import Rank
from pytest_dcp._pytest_internals import evaluate_xfail_marks, report_sections


@dataclass(frozen=True, slots=True)
class _Seen:
    """How much of an item's collected output was sent before a phase."""

    sections: int
    properties: int
    xfail_marks: int

    @classmethod
    def of(cls, item: pytest.Item) -> _Seen:
        marks = len(list(item.iter_markers("xfail")))
        return cls(len(report_sections(item)), len(item.user_properties), marks)


class PhaseVerdicts:
    """Judges the phases of one rank's items, one after another."""

    rank: Rank
    _seen: _Seen
    _groups: Totals
    """The counts before the item."""

    def __init__(self, config: pytest.Config, debugger: RankDebugger) -> None:
        self.config = config
        self._debugger = debugger
        log_capture.leave_out_call_events(config)
        self._xfail_off = bool(getattr(config.option, "runxfail", False))

    def join(self, rank: Rank) -> None:
        """This process is that rank from here on."""
        self.rank = rank

    def begin_item(self) -> None:
        """Count the uses of process groups from here."""
        counter = self.rank.counter
        self._groups = counter.mark() if counter is not None else {}

    def begin_phase(self, item: pytest.Item) -> None:
        """Everything that the item has collected by now was sent before."""
        self._seen = _Seen.of(item)

    def judge(self, item: pytest.Item, phase: Phase, call: pytest.CallInfo[None]) -> Done:
        """A phase's outcome, with pytest's own report of it."""
        end_s, seen = time.monotonic(), self._seen
        self._announce_error(call, end_s)
        report, outcome, text = self._report(item, call)
        self._debugger.give_back()
        debug_records, log_without_debug = log_capture.log_without_debug(self.config)
        if phase == "teardown":  # the last message that a rank receives when its peers are lost
            coverage.save()
        error = _error_of(call)
        return Done(
            phase,
            outcome,
            end_s,
            call.duration,
            is_echo=is_echo(error),
            exception=(type(error).__module__, type(error).__qualname__) if error else None,
            text=text,
            report=None if outcome == "passed" else self._serialise(report),
            xpassed=outcome == "passed" and hasattr(report, "wasxfail"),
            returncode=getattr(error, "returncode", None) if outcome == "exit" else None,
            sections=tuple(
                (when, name, clip(content))
                for when, name, content in report_sections(item)[seen.sections :]
            ),
            debug_records=debug_records,
            log_without_debug=clip(log_without_debug),
            properties=tuple(item.user_properties[seen.properties :]),
            groups=self._group_uses() if phase in ("call", "teardown") else None,
        )

    def _report(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> tuple[pytest.TestReport, RankOutcome, str]:
        """pytest's report of a phase, its outcome and one line; after the debugger had its turn."""
        # A marker that the test added itself is known only here, so it is judged here.
        added = len(list(item.iter_markers("xfail"))) > self._seen.xfail_marks
        self.config.option.runxfail = self._xfail_off or not added
        report = item.ihook.pytest_runtest_makereport(item=item, call=call)
        outcome, text = _judge_report(call, report)
        is_given_up = self.rank.channel.has_order
        if (
            outcome in ("failed", "interrupt")
            and not is_given_up
            and not self._is_expected(item, _error_of(call))
        ):
            outcome, text = self._interact(item, call, report) or (outcome, text)
        return report, outcome, text

    def _interact(
        self, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport
    ) -> tuple[RankOutcome, str] | None:
        """Let the debugger have a failure; an outcome where that ends the session."""
        try:
            item.ihook.pytest_exception_interact(node=item, call=call, report=report)
        except pytest.exit.Exception as exit_:  # `quit` in the debugger
            return "exit", str(exit_.msg)
        return None

    def _group_uses(self) -> PlainGroups | None:
        """The item's use of process groups so far, if the next one will use them."""
        counter = self.rank.counter
        if counter is None or self.rank.order.isolation != "module":
            return None
        return to_plain(counter.since(self._groups))

    def _announce_error(self, call: pytest.CallInfo[None], end_s: float) -> None:
        """A failure's report may take long to write: until then its text is known."""
        error = _error_of(call)
        if error is not None and outcome_of(error) == "failed" and not self.rank.channel.has_order:
            self.rank.say_raised(error, end_s)

    def _is_expected(self, item: pytest.Item, error: BaseException | None) -> bool:
        """Whether an xfail mark expects it: the controller judges that, but after the debugger."""
        xfailed = None if self._xfail_off else evaluate_xfail_marks(item)
        raises = xfailed.raises if xfailed is not None else ()
        return raises is None or (isinstance(raises, type | tuple) and isinstance(error, raises))

    def _serialise(self, report: pytest.TestReport) -> dict[str, Any]:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        data["sections"], data["user_properties"], data["keywords"] = [], [], {}
        serialised: dict[str, Any] = data
        return serialised


def _error_of(call: pytest.CallInfo[None]) -> BaseException | None:
    return call.excinfo.value if call.excinfo is not None else None


def _judge_report(
    call: pytest.CallInfo[None], report: pytest.TestReport
) -> tuple[RankOutcome, str]:
    """The rank's outcome of a phase, and its one line of text."""
    error = _error_of(call)
    if isinstance(error, pytest.exit.Exception):
        return "exit", str(error.msg)
    if isinstance(error, KeyboardInterrupt):
        return "interrupt", "KeyboardInterrupt"
    if isinstance(error, pytest.xfail.Exception):
        return "xfailed", str(error.msg)
    if report.skipped:
        if hasattr(report, "wasxfail"):
            return "xfailed", str(report.wasxfail)
        longrepr = report.longrepr
        return "skipped", str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
    if report.passed:
        return "passed", str(getattr(report, "wasxfail", ""))
    if isinstance(error, pytest.FixtureLookupError):
        # Its own text is the request's; pytest shows this in its place.
        return "failed", error.formatrepr().errorstring.partition("\n")[0]
    return "failed", lines_of(error) if error is not None else str(report.longrepr)

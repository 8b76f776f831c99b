"""A world's outcome -> pytest's report: one report, the first cause on top.

Enters: an `Outcome`. Leaves: an exception to raise in the controller, of the rank's own type
where that is known here, and the `longrepr` and the sections of its report. Only pytest's own
serialisable classes are used, so that reports survive xdist.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from pytest_dcp._harness.controller.options import ReportRanks
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.world.outcome import Group, Outcome, SessionEnd, lead_with, peers
from pytest_dcp._harness.world.stacks import describe_activity, from_root
from pytest_dcp._pytest_internals import (
    ExceptionChainRepr,
    ExceptionRepr,
    ReprEntryNative,
    ReprFileLocation,
    ReprTraceback,
)
from pytest_dcp.errors import WorldError
from pytest_dcp.rank_names import ranks_text

RERUN = "to rerun just this"
HEADING = "dcp_heading"
"""A report's attribute: `heading_marks` of what it shows."""
TRACE_CHARS = 20_000
"""Of one rank's stacks in a report."""


def lead_with_unexpected(outcome: Outcome, expected: Callable[[BaseException], bool]) -> Outcome:
    """The outcome with the first failure on top that is not `expected` (by an xfail marker).

    An expected failure of one rank must not hide another's. A peer that hung or died counts as
    unexpected, though it may only have waited: the expected failure did not happen there.
    """
    if outcome.first is None or not expected(_error_of(outcome.first, outcome)):
        return outcome
    for group in outcome.groups[1:]:
        follows = group.echo and group.failure.kind == "failed"
        if not follows and not expected(_error_of(group, outcome)):
            return lead_with(outcome, group)
    return outcome


def exception_for(outcome: Outcome, where: str) -> BaseException:
    """The exception that the controller raises for an outcome that did not pass, instead of the
    test's.
    """
    if outcome.kind == "skipped":
        return pytest.skip.Exception(outcome.reason)
    if outcome.kind == "xfailed":
        return pytest.xfail.Exception(outcome.reason)
    if outcome.kind in ("exit", "interrupt") and outcome.session_end is not None:
        return exception_of_end(outcome.session_end, where)
    if outcome.first is None:
        return WorldError(outcome.reason, outcome.failures)
    return _error_of(outcome.first, outcome)


def exception_of_end(end: SessionEnd, where: str, *, failed: bool = False) -> BaseException:
    """The exception that ends the session as the rank asked; not with 0 if its test has
    `failed`.
    """
    text = f"{where}: rank {end.rank}: {end.text}"
    if end.kind == "interrupt":
        return KeyboardInterrupt(text)
    code = end.returncode
    return pytest.exit.Exception(
        text, pytest.ExitCode.TESTS_FAILED if failed and code == 0 else code
    )


def _error_of(group: Group, outcome: Outcome) -> BaseException:
    result = outcome.results.get(group.failure.rank)
    if group.failure.kind == "failed" and result is not None and result.exception is not None:
        error = _rebuild_error(result.exception, result.text.partition(": ")[2])
        if error is not None:
            return error
    return WorldError(outcome.reason, outcome.failures)


def _rebuild_error(class_name: tuple[str, str], text: str) -> BaseException | None:
    """An exception of the named class, so that `xfail(raises=...)` sees the rank's own type.

    It is made without its `__init__`, whose arguments are unknown here; None when the class is not
    to be found in this process, is no ordinary exception, or is one of pytest's own, whose display
    needs attributes set by `__init__`.
    """
    if class_name[1] == pytest.fail.Exception.__qualname__:
        return pytest.fail.Exception(text, pytrace=False)
    found: Any = sys.modules.get(class_name[0])
    for part in class_name[1].split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return None
    if found.__module__.partition(".")[0] == "_pytest":
        return None
    try:
        error: Exception = found.__new__(found)
        error.args = (text,)
        str(error)
    except Exception:  # noqa: BLE001 - a class of the user's: any refusal means plain WorldError
        return None
    return error


def longrepr_for(
    outcome: Outcome, first: Group, config: pytest.Config, location: tuple[str, int], rerun: str
) -> ExceptionRepr:
    """The failure representation: headline, the traceback of the `first` cause, then its peers."""
    repr_ = _own_repr(first, outcome.results.get(first.failure.rank), config)
    lines = [outcome.reason, *(f"  {line}" for line in peers(outcome))]
    if repr_ is None:
        limited = first.failure.kind in ("blocked", "timeout")
        detail = "" if limited else _clip(first.failure.detail).rstrip("\n")
        detail = from_root(detail, str(config.rootpath))
        crash = ReprFileLocation(*location, outcome.reason)
        entries = ReprTraceback(
            [ReprEntryNative([f"{detail}\n"])] if detail else [], None, "native"
        )
        repr_ = ExceptionChainRepr([(entries, crash, None)])
    head = ReprEntryNative([f"{line}\n" for line in lines])
    for traceback, crash_, _ in repr_.chain[-1:]:
        traceback.reprentries = [head, *traceback.reprentries]
        if crash_ is not None:
            crash_.message = outcome.reason
    if repr_.reprcrash is not None:
        repr_.reprcrash.message = outcome.reason
    for group in outcome.groups[1:]:
        if not group.echo and group.failure.kind not in ("blocked", "timeout"):
            text = _text_of(group, outcome.results.get(group.failure.rank), config)
            repr_.addsection(f"{ranks_text(group.ranks)} also failed", text)
    table = _table(outcome, str(config.rootpath))
    if table:
        repr_.addsection("stacks of the ranks that did not end", table)
    if rerun:
        repr_.addsection(RERUN, rerun, "-")
    return repr_


def heading_marks(outcome: Outcome) -> list[bool]:
    """For each line that `longrepr_for` puts on top, whether it names a cause.

    The others name consequences. A list, so that it can be sent with a report.
    """
    groups = [not group.echo for group in outcome.groups[1:]]
    return [True, *groups, *[False] * (len(peers(outcome)) - len(groups))]


def own_longrepr(outcome: Outcome, config: pytest.Config) -> Any:
    """The representation that the first rank with one made itself; None when there is none."""
    for result in outcome.results.values():
        if (
            result.outcome == outcome.kind
            and result.report is not None
            and "longrepr" in result.report
        ):
            data = dict(result.report)
            return config.hook.pytest_report_from_serializable(config=config, data=data).longrepr
    return None


def _own_repr(
    group: Group, result: Done | None, config: pytest.Config
) -> ExceptionChainRepr | None:
    """The traceback that the rank itself made, with its assertion introspection."""
    if result is None or result.report is None or "longrepr" not in result.report:
        return None
    if group.failure.kind != "failed":
        return None
    report = config.hook.pytest_report_from_serializable(config=config, data=dict(result.report))
    longrepr = report.longrepr
    if isinstance(longrepr, ExceptionChainRepr):
        return longrepr
    text = str(longrepr).rstrip("\n")
    crash = ReprFileLocation("", 0, text.partition("\n")[0])
    entries = ReprTraceback([ReprEntryNative([f"{text}\n"])], None, "native")
    return ExceptionChainRepr([(entries, crash, None)])


def _text_of(group: Group, result: Done | None, config: pytest.Config) -> str:
    repr_ = _own_repr(group, result, config)
    if repr_ is not None:
        return str(repr_)
    return from_root(group.failure.detail, str(config.rootpath)) or group.failure.summary


def _table(outcome: Outcome, root: str) -> str:
    """Rank by rank, the stacks of ranks killed at a limit, equal ones once."""
    rows: dict[str, list[int]] = {}
    for group in outcome.groups:
        if group.failure.kind in ("blocked", "timeout"):
            for rank in group.ranks:
                rows.setdefault(_clip(group.failure.detail), []).append(rank)
    parts = []
    for trace, ranks in rows.items():
        what = describe_activity(trace, root) if trace else "no stack: stopped, or deep in C code"
        parts.append(f"{ranks_text(ranks)}: {what}\n{from_root(trace, root)}".rstrip())
    return "\n".join(parts)


def _clip(text: str) -> str:
    return text if len(text) <= TRACE_CHARS else text[:TRACE_CHARS] + "\n[... left out ...]"


def rerun_line(nodeid: str, seed: int, size: int, override: bool) -> str:
    """The command that runs just this world again. Pure (no I/O)."""
    line = f"pytest {shlex.quote(nodeid)} --dcp-seed={seed}"
    return f"{line} --dcp-world-size={size}" if override else line


def shown_ranks(outcome: Outcome, size: int, which: ReportRanks) -> set[int]:
    """The ranks whose output a report shows; `first` is one rank, whose failure is on top."""
    if which == "all" or not outcome.groups:
        return set(range(size))
    if which == "first":
        return {outcome.groups[0].failure.rank}
    return {rank for group in outcome.groups if not group.echo for rank in group.ranks}


def merged_sections(
    sections: Iterable[tuple[int, str, str, str]],
) -> list[tuple[str, str, str]]:
    """(rank, when, name, text) -> (when, `name [ranks ...]`, text), equal texts once."""
    merged: dict[tuple[str, str, str], list[int]] = {}
    for rank, when, name, text in sections:
        if text:
            merged.setdefault((when, name, text), []).append(rank)
    return [
        (when, f"{name} [{ranks_text(sorted(set(ranks)))}]", text)
        for (when, name, text), ranks in merged.items()
    ]

"""The ranks' verdicts -> one outcome. Pure (no I/O).

Precedence: fail > crash > timeout > exit > skip > xfail > pass. A test is skipped only when every
rank skips, and xfailed by `pytest.xfail()` only when every rank calls it. A rank that ends the
session does so even if another failed; the failure is then reported first. A rank that the test
itself killed does not count: the others decide, and if none is left the test has failed. The first
cause is told apart from its echoes: peers that lost their connection because the rank ended, or
that were still waiting for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from pytest_dcp._harness.protocol import group_use
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp.errors import LostRank, RankFailure
from pytest_dcp.rank_names import ranks_text

OutcomeKind = Literal["passed", "failed", "skipped", "xfailed", "exit", "interrupt"]

ECHO = re.compile(
    r"^(RuntimeError|ConnectionError|ConnectionResetError|BrokenPipeError"
    r"|Dist(Backend|Network|Store)?Error).*?"
    r"(?P<cause>(connection )?closed by peer|(connection )?reset by peer|broken pipe"
    r"|connection refused|connection was likely closed|socket closed"
    r"|remote process exited|connection closed by remote"
    r"|application timeout caused pair closure)",
    re.DOTALL | re.IGNORECASE,
)
"""Messages of gloo, NCCL and c10d stores after a peer has ended: the errors' only sign of it."""

WAITING = re.compile(r", in (the world's exchange|\w+), at ")
"""How `stacks.doing` names a rank that was in a collective."""


OUT_OF_STEP = (
    "operations that only some ranks started would be taken up by the next test in this world"
)


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that failed in the same way."""

    ranks: tuple[int, ...]
    """Ascending."""
    failure: RankFailure
    """The earliest one."""
    echo: bool
    """Whether the first cause caused it."""
    members: tuple[RankFailure, ...]
    """Every rank's own failure, by time."""


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """A rank ended the session, by `pytest.exit()` or KeyboardInterrupt."""

    kind: Literal["exit", "interrupt"]
    rank: int
    text: str
    returncode: int | None
    """The exit code passed to `pytest.exit`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One phase of one world, as one result."""

    kind: OutcomeKind
    reason: str
    """Of a skip, an xfail, an exit; the headline of a failure."""
    groups: tuple[Group, ...]
    """Failures, the first cause first, echoes last."""
    results: Mapping[int, Done]
    """Each rank's verdict, if it sent one."""
    lost: Mapping[int, LostRank] = field(default_factory=dict)
    """Ranks that the test itself ended, in this phase or before."""
    session_end: SessionEnd | None = None
    """Set for an exit or interrupt, and for a failure that occurred together with one."""

    @property
    def failures(self) -> tuple[RankFailure, ...]:
        """Every rank's failure, the first cause first, echoes last."""
        return tuple(failure for group in self.groups for failure in group.members)

    @property
    def first(self) -> Group | None:
        """The first cause."""
        return self.groups[0] if self.groups else None


def combine(
    size: int,
    results: Mapping[int, Done],
    failures: Sequence[RankFailure],
    lost: Mapping[int, LostRank] = MappingProxyType({}),
) -> Outcome:
    """The outcome of a phase, from the ranks' verdicts and the failures noted by the supervisor.

    `lost` ranks need not send a verdict. With a `size` of 0 no rank must: only failures count.
    """
    owing = [rank for rank in range(size) if rank not in lost]
    return replace(_combine(size, owing, results, failures), lost=dict(lost))


def _combine(
    size: int, owing: Sequence[int], results: Mapping[int, Done], failures: Sequence[RankFailure]
) -> Outcome:
    end = _session_end(results)
    failed_ranks = {failure.rank for failure in failures}
    failures = [
        *failures,
        *(
            RankFailure(
                rank, "failed", result.phase, result.at_s, result.text, is_echo=result.is_echo
            )
            for rank, result in results.items()
            if result.outcome == "failed" and rank not in failed_ranks
        ),
    ]
    if end is not None and all(is_echo(failure) for failure in failures):
        return Outcome(end.kind, f"rank {end.rank}: {end.text}", (), results, session_end=end)
    failures = failures or [*_divergence(size, owing, results)]
    if failures:
        groups = _group(failures)
        reason = _mismatch(groups) + headline(groups[0])
        return Outcome("failed", reason, groups, results, session_end=end)
    expected: tuple[OutcomeKind, ...] = ("skipped", "xfailed")
    for kind in expected:
        for _rank, result in sorted(results.items()):
            if result.outcome == kind:
                return Outcome(kind, result.text, (), results)
    unknown = [rank for rank, result in results.items() if result.outcome != "passed"]
    if unknown:  # no word of ours: never a pass
        text = f"said {results[unknown[0]].outcome!r}"
        failure = RankFailure(unknown[0], "closed", results[unknown[0]].phase, 0.0, text)
        groups = _group([failure])
        return Outcome("failed", headline(groups[0]), groups, results)
    return Outcome("passed", "", (), results)


def _session_end(results: Mapping[int, Done]) -> SessionEnd | None:
    """The lowest rank that interrupts the session, else the lowest that exits."""
    kinds: tuple[Literal["interrupt", "exit"], ...] = ("interrupt", "exit")
    for kind in kinds:
        for rank, result in sorted(results.items()):
            if result.outcome == kind:
                return SessionEnd(kind, rank, result.text, result.returncode)
    return None


def in_step(outcome: Outcome) -> Outcome:
    """The outcome; a failure if the ranks' process groups are out of step.

    Only ranks that report their groups count. Outcomes that failed, lost a rank or ended the
    session are not checked: those worlds are not used again.
    """
    groups = {
        rank: result.groups for rank, result in outcome.results.items() if result.groups is not None
    }
    if outcome.failures or outcome.lost or outcome.session_end is not None:
        return outcome
    if not groups or group_use.are_equal([*groups.values()]):
        return outcome
    text = group_use.out_of_step(
        {rank: group_use.from_plain(used) for rank, used in groups.items()}
    )
    if not text:
        return outcome
    phase = next(iter(outcome.results.values())).phase
    failure = RankFailure(0, "diverged", phase, 0.0, f"{text}: {OUT_OF_STEP}")
    return combine(0, outcome.results, [failure])


def _divergence(
    size: int, owing: Sequence[int], results: Mapping[int, Done]
) -> Iterable[RankFailure]:
    """A failure when some ranks skipped and others did not, or when a verdict is missing."""
    if size and not results and not owing:
        yield RankFailure(0, "diverged", "", 0.0, "no rank is left to give a verdict")
        return
    missing = [rank for rank in owing if rank not in results]
    if missing:
        text = f"no verdict came from {ranks_text(missing)}"
        yield RankFailure(missing[0], "diverged", "", 0.0, text)
        return
    skipped = [rank for rank in sorted(results) if results[rank].outcome == "skipped"]
    rule = "a test is skipped only when every rank skips"
    yield from _one_sided(skipped, set(skipped), results, rule)
    xfailed = [rank for rank in sorted(results) if results[rank].outcome == "xfailed"]
    agreeing = {*xfailed, *(rank for rank in results if results[rank].xpassed)}
    rule = "a test is xfailed only when every rank expects the failure"
    if not skipped:
        yield from _one_sided(xfailed, agreeing, results, rule)


def _one_sided(
    ranks: Sequence[int], agreeing: Collection[int], results: Mapping[int, Done], rule: str
) -> Iterable[RankFailure]:
    """A failure if some ranks ended in this way and others in another."""
    rest = [rank for rank in sorted(results) if rank not in agreeing]
    if not ranks or not rest:
        return
    first = results[ranks[0]]
    how = sorted({results[rank].outcome for rank in rest})
    text = (
        f"{ranks_text(ranks)} {first.outcome} ({first.text}), but {ranks_text(rest)} "
        f"{' or '.join(how)}: {rule}"
    )
    yield RankFailure(ranks[0], "diverged", first.phase, first.at_s, text)


def is_echo(failure: RankFailure) -> bool:
    """Whether another rank's failure caused this one: its exception or torch's text says so."""
    if failure.kind in ("blocked", "lost"):
        return True
    is_peer_error = failure.is_echo or ECHO.search(failure.summary) is not None
    return failure.kind == "failed" and is_peer_error


def _group(failures: Sequence[RankFailure]) -> tuple[Group, ...]:
    """Failures with equal texts merged; the first cause first, then by time, echoes last."""
    causes = [f for f in failures if not is_echo(f)] or [min(failures, key=_first_cause_first)]
    causes_said = {(cause.kind, cause.summary) for cause in causes}
    merged: dict[tuple[bool, str, str], list[RankFailure]] = {}
    for failure in sorted(failures, key=_first_cause_first):
        echo = failure not in causes and (failure.kind, failure.summary) not in causes_said
        summary = _consequence(failure) if echo and failure.kind == "failed" else failure.summary
        merged.setdefault((echo, failure.kind, summary), []).append(failure)
    groups = [
        Group(tuple(sorted({f.rank for f in alike})), alike[0], echo, tuple(alike))
        for (echo, _, _), alike in merged.items()
    ]
    return tuple(sorted(groups, key=lambda g: g.echo))


def _consequence(failure: RankFailure) -> str:
    """The common text of echoes that differ in their details."""
    match = None if failure.is_echo else ECHO.search(failure.summary)
    return match["cause"] if match is not None else "of the exchange"


def _first_cause_first(failure: RankFailure) -> tuple[bool, bool, float]:
    """By time; ranks that timed out come after the others, and the ones awaiting a peer last."""
    late = failure.kind in ("timeout", "lost", "blocked")
    return late, late and WAITING.search(failure.summary) is not None, failure.at_s


def lead_with(outcome: Outcome, group: Group) -> Outcome:
    """The outcome with another of its groups as the first cause."""
    first = replace(group, echo=False)
    groups = (
        first,
        *(other for other in outcome.groups if other is not group),
    )
    return replace(outcome, reason=headline(first), groups=groups)


def headline(group: Group) -> str:
    """One line that names the ranks of the first cause and how they failed."""
    text = first_line(group.failure.summary)
    return text if group.failure.kind == "diverged" else f"{ranks_text(group.ranks)}: {text}"


def first_line(text: str) -> str:
    """The first line of a text, for a heading, and the next one if the first only introduces it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heading = lines[:1]
    for line in lines[1:]:
        if not heading[-1].endswith(":"):
            break
        heading.append(line)
    return " ".join(heading)


def _mismatch(groups: Sequence[Group]) -> str:
    """A remark for the case that every hanging rank waits in a collective, not all in the same."""
    waiting: dict[str, list[int]] = {}
    for group in groups:
        match = WAITING.search(group.failure.summary)
        if group.failure.kind != "timeout" or match is None:
            return ""
        waiting.setdefault(match[1], []).extend(group.ranks)
    if len(waiting) < 2:
        return ""
    which = ", ".join(f"{ranks_text(ranks)}: {name}" for name, ranks in waiting.items())
    return f"ranks wait in different collectives ({which}); "


def peers(outcome: Outcome) -> list[str]:
    """A line for each other group of ranks: its failure, and how much later it came."""
    first = outcome.first
    if first is None:
        return []
    lines = []
    for group in outcome.groups[1:]:
        # A death is noticed after the peers' errors that it caused: never "earlier".
        later_s = max(0.0, group.failure.at_s - first.failure.at_s)
        killed = "; killed" if group.failure.kind == "blocked" else ""
        when = f", {later_s:.2f} s later" if group.failure.kind != "timeout" else ""
        lines.append(f"{ranks_text(group.ranks)}: {_short(group)}{when}{killed}")
    if first.failure.kind == "timeout":
        lines += _ended_lines(outcome, first.failure.phase)
    if (end := outcome.session_end) is not None:
        lines.append(f"rank {end.rank}: ended the session: {end.text}")
    return [*lines, *lost_lines(outcome.lost.values())]


def lost_lines(lost: Iterable[LostRank]) -> list[str]:
    """A line for each rank that the test itself ended."""
    return [
        f"rank {lost_rank.rank}: {lost_rank.reason}"
        for lost_rank in sorted(lost, key=lambda lost_rank: lost_rank.rank)
    ]


def _ended_lines(outcome: Outcome, phase: str) -> Iterable[str]:
    """Lines for the ranks that ended the phase in which others hang, grouped by their verdict."""
    ranks_by_end: dict[str, list[int]] = {}
    for rank, result in sorted(outcome.results.items()):
        if result.phase == phase:
            line = first_line(result.text)
            how = result.outcome if result.outcome == "passed" else f"{result.outcome}: {line}"
            ranks_by_end.setdefault(how, []).append(rank)
    return [
        f"{ranks_text(ranks)}: had ended {phase} ({how})" for how, ranks in ranks_by_end.items()
    ]


def _short(group: Group) -> str:
    """A group's failure, without the peers' addresses that gloo adds to an echo."""
    summary = group.failure.summary
    match = ECHO.search(summary) if group.echo and group.failure.kind == "failed" else None
    if match is None or group.failure.is_echo:
        return first_line(summary)[:300]
    return f"{match[1]}: {match['cause']}"

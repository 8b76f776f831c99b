"""What the ranks said -> one outcome. Pure (no I/O).

Precedence: fail > crash > timeout > skip > xfail > pass. A test is skipped only when every rank
skips. The first cause is told from its echoes: a peer that lost its connection because another
rank went away, or that was still waiting for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_dcp.errors import RankFailure
from pytest_dcp.harness.events import Done

OutcomeKind = Literal["passed", "failed", "skipped", "xfailed", "exit", "interrupt"]

ECHO = re.compile(
    r"^(RuntimeError|ConnectionError|ConnectionResetError|BrokenPipeError|DivergedError"
    r"|Dist(Backend|Network|Store)?Error).*"
    r"(closed by peer|reset by peer|Broken pipe|Connection refused|Connection was likely closed"
    r"|Socket closed|waited in vain|different things|Application timeout caused pair closure)",
    re.DOTALL,
)
"""What gloo, NCCL, c10d stores and our exchange say when a peer went away."""

KIND_ORDER = ("failed", "crashed", "closed", "flooded", "diverged", "timeout", "lost", "blocked")


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that ended alike."""

    ranks: tuple[int, ...]
    """Ascending."""
    failure: RankFailure
    """Of the first of them in time."""
    echo: bool
    """Whether it only follows from the first cause."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One phase of one world, as one result."""

    kind: OutcomeKind
    reason: str
    """Of a skip, an xfail, an exit; the headline of a failure."""
    groups: tuple[Group, ...]
    """Failures, the first cause first, echoes last."""
    done: Mapping[int, Done]
    """What each rank said of itself, of those that did."""

    @property
    def first(self) -> Group | None:
        """The first cause."""
        return self.groups[0] if self.groups else None


def combine(size: int, done: Mapping[int, Done], failures: Sequence[RankFailure]) -> Outcome:
    """The outcome of a phase from the ranks' own words and from what became of them."""
    for kind in ("interrupt", "exit"):
        for rank, one in sorted(done.items()):
            if one.outcome == kind:
                return Outcome(kind, f"rank {rank}: {one.text}", (), done)  # type: ignore[arg-type]  # kind is one of the two literals
    if not failures:
        failures = [*_divergence(size, done)]
    if failures:
        groups = _group(failures)
        return Outcome("failed", headline(groups[0], size), groups, done)
    for kind in ("skipped", "xfailed"):
        for _rank, one in sorted(done.items()):
            if one.outcome == kind:
                return Outcome(kind, one.text, (), done)  # type: ignore[arg-type]  # kind is one of the two literals
    return Outcome("passed", "", (), done)


def _divergence(size: int, done: Mapping[int, Done]) -> Iterable[RankFailure]:
    """A failure when some ranks skipped and others did not, or when a verdict is missing."""
    missing = [rank for rank in range(size) if rank not in done]
    if missing:
        text = f"no verdict came from {ranks_text(missing)}"
        yield RankFailure(missing[0], "diverged", "", 0.0, text)
        return
    skipped = [rank for rank in range(size) if done[rank].outcome == "skipped"]
    if skipped and len(skipped) < size:
        rest = [rank for rank in range(size) if rank not in skipped]
        how = sorted({done[rank].outcome for rank in rest})
        first = done[skipped[0]]
        yield RankFailure(
            skipped[0],
            "diverged",
            first.phase,
            first.at_s,
            f"{ranks_text(skipped)} skipped ({first.text}), but {ranks_text(rest)} "
            f"{' or '.join(how)}: a test is skipped only when every rank skips",
        )


def is_echo(failure: RankFailure) -> bool:
    """Whether a failure reads like the consequence of another rank's."""
    if failure.kind in ("blocked", "lost"):
        return True
    return failure.kind == "failed" and ECHO.search(failure.summary) is not None


def _group(failures: Sequence[RankFailure]) -> tuple[Group, ...]:
    """Failures merged by what they say, the first cause first, then by time, echoes last."""
    causes = [f for f in failures if not is_echo(f)] or [_earliest(failures)]
    merged: dict[tuple[bool, str, str], list[RankFailure]] = {}
    for failure in sorted(failures, key=lambda f: (KIND_ORDER.index(f.kind) > 4, f.at_s)):
        echo = failure not in causes
        merged.setdefault((echo, failure.kind, failure.summary), []).append(failure)
    groups = [
        Group(tuple(sorted(f.rank for f in alike)), min(alike, key=lambda f: f.at_s), echo)
        for (echo, _, _), alike in merged.items()
    ]
    return tuple(sorted(groups, key=lambda g: g.echo))


def _earliest(failures: Sequence[RankFailure]) -> RankFailure:
    return min(failures, key=lambda f: (KIND_ORDER.index(f.kind) > 4, f.at_s))


def headline(group: Group, size: int) -> str:
    """One line that names the ranks of the first cause and what became of them."""
    who = ranks_text(group.ranks)
    failure = group.failure
    text = failure.summary
    if failure.kind == "timeout":
        every = len(group.ranks) == size
        text = f"{text} at the time limit" + ("" if every else "; the others had ended")
    return text if failure.kind == "diverged" else f"{who}: {text}"


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks for people: `rank 3`, `ranks 0-2,5`."""
    ordered = sorted(ranks)
    parts: list[str] = []
    start = 0
    for i, rank in enumerate(ordered):
        if i + 1 < len(ordered) and ordered[i + 1] == rank + 1:
            continue
        low = ordered[start]
        parts.append(str(low) if low == rank else f"{low}-{rank}")
        start = i + 1
    return f"rank{'s' * (len(ordered) != 1)} {','.join(parts)}"

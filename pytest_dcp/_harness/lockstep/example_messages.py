"""Messages between the controller and the ranks about a property's examples. Pure (no I/O).

One Hypothesis engine, in the controller, decides which example comes next; every rank draws it
independently and runs it. Enters: the engine's description of an example before the run (an
`Attempt`), and a rank's description of the result (a `Reply`). Leaves: both as bytes, and a rank's
record of its draws, which the engine accepts as if they were its own.

Rules that hold inside:

- The same attempt makes every rank draw the same: first the attempt's choices are replayed, then
  all draw from one seed. Ranks whose strategies ask for different choices have diverged.
- A record is written while the rank draws, outside the rank's memory, so that it is complete up to
  the moment at which the rank is killed.
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from pytest_dcp._harness.protocol.group_use import GroupUse

CASES = ("Failing test case:", "Falsifying example:")
"""How Hypothesis begins the line that has the example as code; the second before 6.160."""
Status = Literal["valid", "invalid", "overrun", "interesting"]
"""Hypothesis' own words: passed, rejected (by assume or a filter), too long, failed."""


@dataclass(frozen=True, slots=True)
class Property:
    """Rank -> controller: a property whose examples this rank waits for."""

    name: str
    settings: Mapping[str, Any]
    """Hypothesis' settings of the test, by name."""
    database_key: bytes
    seed: Hashable | None
    """The seed of `@seed`."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Controller -> rank: draw and run this example."""

    prefix: tuple[Any, ...]
    """The engine's first choices."""
    max_choices: int | None
    """An example with more choices is too long; None for no limit."""
    seed: int | None
    """Seed of the choices after the prefix; None if there are none."""
    final: bool
    """Whether this is the run that is reported."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Rank -> controller: this rank's result of the example."""

    status: Status
    drawn: tuple[int, int]
    """Number of choices made, and their checksum."""
    origin: str = ""
    """For a failure: the exception's type and where it was raised, through all its causes."""
    reason: str = ""
    """For a rejection."""
    location: str | None = None
    """For a rejection: file and line."""
    fatal: bool = False
    """Whether no further example can be run: a health check failed."""
    reusable: bool = True
    """Whether the default process group is still the world's."""
    groups: Mapping[str, GroupUse] = field(default_factory=dict)
    """The example's use of process groups here."""
    targets: Mapping[str, float] = field(default_factory=dict)
    events: Mapping[str, Any] = field(default_factory=dict)
    draw_times: Mapping[str, float] = field(default_factory=dict)
    """Seconds, by the name of the draw."""
    misaligned_at: Any = None
    """Where the prefix no longer fitted the strategies, in Hypothesis' terms."""

    @property
    def rejects(self) -> bool:
        """Whether the rank rejected the example."""
        return self.status in ("invalid", "overrun")


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice requested by a strategy."""

    kind: str
    """integer, float, string, bytes or boolean."""
    constraints: Mapping[str, Any]
    value: Any
    forced: bool

    def __str__(self) -> str:
        limits = ", ".join(
            f"{name}={value!r}"
            for name, value in self.constraints.items()
            if value is not None and name != "intervals"
        )
        return f"{self.kind}({limits}) = {self.value!r}"


@dataclass(frozen=True, slots=True)
class SpanStart:
    """A strategy began to draw."""

    label: int


@dataclass(frozen=True, slots=True)
class SpanEnd:
    """A strategy has ended drawing."""

    discard: bool
    """Whether its result was thrown away, as by a filter."""


@dataclass(frozen=True, slots=True)
class ShownLine:
    """A line for the user: the example as code, a note, a step of a state machine."""

    text: str


Entry = Choice | SpanStart | SpanEnd | ShownLine


def encode_line(text: str) -> bytes:
    """A `ShownLine` as bytes."""
    return pickle.dumps(text)


# A bool is an int: give its type, or the end of a span would be memoised as the start of span 1.
@lru_cache(maxsize=1024, typed=True)
def encode_span(mark: int | bool) -> bytes:
    """A `SpanStart`, given its label, or a `SpanEnd`, given its `discard`, as bytes."""
    return pickle.dumps(mark)


def encode_choice(kind: str, constraints: Mapping[str, Any], value: Any, forced: bool) -> bytes:
    """A `Choice` as bytes, given its parts; the same for equal choices."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out)
    # No memo: otherwise choices that share parts would differ from choices with equal parts.
    pickler.fast = True
    pickler.dump((kind, dict(constraints), value, forced))
    return out.getvalue()


class _RecordUnpickler(pickle.Unpickler):
    """Loads the classes with which Hypothesis describes its choices, and no other class or
    function.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != INTERVALS:
            raise pickle.UnpicklingError(f"a record of choices holds no {module}.{name}")
        return super().find_class(module, name)


INTERVALS = ("hypothesis.internal.intervalsets", "IntervalSet")


def decode(record: bytes) -> list[Entry]:
    """The entries of a rank's record, up to the first incomplete or invalid one."""
    stream = io.BytesIO(record)
    entries: list[Entry] = []
    while True:
        try:
            entries.append(_entry(_RecordUnpickler(stream).load()))
        except Exception:  # noqa: BLE001 - arbitrary bytes can raise anything
            return entries


def _entry(raw: Any) -> Entry:
    match raw:
        case bool():
            return SpanEnd(raw)
        case int():
            return SpanStart(raw)
        case str():
            return ShownLine(raw)
        case (str(kind), dict(constraints), value, bool(forced)):
            return Choice(kind, constraints, value, forced)
    raise ValueError(f"no entry of a record: {raw!r:.80}")


def add_to_checksum(drawn: tuple[int, int], encoded: bytes) -> tuple[int, int]:
    """`Reply.drawn` after one more encoded choice."""
    return drawn[0] + 1, zlib.crc32(encoded, drawn[1])


def divergence(records: Mapping[int, Sequence[Entry]], *, are_complete: bool) -> str:
    """Which ranks drew differently, and their draws, in one line; empty if all drew the same.

    Unless the records `are_complete`, one rank may have drawn less than another so far.
    """
    drawn = {rank: [str(e) for e in r if isinstance(e, Choice)] for rank, r in records.items()}
    longest = max((len(choices) for choices in drawn.values()), default=0)
    for index in range(longest):
        at: dict[str, list[int]] = {}
        for rank, choices in sorted(drawn.items()):
            if index < len(choices):
                at.setdefault(choices[index], []).append(rank)
            elif are_complete:
                at.setdefault("nothing more", []).append(rank)
        if len(at) > 1:
            draws = "; ".join(f"{_ranks(ranks)} drew {what}" for what, ranks in at.items())
            return (
                f"ranks diverged at choice {index + 1} of an example: {draws}. Strategies, and "
                "data.draw() in the test, must ask for the same in every rank"
            )
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def merged_lines(records: Mapping[int, Sequence[Entry]], first: int) -> list[str]:
    """The lines of rank `first`, then lines of other ranks that it lacks, with their ranks."""
    lines = [entry.text for entry in records.get(first, ()) if isinstance(entry, ShownLine)]
    others: dict[str, list[int]] = {}
    for rank, record in sorted(records.items()):
        for text in dict.fromkeys(entry.text for entry in record if isinstance(entry, ShownLine)):
            # The example is the same in all ranks, except for arguments such as `rank`.
            if text not in lines and not (lines and text.startswith(CASES)):
                others.setdefault(text, []).append(rank)
    return [*lines, *(f"{_ranks(ranks)}: {text}" for text, ranks in others.items())]

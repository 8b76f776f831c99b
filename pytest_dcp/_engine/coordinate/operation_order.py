"""Pure (no I/O): the order of a group's operations, and which of them belong together.

Theory of operation. Every rank numbers the operations of a group as it calls them, in program
order: saves and loads, in the foreground and in the background, share one series. An
`OperationPlace` is one call: its number, its kind ("save", "load") and its subject (the folder).
Operations of different ranks belong together if their numbers are equal; then kind and subject
must be equal too, or every rank gets an error that says which rank called what.

Within a rank:

- A save waits until the saves that were called before it in this group are over, so that a save in
  the background and the next one never mix.
- A load waits for the background saves to its own folder that were called before it, and sees what
  they saved. It does not wait for other saves.
- An operation that a hook of a running operation calls, in the same thread, does not wait for it.

The user's threads may call operations of different kinds at once. Then program order does not say
which is first, and the ranks may number them differently. Such places are marked `unordered`, and
are matched by their kind.

If numbers do not match (a rank missed an operation, or joined after the others had given it up),
the operation fails on every rank and its verdict begins a new epoch: numbers start again from 1,
and operations that were called before and have not begun fail with the same causes.

Assumes that all ranks call the operations of a group in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SAVE, LOAD = "save", "load"
VERDICTS = 32
WAIT_S = 0.2
"""Longest single wait for an earlier operation, so that signals are handled soon."""


def kind_of(operation: str) -> str:
    """The kind of an operation: the first word of its name; `async_save` is a save."""
    return operation.split(" ", 1)[0].removeprefix("async_")


@dataclass(frozen=True, slots=True)
class Subject:
    """The place that an operation saves to or loads from."""

    name: str
    """The absolute path, or the URL."""
    real: str
    """The same without symbolic links."""

    def is_same(self, other: Subject) -> bool:
        """Whether both are one folder: by name (on the ranks' own machines), or when resolved."""
        return self.name == other.name or self.real == other.real


@dataclass(eq=False, slots=True)
class OperationPlace:
    """One operation's place in its group's order."""

    kind: str
    epoch: int
    number: int
    """From 1, in the order of calls."""
    subject: Subject | None = None
    background: bool = False
    unordered: bool = False
    """Whether another thread's operation was under way."""
    waits_for: tuple[OperationPlace, ...] = ()
    caller: int = 0
    """The thread that called it."""
    runner: int = 0
    """The thread that runs it; 0: none yet."""
    done: threading.Event = field(default_factory=threading.Event)


class CallOrder:
    """The operations that this process called in one group."""

    def __init__(self, *, one_folder_at_a_time: bool = False) -> None:
        """one_folder_at_a_time: saves to different folders do not wait for each other."""
        self.epoch = 0
        self.causes: Sequence[Any] = ()
        """Why the epoch began."""
        self._number = 0
        self._verdicts: dict[tuple[int, int], Any] = {}
        """Verdicts on the last operations that this rank left before the others joined."""
        self._pending: list[OperationPlace] = []
        self._lock = threading.Lock()
        self._by_folder = one_folder_at_a_time

    def take(
        self, kind: str, subject: Subject | None, *, background: bool = False
    ) -> OperationPlace:
        """The next place. Call it in the thread that calls the operation."""
        caller = threading.get_ident()
        with self._lock:
            self._number += 1
            # Without the operation that this thread runs: its hook made this call, and would wait
            # for itself.
            others = [place for place in self._pending if place.runner != caller]
            place = OperationPlace(kind, self.epoch, self._number, subject, background)
            place.unordered = any(other.caller != caller for other in others)
            place.caller = caller
            place.runner = 0 if background else caller
            place.waits_for = tuple(other for other in others if self._must_wait(place, other))
            self._pending.append(place)
        return place

    def _must_wait(self, place: OperationPlace, earlier: OperationPlace) -> bool:
        # A load leaves nothing behind that a later operation could miss or mix up.
        if earlier.kind != SAVE or place.kind not in (SAVE, LOAD):
            return False
        if place.kind == SAVE and not self._by_folder:
            return True
        one_folder = (
            place.subject is not None
            and earlier.subject is not None
            and place.subject.is_same(earlier.subject)
        )
        return one_folder and (place.kind == SAVE or earlier.background)

    def finish(self, place: OperationPlace) -> None:
        """Say that the operation is over. A second call does nothing."""
        with self._lock:
            if place in self._pending:
                self._pending.remove(place)
        # Otherwise the last place would keep the chain of earlier ones alive.
        place.waits_for = ()
        place.done.set()

    def finished_up_to(self) -> int:
        """The number up to which every operation of this epoch is over."""
        with self._lock:
            numbers = [place.number for place in self._pending if place.epoch == self.epoch]
            return min(numbers, default=self._number + 1) - 1

    def is_pending(self, kind: str, epoch: int, number: int) -> bool:
        """Whether this process has called the operation and it is not over."""
        with self._lock:
            return any(
                (place.kind, place.epoch, place.number) == (kind, epoch, number)
                for place in self._pending
            )

    def note_left(self, place: OperationPlace, verdict: Any) -> None:
        """Keep the verdict on an operation that this rank left, for peers that join it later."""
        with self._lock:
            self._verdicts[place.epoch, place.number] = verdict
            while len(self._verdicts) > VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]

    def find_verdict(self, epoch: int, number: int) -> Any | None:
        """The verdict on an operation that this rank left."""
        return self._verdicts.get((epoch, number))

    def restart(self, epoch: int, causes: Sequence[Any]) -> None:
        """Begin an epoch, unless this or a later one has begun."""
        with self._lock:
            if epoch > self.epoch:
                self.epoch, self._number, self.causes = epoch, 0, causes

    def is_dropped(self, place: OperationPlace) -> bool:
        """Whether an epoch began after the place was taken."""
        return place.epoch < self.epoch

    def forget_pending(self) -> None:
        """For a forked child: it lacks the threads of its parent's operations."""
        self._lock = threading.Lock()
        for place in self._pending:
            place.done.set()
        self._pending = []


def wait_for_turn(place: OperationPlace) -> None:
    """Return when every operation that the place waits for is over."""
    place.runner = threading.get_ident()
    for earlier in place.waits_for:
        while not earlier.done.wait(WAIT_S):
            pass
    place.waits_for = ()

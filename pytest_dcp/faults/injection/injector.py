"""The injections of one process: each hook and operation passes through here, and faults act on it.

`injection` decides under a lock; faults act outside of it, since they may hang or kill. A firing is
recorded before it acts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_dcp.faults.injection.fire_counts import FireCounts
from pytest_dcp.faults.injection.injection import Event, Firing, Injection, Tally, count, matches
from pytest_dcp.faults.kinds.base import Fault, Moment
from pytest_dcp.faults.tap.operation import Operation, Verdict


@dataclass(slots=True)
class Armed:
    """An injection in this process."""

    injection: Injection
    fire_counts: FireCounts
    names: Mapping[Path | None, frozenset[str]] = field(default_factory=dict)
    """Contents of each watched folder at the time of the injection."""
    tally: Tally = field(default_factory=Tally)


Acting = list[tuple[Fault, Moment]]
"""The faults that fire at one event."""


class Injector:
    """All injections of this process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._armed: list[Armed] = []
        self._running: Counter[str] = Counter()
        """Hooks running now, in any thread."""
        self._lock = threading.Lock()
        self._muted = 0
        self._thread = _ThreadState()

    def arm(self, armed: Armed) -> None:
        """Start counting for an injection."""
        with self._lock:
            self._armed.append(armed)

    def disarm(self) -> None:
        """Forget all injections."""
        with self._lock:
            self._armed.clear()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within the block no fault acts or counts, in any thread."""
        with self._lock:
            self._muted += 1
        try:
            yield
        finally:
            with self._lock:
                self._muted -= 1

    @contextmanager
    def covered(self) -> Iterator[None]:
        """Within the block the operations of this thread are reported by the opener of the block,
        not again.
        """
        before, self._thread.covered = self._thread.covered, True
        try:
            yield
        finally:
            self._thread.covered = before

    def hook(self, name: str, call: Callable[[], Any]) -> Any:
        """Run a hook with the faults that act at it, and return its result."""
        firing = self._take_firing(self._event(name))
        acting = [(a.injection.fault, Moment(name, self.rank, a.fire_counts)) for a, _ in firing]
        with self._lock:
            self._running[name] += 1
        try:
            for fault, moment in acting:
                fault.before(moment)
            result = call()
            for fault, moment in acting:
                fault.after(moment)
                result = fault.result(result, moment)
            return result
        finally:
            with self._lock:
                self._running[name] -= 1

    def before(
        self, operation: Operation, root: Path | None, listed: frozenset[str] | None = None
    ) -> Verdict | None:
        """The verdict of the faults before an operation.

        root: the folder that its paths are relative to. listed: the last listing of a store.
        """
        self._thread.acting = []
        if self._thread.covered and listed is None:
            return None
        verdict: Verdict | None = None
        with self.covered():  # operations of a fault itself are not events
            acting = self._thread.acting = self._moments(operation, root, listed)
            for fault, moment in acting:
                verdict = fault.before(moment) or verdict
        return verdict

    def after(self, operation: Operation) -> None:
        """Let the faults that fired before this operation act after it."""
        acting, self._thread.acting = self._thread.acting, []
        with self.covered():
            for fault, moment in acting:
                fault.after(moment)

    def _moments(
        self, operation: Operation, root: Path | None, listed: frozenset[str] | None
    ) -> Acting:
        file = None if root is None else root / operation.path
        target = None if root is None or operation.to is None else root / operation.to
        paths = (operation.path,) if operation.to is None else (operation.path, operation.to)
        event = self._event(operation.kind, paths, operation.nbytes)
        acting: Acting = []
        for armed, firing in self._take_firing(event, file):
            names = listed if listed is not None else armed.names.get(file, frozenset())
            moment = Moment(
                operation.kind,
                self.rank,
                armed.fire_counts,
                operation,
                file,
                target,
                firing.room_bytes,
                names,
            )
            acting.append((armed.injection.fault, moment))
        return acting

    def _event(self, name: str, paths: tuple[str, ...] = (), nbytes: int = 0) -> Event:
        thread = threading.current_thread()
        return Event(
            name,
            self.rank,
            thread.name,
            thread is threading.main_thread(),
            paths,
            nbytes,
            frozenset(hook for hook, depth in self._running.items() if depth),
        )

    def _take_firing(self, event: Event, file: Path | None = None) -> list[tuple[Armed, Firing]]:
        """The injections that fire at an event, recorded in their fire counts."""
        found: list[tuple[Armed, Firing]] = []
        with self._lock:
            for armed in [] if self._muted else self._armed:
                injection = armed.injection
                if matches(injection, event) and injection.fault.meets(file):
                    firing = count(injection, armed.tally, event)
                    if firing is not None:
                        found.append((armed, firing))
        for armed, firing in found:
            if firing.counted:
                armed.fire_counts.add(self.rank)
        return found


class _ThreadState(threading.local):
    """The hooks and blocks that one thread is in."""

    def __init__(self) -> None:
        self.acting: Acting = []
        self.covered = False


class RootWatcher:
    """The injector, as the watcher of one root."""

    def __init__(self, injector: Injector, root: Path) -> None:
        self._injector = injector
        self._root = root

    def before(self, operation: Operation) -> Verdict | None:
        """See `Injector.before`."""
        return self._injector.before(operation, self._root)

    def after(self, operation: Operation) -> None:
        """See `Injector.after`."""
        self._injector.after(operation)

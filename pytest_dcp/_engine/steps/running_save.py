"""A save of a step while it runs: how far it is on this rank, its failure, the wait for its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pytest_dcp._engine.coordinate import StepError
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.steps.preemption import StopRequest

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self

SavePhase = Literal["plan", "write", "commit", "ended", "failed"]
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """How far a save is, as its own rank knows it."""

    step: int
    phase: SavePhase
    """"plan": until the ranks' plans are joined; "write"; "commit": this rank has written its part,
    and waits for the others; "ended" or "failed": the next call of the manager says so, too."""
    done_bytes: int
    """Of this rank's own part."""
    total_bytes: int
    """0 until the ranks' plans are joined."""
    started_at: datetime
    elapsed_s: float
    """Since the start; of a save that has ended, until its end."""
    error: BaseException | None
    """Of a save that has failed."""


class RunningSave:
    """One rank's save of one step; called with its progress, and shows the caller's."""

    def __init__(
        self, step: int, stop: StopRequest, progress: Callable[[Progress], None] | None = None
    ) -> None:
        """Raises TypeError for a progress that cannot be called."""
        if progress is not None and not callable(progress):
            raise TypeError(f"progress takes a function of a Progress; got {progress!r:.200}")
        self.step = step
        self._stop = stop
        self._progress: Any = progress
        self._state: Progress | None = None
        self._started_at = datetime.now(timezone.utc)
        self._started_s = time.monotonic()
        self._ended_s: float | None = None
        self._future: Future[Any] | None = None

    def __call__(self, state: Progress) -> None:
        """Note the progress. Raises SaveAbandonedError when the time to stop has come."""
        self._state = state
        self._stop.check(self.step)
        if self._progress is not None:
            self._progress(state)

    def __enter__(self) -> Self:
        """The caller's progress may be a bar that is open while the save runs."""
        if isinstance(self._progress, AbstractContextManager):
            self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(self._progress, AbstractContextManager):
            self._progress.__exit__(kind, error, trace)

    def follow(self, future: Future[Any]) -> None:
        """The save goes on in the background; its end is the future's."""
        self._future = future
        future.add_done_callback(self._note_end)

    @property
    def is_running(self) -> bool:
        """Whether it still goes on in the background."""
        return self._future is not None and not self._future.done()

    def call_at_end(self, function: Callable[[], None]) -> None:
        """Call it when the save in the background ends, in its thread; at once if it has ended."""
        if self._future is not None:
            self._future.add_done_callback(lambda _: function())

    def wait(self) -> None:
        """Return when it has ended; raises its error.

        After a signal to stop it raises SaveAbandonedError as soon as the grace is over.
        """
        future = self._future
        if future is None:
            return
        while not wait_for_futures([future], LOOK_S).done:
            if self._stop.seconds_left <= 0:
                raise self._stop.error_of(self.step)
        try:
            future.result()
        except StepError as error:
            # The caller has begun other steps since.
            step_error = StepError(error.step, error.failures, f"save of step {self.step}")
            raise step_error from error.__cause__

    def status(self) -> SaveStatus:
        """How far it is now. Local; any thread may ask."""
        state, future = self._state, self._future
        error = future.exception() if future is not None and _has_ended(future) else None
        end_s = time.monotonic() if self._ended_s is None else self._ended_s
        return SaveStatus(
            self.step,
            self._phase(state, error),
            0 if state is None else state.done_bytes,
            0 if state is None else state.total_bytes,
            self._started_at,
            end_s - self._started_s,
            error,
        )

    def _phase(self, state: Progress | None, error: BaseException | None) -> SavePhase:
        if self._future is not None and self._future.done():
            return "ended" if error is None and not self._future.cancelled() else "failed"
        if state is None:
            return "plan"
        return "write" if state.done_bytes < state.total_bytes else "commit"

    def _note_end(self, future: Future[Any]) -> None:
        self._ended_s = time.monotonic()


def _has_ended(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled()

"""Runs jobs on several threads: joins all, raises the first failure, makes the others stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class Stopped(Exception):
    """Another thread of the same work has failed."""


class StopFlag:
    """A flag that a failing thread sets and the others check between pieces."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Tell every thread to stop."""
        self._event.set()

    def check(self) -> None:
        """Raise Stopped if another thread has failed."""
        if self._event.is_set():
            raise Stopped


def run_all(jobs: Sequence[Callable[[StopFlag], Result]], threads: int) -> list[Result]:
    """The jobs' results, in their order. One job, or one thread, runs in the caller's.

    Raises the first failure once every thread has ended.
    """
    stop = StopFlag()
    if threads <= 1 or len(jobs) <= 1:
        return [job(stop) for job in jobs]
    first: list[BaseException] = []

    def guarded(job: Callable[[StopFlag], Result]) -> Result:
        try:
            # A job that has not begun when another fails need not begin at all.
            stop.check()
            return job(stop)
        except BaseException as error:
            if not isinstance(error, Stopped):
                first.append(error)
            stop.set()
            raise

    with ThreadPoolExecutor(min(threads, len(jobs)), thread_name_prefix="dcp-io") as pool:
        futures = [pool.submit(guarded, job) for job in jobs]
        try:
            # Waits for each; `first` holds the exception that was raised first.
            for future in futures:
                future.exception()
        except BaseException:
            # Ctrl-C reaches this thread only: the others must not go on to their end.
            stop.set()
            raise
    if first:
        raise first[0]
    return [future.result() for future in futures]

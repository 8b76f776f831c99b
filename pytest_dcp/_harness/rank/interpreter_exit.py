"""The steps of an interpreter's exit, for ranks, which end by `os._exit`.

A forked rank cannot return through the frames that it was forked in, and tearing torch's modules
down takes longer than a small test. So a rank performs, in CPython's order, the steps that a
program can rely on: it joins threads, runs `atexit` handlers (`weakref.finalize` and
`TemporaryDirectory` are among them), collects cycles, flushes the output of C code, and lets the
resource tracker of `multiprocessing` free leftovers, such as `SharedMemory`. It does not clear
modules: an object that only a module's global keeps is not finalised.

Everything inherited by a fork belongs to the parent. `forget_inherited` makes sure that its
handlers do not run in ranks: they would remove the parent's files, once for each rank.

Assumes of CPython 3.11 to 3.14: `atexit._clear` and `_run_exitfuncs`, the list of calls in
`threading._threading_atexits`, the registries of `weakref.finalize`, `logging` and
`multiprocessing.util`, and the fields of `multiprocessing.resource_tracker`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from pytest_dcp._harness.protocol import linux

JOIN_S = 2.0
"""How long threads and the resource tracker get to end. An interpreter would wait for ever."""


@dataclass(slots=True)
class ExitReport:
    """Errors while a process exited."""

    errors: list[str] = field(default_factory=list)
    """Each with its traceback: of `atexit` handlers, finalizers and `__del__`."""
    threads: list[str] = field(default_factory=list)
    """Names of threads, other than daemons, that went on running."""

    def __bool__(self) -> bool:
        return bool(self.errors or self.threads)


def forget_inherited() -> None:
    """Drop the exit handlers inherited from the parent process, so that they do not run here."""
    atexit._clear()
    registry: dict[Any, Any] = weakref.finalize._registry  # type: ignore[attr-defined]  # private
    for finalizer in list(registry):
        finalizer.atexit = False
    logging._handlerList.clear()  # type: ignore[attr-defined]  # private: handlers that `shutdown` flushes
    # These were registered when their modules were imported, or first used; never again.
    weakref.finalize._registered_with_atexit = True  # type: ignore[attr-defined]
    atexit.register(_run_finalizers, _number_of_finalizers())
    atexit.register(logging.shutdown)
    _forget_multiprocessing()


def _number_of_finalizers() -> int:
    """A number that grows with each finalizer that is made, and by one with each call."""
    number: int = next(weakref.finalize._index_iter)  # type: ignore[attr-defined]  # private
    return number


def _run_finalizers(inherited: int) -> None:
    """Run the finalizers of objects that still live, if any were made since the fork.

    Looking at inherited finalizers copies their pages: 0.7 ms in a rank that has torch.
    """
    if _number_of_finalizers() != inherited + 1:
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # private


def _forget_multiprocessing() -> None:
    """As a process that `multiprocessing` forks forgets its parent's children and finalizers."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._finalizer_registry.clear()
        atexit.register(util._exit_function)
    process: Any = sys.modules.get("multiprocessing.process")
    if process is not None:
        process._children = set()
    tracker = _resource_tracker()
    if tracker is not None:
        # The parent's tracker would free this process's leftovers only when the parent ends.
        tracker._fd = tracker._pid = None


def run_exit() -> ExitReport:
    """Run the interpreter's exit steps, in bounded time except for the handlers themselves."""
    with _errors_recorded() as report:
        deadline = time.monotonic() + JOIN_S
        report.threads += _join_threads(deadline)
        _join_children(deadline)
        atexit._run_exitfuncs()
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            if hasattr(sys, name):
                delattr(sys, name)
        gc.collect()
        linux.flush_c_streams()
        _stop_resource_tracker()
    return report


def _join_threads(deadline: float) -> list[str]:
    """Have executors end their workers, and join all threads but daemons; names of what is left."""
    if not _other_threads():
        return []
    # Executors join their workers without a limit, so that is not done in this thread.
    waker = threading.Thread(target=_end_executors, name="dcp-exit", daemon=True)
    waker.start()
    for thread in [waker, *_other_threads()]:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sorted(thread.name for thread in _other_threads())


def _other_threads() -> list[threading.Thread]:
    here = threading.current_thread()
    return [t for t in threading.enumerate() if not t.daemon and t is not here]


def _end_executors() -> None:
    """Called by `threading` before it joins: `concurrent.futures` wakes its workers up."""
    for call in reversed(threading._threading_atexits):  # type: ignore[attr-defined]  # private
        call()


def _join_children(deadline: float) -> None:
    """Wait for `multiprocessing`'s children but daemons, whose end its own handler asks for.

    That handler would join without a limit: it does not notice children that keep running, which
    the launcher kills and names.
    """
    process: Any = sys.modules.get("multiprocessing.process")
    if process is None or not process._children:
        return
    for child in process.active_children():
        if not child.daemon:
            child.join(max(0.0, deadline - time.monotonic()))
            if child.is_alive():
                process._children.discard(child)


def _resource_tracker() -> Any:
    module: Any = sys.modules.get("multiprocessing.resource_tracker")
    return None if module is None else module._resource_tracker


def _stop_resource_tracker() -> None:
    """Let this process's own tracker free leftovers, and wait for it."""
    tracker = _resource_tracker()
    if tracker is None or tracker._fd is None or tracker._pid is None:
        return
    os.close(tracker._fd)
    pid, tracker._fd, tracker._pid = tracker._pid, None, None
    deadline = time.monotonic() + JOIN_S
    with contextlib.suppress(ChildProcessError):  # a test waited for any child
        # A child of this rank may hold the tracker's pipe: then it does not end.
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)


@contextlib.contextmanager
def _errors_recorded() -> Iterator[ExitReport]:
    """Record what would only be printed: at exit there is no caller to raise to."""
    report = ExitReport()

    def unraisable(what: Any) -> None:
        head = what.err_msg or "Exception ignored in"
        report.errors.append(f"{head}: {_name(what.object)}\n\n{_format(what.exc_value)}")

    def unhandled(
        kind: type[BaseException], error: BaseException, tb: TracebackType | None
    ) -> None:
        """`weakref.finalize` hands its errors here."""
        report.errors.append(f"Exception ignored in a finalizer at exit\n\n{_format(error)}")

    old = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = unraisable, unhandled
    try:
        yield report
    finally:
        sys.unraisablehook, sys.excepthook = old


def _name(what: object) -> str:
    """As far as possible the same in all ranks: without an address."""
    module, name = getattr(what, "__module__", None), getattr(what, "__qualname__", None)
    return f"{module}.{name}" if isinstance(name, str) else type(what).__qualname__


def _format(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)) if error is not None else ""

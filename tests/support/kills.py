"""A fork that works on a run until SIGKILL ends it, and what it had reported by then.

The kill comes before a change of the disk, chosen by its number or by what it does, in whichever
thread makes it; or from outside, some time after the first report. Between two changes there is
nothing to tell apart: what a process knows dies with it.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_dcp.faults.tap import watch_operations
from pytest_dcp.faults.tap.operation import Operation
from support.disk_changes import BeforeChange

Report = Callable[[int], None]
Body = Callable[[Report], None]
LIMIT_S = 60
"""Until a fork is ended that does not end by itself."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the fork has ended."""

    reports: list[int]
    is_killed: bool
    """By SIGKILL; else it has come to its own end."""
    changes: int = 0
    """Of the watched folder; of a fork that came to its end."""


def run_and_kill(
    body: Body, root: Path, is_chosen: Callable[[int, Operation], bool] = lambda *_: False
) -> Ended:
    """Run the body in a fork, which is killed before the first chosen change of the folder."""
    watcher = BeforeChange(is_chosen, lambda _: os.kill(os.getpid(), signal.SIGKILL))

    def watched(report: Report) -> None:
        with watch_operations([root], watcher):
            body(report)
        report(watcher.changes)

    child, reading = _fork(watched)
    with open(reading, "rb") as pipe:
        reports = [int(line) for line in pipe.read().split()]
    if _was_killed(child):
        return Ended(reports, is_killed=True)
    return Ended(reports[:-1], is_killed=False, changes=reports[-1])


def run_and_kill_after(body: Body, after_s: float) -> Ended:
    """Run the body in a fork, which is killed this time after its first report."""
    child, reading = _fork(body)
    with open(reading, "rb", buffering=0) as pipe:
        reported = pipe.read(100)  # the first report, or the end of the process
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        while more := pipe.read(100):
            reported += more
    return Ended([int(line) for line in reported.split()], is_killed=_was_killed(child))


def _fork(body: Body) -> tuple[int, int]:
    """The process, and the descriptor of its reports."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            signal.alarm(LIMIT_S)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                body(lambda number: _tell(writing, number))
            code = 0
        except BaseException:  # noqa: BLE001 - the parent sees that it has failed
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    return child, reading


def _tell(writing: int, number: int) -> None:
    os.write(writing, b"%d\n" % number)


def _was_killed(child: int) -> bool:
    """Raises AssertionError if it has ended otherwise than by SIGKILL or its own end."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}"
        return True
    assert os.WEXITSTATUS(status) == 0, "the process has failed: see its error above"
    return False

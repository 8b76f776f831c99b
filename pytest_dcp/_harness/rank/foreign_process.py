"""A process of an unmodified test inside a rank: its surroundings, its target, its exit code.

Enters: a pickled `ProcessCall`. Leaves: an exception that says how the process failed or was
skipped, and the exit code that `multiprocessing` would have seen. Code written for processes of its
own reports by `sys.exit`: the exception that led to an exit is the one that is raised here.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import unittest
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pytest_dcp._harness.protocol.launcher import RANK_VARIABLE, RankLaunch
from pytest_dcp._harness.protocol.process_call import ProcessCall
from pytest_dcp.errors import ProcessExitError

PACKAGE = str(Path(__file__).parents[2])
STARTS_TESTS = (
    PACKAGE,
    os.path.dirname(multiprocessing.__file__),
    os.path.join("torch", "multiprocessing", "spawn.py"),
    os.path.join("torch", "testing", "_internal", "common_"),
    os.path.join("torch", "testing", "_internal", "distributed", "_tensor", "common_"),
    os.path.join("torch", "testing", "_internal", "distributed", "_shard", "sharded_tensor"),
    os.path.join("torch", "testing", "_internal", "distributed", "checkpoint_utils.py"),
)
"""Files, by a part of their path, whose frames lead from the start of a process to the test."""
RUNNER_LOG = "torch.testing._internal.common_distributed"
"""Where torch's test classes log the exceptions of their ranks."""
FAILED = 1
"""The exit code of an interpreter that an exception has ended."""


class ForeignProcess:
    """One process of a test, run by `run`."""

    def __init__(self, payload: bytes, order: RankLaunch) -> None:
        self._payload = payload
        self._order = order
        self.exit_code = FAILED

    def run(self) -> None:
        """Run the target. Raises its error, `SkipTest`, or `ProcessExitError` for an exit code."""
        __tracebackhide__ = True
        call = ProcessCall.load(self._payload)
        enter_surroundings(call, self._order)
        try:
            target, args, kwargs = pickle.loads(call.target)
            target(*args, **kwargs)
        except SystemExit as exit_:
            error = self._judge_exit(exit_, call)
        except BaseException as raised:  # noqa: BLE001 - raised again, with fewer frames
            error = raised
        else:
            self.exit_code, error = 0, None
        if error is not None:
            raise error.with_traceback(skip_starting_frames(error.__traceback__))

    def _judge_exit(self, exit_: SystemExit, call: ProcessCall) -> BaseException | None:
        """The error that `sys.exit` reports; None where it reports success."""
        self.exit_code = code = exit_code_of(exit_)
        cause = exit_.__context__
        if code == 0:
            return None
        if isinstance(cause, unittest.SkipTest) and code in call.skips:
            return cause
        if code in call.skips:
            return unittest.SkipTest(call.skips[code])
        # mp.spawn's own exit after an exception, and an interpreter's, is 1.
        if cause is not None and code in (call.error_code, FAILED):
            return cause
        error = ProcessExitError(f"the process ended itself by sys.exit({exit_.code!r})")
        error.__traceback__ = exit_.__traceback__
        return error


def exit_code_of(exit_: SystemExit) -> int:
    """The exit code of a process that this ends: a text is printed, and the code is 1."""
    if exit_.code is None:
        return 0
    return exit_.code & 0xFF if isinstance(exit_.code, int) else FAILED


def enter_surroundings(call: ProcessCall, order: RankLaunch) -> None:
    """Begin as a child of the controller would: its environment, folder and name, and our port."""
    replace_environment({**call.environ, RANK_VARIABLE: order.token})
    os.chdir(call.cwd)
    multiprocessing.current_process().name = call.name
    if call.error_code is not None:  # its error is in the report, once
        logging.getLogger(RUNNER_LOG).setLevel(logging.CRITICAL)
    from pytest_dcp._torch_internals.rendezvous import meet_at

    meet_at(call.port or order.master_port)


def replace_environment(environ: Mapping[str, str]) -> None:
    """Make this the environment; gloo looks up no host name unless it says so."""
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ.update(environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def skip_starting_frames(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the test's own frames on; all of it where there are none."""
    found = traceback
    while found is not None and any(
        part in found.tb_frame.f_code.co_filename for part in STARTS_TESTS
    ):
        found = found.tb_next
    return found or traceback


_kept_ends: list[object] = []
"""The other ends of this process's own pipes."""


def open_own_pipe() -> object:
    """One end of a new pipe whose other end this process keeps open."""
    own_end, end = multiprocessing.Pipe()
    _kept_ends.append(own_end)
    return end

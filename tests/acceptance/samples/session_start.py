"""Copied as test_session_start.py: notes how its session began, and leaves a process behind."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import warnings

from session_recorder import note

OF_ONE_SESSION = {"SESSION_TOKEN", "SESSION_RECORD", "TMPDIR", "PYTEST_ADDOPTS"}
PLUGINS = ("pytest_dcp", "xdist", "pytest_timeout", "pytest_cov", "hypothesis", "_hypothesis")


def test_start() -> None:
    main = sys.modules["__main__"]
    note(
        "start",
        argv=sys.argv,
        path=sys.path,
        main=(main.__spec__.name, main.__file__),
        flags=repr(sys.flags),
        warnings=repr(warnings.filters),
        environ={k: v for k, v in os.environ.items() if k not in OF_ONE_SESSION},
        own_tmpdir=tempfile.gettempdir() == os.environ["TMPDIR"],
        cwd=os.getcwd(),
        leads_session=os.getsid(0) == os.getpid(),
        signals={s.name: repr(signal.getsignal(s)) for s in signal.Signals},
        blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        threads=[thread.name for thread in threading.enumerate()],
        stdin=os.readlink("/proc/self/fd/0"),
        sockets=[fd for fd in os.listdir("/proc/self/fd") if _is_socket(fd)],
        plugins=[name for name in sys.modules if name.startswith(PLUGINS)],
        rewritten=_is_rewritten("pytest_timeout"),
    )
    note("torch", imported="torch" in sys.modules)


def test_leaves_a_process() -> None:
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)


def test_ends_by_a_signal() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:  # the descriptor that lists the folder
        return False


def _is_rewritten(name: str) -> bool:
    return type(sys.modules[name].__loader__).__name__ == "AssertionRewritingHook"

"""A process that has imported torch and forks whole pytest sessions: each saves that import.

Enters: `start_session`, in the process that runs the tests. Leaves: the session's exit code.

The server is this file run as a program: a new interpreter that imports pytest, torch and the rest
of `SLOW_IMPORTS`. It imports nothing of pytest_dcp and no plugin of pytest, so each session imports
and rewrites those itself, in its own order. The server runs no test and starts no thread. A session
is a child of the server that takes the place of `python -m pytest`: it has its own folder,
environment, output, process session and `sys.path`. Its `/proc/<pid>/environ` too holds the
session's token, by which `sample_session` finds all processes of a session.

A session that looks at the start of an interpreter (its options, what it imports) needs a new one:
`starts_alike` refuses environments that an interpreter or a library reads only at its start, and
`Suite.run` has `new_interpreter=True` for the rest.

Messages are datagrams on socket pairs. On the server's, a request: JSON {args, cwd, env, terminal},
with the descriptors of the output and of the session's own socket. On the session's: its process
id, and its exit code when it has ended. The server ends when its socket is closed, which the client
does at its own exit.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import termios
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SLOW_IMPORTS = (
    "psutil",
    "pytest",
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
)
"""What nearly every session imports, in its controller or in the process that forks its ranks."""
READ_AT_THE_START = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "COVERAGE")
"""Beginnings of the names of variables that an interpreter or a library reads when it starts."""
TOKEN = "SESSION_TOKEN"
TOKEN_LENGTH = 39
"""Digits of any 128-bit number."""
MESSAGE_BYTES = 1 << 17
END_S = 60.0
ENV_START, ENV_END = 47, 48
"""Of the fields of /proc/<pid>/stat that follow the name of the command (proc(5): 50 and 51)."""


def starts_alike(env: Mapping[str, str]) -> bool:
    """Whether a forked session sees these additions to its environment as a new one would."""
    return sys.platform == "linux" and not any(n.startswith(READ_AT_THE_START) for n in env)


class ForkedSession:
    """A running session of the server, with the methods of `subprocess.Popen` that tests need."""

    def __init__(self, reports: socket.socket) -> None:
        self._reports = reports
        self.pid = int(self._receive())
        self.returncode: int | None = None

    def wait(self, within_s: float | None = None) -> int:
        """The exit code; negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs.
            AssertionError: the server ended first.
        """
        if self.returncode is None:
            self._reports.settimeout(within_s)
            try:
                self.returncode = int(self._receive())
            except TimeoutError:
                raise subprocess.TimeoutExpired("pytest", within_s or 0.0) from None
            self._reports.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._reports], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def _receive(self) -> bytes:
        if not (data := self._reports.recv(64)):
            raise AssertionError("the server of sessions ended before its session did")
        return data


def start_session(
    args: Sequence[str], cwd: Path, env: Mapping[str, str], output: int, *, terminal: bool = False
) -> ForkedSession:
    """Start `pytest *args` in a fork of the server.

    `output` is the descriptor that it writes to. With `terminal` that is a terminal, which also is
    its input and controls it.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = {"args": [*args], "cwd": str(cwd), "env": dict(env), "terminal": terminal}
    request = json.dumps(settings).encode()
    with there:
        socket.send_fds(_server(), [request], [output, there.fileno()])
    return ForkedSession(here)


@functools.cache
def _server() -> socket.socket:
    """The socket of this process' server, which is started by the first call."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, its):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
    with its:
        process = subprocess.Popen(
            [sys.executable, __file__, str(its.fileno())],
            env={**os.environ, TOKEN: "0" * TOKEN_LENGTH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            start_new_session=True,
        )

    def end() -> None:
        ours.shutdown(socket.SHUT_RDWR)  # unlike close, also of what a fork may have inherited
        try:
            process.wait(END_S)
        finally:
            process.kill()
            process.wait()
            ours.close()

    atexit.register(end)
    return ours


# The server.


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a session for each request: returns the request in the child, None at the end."""
    ended_by: dict[int, tuple[int, int]] = {}
    """By its pidfd, each session's process id and the descriptor of its socket."""
    while True:
        ready, _, _ = select.select([requests, *ended_by], [], [])
        for pidfd in ended_by.keys() & ready:
            pid, report_fd = ended_by.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # the client no longer waits for it
                os.write(report_fd, str(code).encode())
            os.close(report_fd)
            os.close(pidfd)
        if requests not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 2)
        if not data:
            return None
        output, report_fd = fds
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside any thread, such as those of OpenBLAS.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            for fd in (*(fd for one in ended_by.items() for fd in (one[0], one[1][1])), report_fd):
                os.close(fd)
            return {**json.loads(data), "output": output}
        os.close(output)
        ended_by[os.pidfd_open(pid)] = (pid, report_fd)
        os.write(report_fd, str(pid).encode())


def _become_session(request: dict[str, Any], inherited: Sequence[str]) -> None:
    """Turn this fork into `python -m pytest` as `request` describes it, except for running it."""
    os.setsid()
    if request["terminal"]:
        fcntl.ioctl(request["output"], termios.TIOCSCTTY, 0)
        os.dup2(request["output"], 0)
    os.dup2(request["output"], 1)
    os.dup2(request["output"], 2)
    os.close(request["output"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    _show_token(request["env"][TOKEN])
    tempfile.tempdir = None  # importing torch may have asked for it
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [request["cwd"], *filter(None, paths), *inherited]
    importlib.invalidate_caches()
    sys.argv[:] = ["pytest", *request["args"]]


def _show_token(token: str) -> None:
    """Write the token where other processes read this one's initial environment."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[ENV_START]), int(fields[ENV_END])
    before = ctypes.string_at(start, end - start)
    prefix = f"{TOKEN}=".encode()
    at = start + before.index(prefix + b"0" * TOKEN_LENGTH) + len(prefix)
    ctypes.memmove(at, token.encode(), TOKEN_LENGTH)


def main() -> None:
    """Serve until the client's end; in each session, run it and exit as it does."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    of_variable = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    inherited = [path for path in sys.path[1:] if path not in of_variable]
    with warnings.catch_warnings():  # as pytest has it where it imports a suite
        for name in SLOW_IMPORTS:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the sessions' collections need not look at these objects, nor copy their pages
    request = _serve(requests)
    requests.close()
    if request is not None:
        import runpy

        _become_session(request, inherited)
        del requests, request
        runpy.run_module("pytest", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""Runs the benchmark's processes, one at a time, and leaves none of them behind.

Enters: a command line. Leaves: its wall time, or `SampleFailed` with its output. Rules that hold
here: each process leads a session of its own and has a deadline; this process is the subreaper, so
that the orphans of a command become its children and are found, killed and reported after the
command.
"""

import contextlib
import ctypes
import importlib.util
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore] # without types-psutil

DEADLINE_S = 300.0
ORPHAN_GRACE_S = 5.0  # time for a resource tracker or a zygote to notice that its parent is gone
OUTPUT_TAIL_CHARS = 6_000
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

BENCHMARKS = Path(__file__).resolve().parent
CHECKOUT = BENCHMARKS.parents[1]


class SampleFailed(Exception):
    """A process of the benchmark failed, so there is nothing to time."""


def become_subreaper() -> None:
    """Makes this process the parent of every orphan below it.

    Raises OSError where the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def environment(scratch: Path) -> dict[str, str]:
    """The environment of every process: no other pytest plugin, temporary files in `scratch`.

    `pytest_dcp` is the installed one, or the checkout's where none is installed. Modules are kept
    compiled, as an installed package's are.
    """
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    paths = [str(BENCHMARKS)]
    if importlib.util.find_spec("pytest_dcp") is None:
        paths.append(str(CHECKOUT))
    if "PYTHONPATH" in variables:
        paths.append(variables["PYTHONPATH"])
    return variables | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(scratch),
    }


def run(argv: Sequence[str], scratch: Path, *, settings: dict[str, str] | None = None) -> float:
    """The wall time in ms of a command that ran in `scratch` and exited with 0.

    `settings` are further environment variables. Raises SampleFailed, with the end of the output,
    when it exited otherwise, passed its deadline, or left processes behind.
    """
    output = scratch / "output.txt"
    try:
        with output.open("wb") as sink:
            started_s = time.perf_counter()
            process = subprocess.Popen(
                argv,
                cwd=scratch,
                env=environment(scratch) | (settings or {}),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        problem = _wait(process)
        elapsed_ms = (time.perf_counter() - started_s) * 1e3
    finally:
        orphans = kill_orphans()
    if orphans:
        problem = problem or f"left {len(orphans)} processes behind: {', '.join(orphans)}"
    if problem:
        tail = output.read_text(errors="replace")[-OUTPUT_TAIL_CHARS:]
        raise SampleFailed(f"{shlex.join(argv)}\n{problem}; its output ends:\n{tail}")
    return elapsed_ms


def _wait(process: subprocess.Popen[bytes]) -> str:
    """Wait for the process to end; returns an error, or an empty string.

    Waits on a pidfd: `Popen.wait` with a time-out sleeps up to 50 ms between two polls, longer than
    the measured work itself.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
        try:
            ready, _, _ = select.select([pidfd], [], [], DEADLINE_S)
        finally:
            os.close(pidfd)
        if not ready:
            return f"did not end within {DEADLINE_S:g} s"
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exited with {code}" if code else ""


def kill_orphans() -> list[str]:
    """Descriptions of the processes that a command left running; none of them runs any more."""
    me = psutil.Process()
    _, alive = psutil.wait_procs(me.children(recursive=True), timeout=ORPHAN_GRACE_S)
    found: list[str] = []
    while alive:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(f"{process.pid} {process.name()}")
                process.kill()
        psutil.wait_procs(alive, timeout=ORPHAN_GRACE_S)
        alive = me.children(recursive=True)
    return found

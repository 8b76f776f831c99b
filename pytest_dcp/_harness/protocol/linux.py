"""The few Linux calls that Python's standard library does not have, through ctypes.

Each is a no-op or raises a clear OSError on kernels without it; nothing here keeps state.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
MADV_COLLAPSE = 25  # linux/mman.h, since 6.1
OMP_PAUSE_HARD = 2  # omp.h
PF_EXITING = 0x4  # linux/sched.h
HUGE_PAGE_BYTES = 2 << 20
ANY_CHANGE = 0x4 | 0x2 | 0x8
"""For waitid: a child ended, stopped or continued (WEXITED, WSTOPPED, WCONTINUED of linux/wait.h; a
Python without waitid has no names for them, and must import this module all the same)."""
HALTS = {5: True, 6: False}
"""si_code of waitid, CLD_STOPPED or CLD_CONTINUED -> whether the child is stopped; other codes mean
its end."""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send `signum` to this process when its parent thread ends.

    Ends the process at once if `parent` has already ended: then the kernel would send nothing.
    """
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def children() -> list[int]:
    """Process ids of this single-threaded process's children, zombies included."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    try:
        return [int(pid) for pid in path.read_text().split()]
    except OSError:
        return _children_by_scan()


def _children_by_scan() -> list[int]:
    """For kernels without CONFIG_PROC_CHILDREN."""
    mine = []
    for pid in processes():
        try:
            after_name = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == os.getpid():
            mine.append(pid)
    return mine


TRACKER = "multiprocessing.resource_tracker"
"""In the command line of the process that frees SharedMemory after its users have ended."""
TRACKER_S = 1.0
"""Time for a tracker to free leftovers: it needs milliseconds once all users have ended."""


def kill_group(pid: int) -> None:
    """SIGKILL a process and its group except resource trackers, which still have work to do.

    Scans all processes of the machine if there is a tracker; otherwise cheap.
    """
    members: tuple[int, ...] = ()
    trackers: tuple[int, ...] = ()
    if any(TRACKER in command_of(child) for child in _children_of(pid)):
        members = tuple(other for other in processes() if group_of(other) == pid)
        trackers = tuple(other for other in members if TRACKER in command_of(other))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if not trackers:
            os.killpg(pid, signal.SIGKILL)
    for other in {pid, *members} - {*trackers}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(other, signal.SIGKILL)


def await_trackers(pids: Iterable[int]) -> None:
    """Wait until the resource trackers among the processes have ended; a second at most."""
    deadline = time.monotonic() + TRACKER_S
    for pid in pids:
        if TRACKER in command_of(pid):
            while state_of(pid) not in ("Z", "X", "") and time.monotonic() < deadline:
                time.sleep(0.001)


def group_of(pid: int) -> int:
    """The process group of a process; -1 if it has ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def _children_of(pid: int) -> list[int]:
    """Children of any process; empty if the kernel does not list them."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{thread}/children").read_text()
            found += [int(child) for child in text.split()]
    return found


def processes() -> list[int]:
    """Process ids of all processes on this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_of(pid: int) -> str:
    """The command line of a process, or its name, or '?' if it has ended."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        text = raw.replace(b"\0", b" ").decode(errors="replace").strip()
        return text or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def variable_of(pid: int, name: str) -> str:
    """A variable of the environment with which a process was started; '' if unset."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    prefix = f"{name}=".encode()
    found = (part for part in raw.split(b"\0") if part.startswith(prefix))
    return next(found, prefix)[len(prefix) :].decode(errors="replace")


def state_of(pid: int | str) -> str:
    """The one-letter state of a process in /proc/<pid>/stat: T is stopped; '' if it has ended.

    For a thread, pass `<pid>/task/<tid>`.
    """
    try:
        # The name, before the last bracket, may hold any bytes: it is cut at 15, perhaps inside a
        # letter.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def at_work(pid: int) -> bool:
    """Whether a thread of a process is running, or waiting for a processor or a disk."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(state_of(f"{pid}/task/{thread}") in ("R", "D") for thread in threads)


def is_exiting(pid: int) -> bool:
    """Whether the kernel has begun to end a process, or has ended it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return bool(int(fields[6]) & PF_EXITING)
    except (OSError, IndexError):
        return True


def main_thread_cpu_s(pid: int) -> float:
    """Processor time of a process's main thread in seconds; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text()
        return int(text.split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


def signal_main_thread(pid: int, signum: int) -> None:
    """Send a signal to a process's main thread, though others could handle it.

    While the main thread handles a signal, the kernel delivers the process's next one to another
    thread. Raises OSError.
    """
    libc = _libc()
    if not hasattr(libc, "tgkill"):  # glibc before 2.30
        os.kill(pid, signum)
    elif libc.tgkill(pid, pid, signum) != 0:
        raise OSError(ctypes.get_errno(), f"tgkill of process {pid}")


def flush_c_streams() -> None:
    """Flush C code's buffered output, which `os._exit` would drop.

    Also call it before a fork: otherwise each child would write it again.
    """
    _libc().fflush(None)


def collapse_memory() -> int:
    """Back this process's private heap with huge pages; returns the bytes covered.

    A fork then copies one page-table entry instead of 512, which is most of the cost of forking a
    process with torch loaded.
    """
    madvise = _libc().madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    covered = 0
    line_shape = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0(\s+\[heap\])?$")
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = line_shape.match(line.rstrip())
        if not match:
            continue
        low = -(-int(match[1], 16) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        high = int(match[2], 16) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if high > low and madvise(low, high - low, MADV_COLLAPSE) == 0:
            covered += high - low
    return covered


def pause_openmp() -> None:
    """End the worker threads of every OpenMP runtime in this process.

    A child forked while they exist would wait for threads that it does not have.
    """
    maps = Path("/proc/self/maps").read_text()
    for path in sorted(set(re.findall(r"(/\S*lib(?:g|i)?omp[^/\s]*\.so\S*)", maps))):
        try:
            ctypes.CDLL(path).omp_pause_resource_all(OMP_PAUSE_HARD)
        except (OSError, AttributeError):  # an OpenMP before 5.0 lacks the call
            continue

"""Leases of the machine's CPU slots and GPUs, between all pytest processes of one user.

Enters: how many rank processes and GPUs a world needs. Leaves: a `Lease` to hold for the world's
life, or an error. Rules inside:

- A slot is a lock file, at most one holder at a time; the files stay, as many as there are slots.
- All or nothing: a taker collects slots only while it holds the turnstile of their resource, and on
  failure releases its slots. Resources are collected in one order, GPUs before CPU slots, so takers
  cannot deadlock; a large taker keeps its slots until it has enough, so small ones cannot starve
  it. A taker that waits for a GPU does not stop takers of CPU slots only.
- The kernel frees a slot when its holder dies. Lock files are close-on-exec, and filelock closes
  them in a child of `os.fork`: a child neither keeps nor can release its parent's leases, and its
  copy of a pool takes leases of its own. A child forked past Python, from C without exec, keeps
  them open.

Processes meet only where they see one folder, so with the same `TMPDIR`. A GPU named by index in
one process and by UUID in another counts as two.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from filelock import FileLock, Timeout

from pytest_dcp._harness.controller.lease_errors import (
    GpusUnavailable,
    LeaseFolderRejected,
    LeaseRequest,
    LeaseTimeout,
    Shortage,
)

FIRST_PAUSE_S = 0.005
"""Between the first two tries; a few times less than a short world lives."""
PAUSE_GROWTH = 1.2
"""Keeps a pause near a fifth of the wait so far; 1.5 left a fifth of the slots unused."""
LONGEST_SLOT_PAUSE_S = 0.05
"""A try for a taken slot costs about 40 us, and only the turnstile's holder tries."""
LONGEST_TURN_PAUSE_S = 0.01
"""Shorter, so that a taker that has waited long is about as likely to be next as a new one."""
PROCESSES_PER_CPU = 4
"""Ranks mostly wait: for their peers, for a disk, for their imports."""
LEAST_PROCESSES = 8
"""So that a world of 8 ranks needs no option on a machine of one or two CPUs."""


class Lease:
    """Slots that are ours until `release`, the end of the `with` block or of the process."""

    def __init__(self, gpus: tuple[int, ...], slot_stack: ExitStack) -> None:
        self.gpus = gpus
        """Indices into the outer CUDA_VISIBLE_DEVICES list, ascending."""
        self._slot_stack = slot_stack

    def release(self) -> None:
        """Give the slots back; again, or in a forked child, do nothing."""
        self._slot_stack.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class LeasePool:
    """The leases that this process takes; for all its threads."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        max_processes: int,
        visible_gpus: Sequence[str] = (),
    ) -> None:
        """Open the pool in `folder`, by default one for this user below the temporary folder.

        Raises `LeaseFolderRejected` for a folder that others may write to, and ValueError.
        """
        if max_processes < 1:
            raise ValueError(f"expected max_processes >= 1, got {max_processes!r}")
        if len(set(visible_gpus)) != len(visible_gpus):
            raise ValueError(f"expected each GPU once, got visible_gpus={tuple(visible_gpus)!r}")
        self._folder = _default_folder() if folder is None else folder.absolute()
        self._max_processes = max_processes
        self._visible_gpus = tuple(visible_gpus)
        _secure(self._folder)
        self._open_slots()

    def acquire(self, request: LeaseRequest, deadline_s: float) -> Lease:
        """A lease of all that is requested, within `deadline_s` seconds from now; 0 tries once.

        Raises `GpusUnavailable` at once if waiting cannot help, and `LeaseTimeout`.
        """
        if request.gpus > len(self._visible_gpus):
            raise GpusUnavailable(request.gpus, self._visible_gpus)
        # A cleaner of temporary files may have removed it since.
        _secure(self._folder)
        if os.getpid() != self._pid:
            self._open_slots()
        start_s = time.monotonic()
        deadline = start_s + deadline_s
        with ExitStack() as slot_stack:
            try:
                gpus = self._gpus.collect(request.gpus, deadline, slot_stack)
                self._cpus.collect(
                    min(request.processes, self._max_processes), deadline, slot_stack
                )
            except _OutOfTime as out:
                waited_s = time.monotonic() - start_s
                slot_stack.close()
                raise LeaseTimeout(self._shortage(request, out.waiting_for, waited_s)) from None
            return Lease(gpus, slot_stack.pop_all())

    def _open_slots(self) -> None:
        """New locks for this process: those from before a fork belong to the parent."""
        self._pid = os.getpid()
        self._cpus = _Resource(
            "CPU slots",
            _Slot(self._folder / "turnstile.lock"),
            tuple(_Slot(self._folder / f"cpu-{i}.lock") for i in range(self._max_processes)),
        )
        self._gpus = _Resource(
            "GPUs",
            _Slot(self._folder / "turnstile-gpu.lock"),
            tuple(
                _Slot(self._folder / f"gpu-{quote(k, safe='')}.lock") for k in self._visible_gpus
            ),
        )

    def _shortage(self, request: LeaseRequest, waiting_for: str, waited_s: float) -> Shortage:
        return Shortage(
            request=request,
            waiting_for=waiting_for,
            max_processes=self._max_processes,
            free_processes=self._cpus.count_free(),
            visible_gpus=self._visible_gpus,
            free_gpus=self._gpus.count_free(),
            waited_s=waited_s,
            folder=self._folder,
        )


class _Slot:
    """One lock file, taken at most once at a time, over processes and within this one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A soft lock would outlive a killed holder, so a file system without flock is an error.
        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False)
        # A FileLock is reentrant: by itself it would let this process take a slot again.
        self._taken_here = threading.Lock()

    def take(self) -> bool:
        """Whether the slot is now ours; False if anyone has it, never waits.

        Raises `LeaseFolderRejected` when its file cannot be a lock: another kind of file is in its
        place, or the disk is full.
        """
        if not self._taken_here.acquire(blocking=False):
            return False
        is_ours = False
        try:
            self._lock.acquire(blocking=False)
            is_ours = True
        except Timeout:
            pass
        except OSError as exc:
            problem = f"has no usable lock file {self._path.name!r}: {exc.strerror or exc}"
            raise LeaseFolderRejected(self._path.parent, (problem,)) from exc
        finally:
            if not is_ours:
                self._taken_here.release()
        return is_ours

    def release(self) -> None:
        """Free the slot; from any thread of the process that took it."""
        try:
            self._lock.release()
        finally:
            self._taken_here.release()


@dataclass(frozen=True, slots=True)
class _Resource:
    """Slots of one kind, and the turnstile that lets one taker at a time collect them."""

    name: str
    turnstile: _Slot
    slots: tuple[_Slot, ...]

    def collect(self, count: int, deadline: float, slot_stack: ExitStack) -> tuple[int, ...]:
        """Indices of `count` slots, ascending, all taken until `slot_stack` closes.

        `deadline` is in seconds of the monotonic clock. Raises `_OutOfTime` when it passes; slots
        collected by then are in `slot_stack` too.
        """
        if count == 0:
            return ()
        if not any(self.turnstile.take() for _ in _tries(deadline, LONGEST_TURN_PAUSE_S)):
            raise _OutOfTime(f"its turn to collect {self.name}, behind another world")
        indices: set[int] = set()
        try:
            for _ in _tries(deadline, LONGEST_SLOT_PAUSE_S):
                for index, slot in enumerate(self.slots):
                    if index not in indices and slot.take():
                        slot_stack.callback(slot.release)
                        indices.add(index)
                        if len(indices) == count:
                            return tuple(sorted(indices))
        finally:
            self.turnstile.release()
        raise _OutOfTime(self.name)

    def count_free(self) -> int:
        """How many slots are free; takes each for a moment."""
        free = 0
        for slot in self.slots:
            if slot.take():
                slot.release()
                free += 1
        return free


class _OutOfTime(Exception):
    """The deadline passed; stays inside this module."""

    def __init__(self, waiting_for: str) -> None:
        super().__init__(waiting_for)
        self.waiting_for = waiting_for


def visible_gpus(environ: Mapping[str, str], device_count: int) -> tuple[str, ...]:
    """Keys of the GPUs that this process may use, in index order. Pure (no I/O).

    A key is the GPU's entry in CUDA_VISIBLE_DEVICES, or its index if that is unset. `device_count`
    is what the driver reports to this process, as `torch.cuda.device_count()`: all GPUs if the
    variable is unset, else it only bounds the list, so the count without the variable will do too.

    Follows CUDA as `torch.cuda._parse_visible_devices` does: UUIDs or leading integers, not mixed;
    the first entry that is neither, or negative, ends the list; a GPU listed twice empties it.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(str(index) for index in range(device_count))
    entries = [entry.strip() for entry in listed.split(",")]
    prefix = entries[0][:4]
    if prefix in ("GPU-", "MIG-"):
        keys = list(takewhile(lambda entry: entry.startswith(prefix), entries))
    else:
        ordinals = (re.match(r"\+?(\d+)", entry, re.ASCII) for entry in entries)
        keys = [str(int(found[1])) for found in takewhile(bool, ordinals) if found]
    return tuple(keys[:device_count]) if len(set(keys)) == len(keys) else ()


def default_max_processes(cpu_count: int | None) -> int:
    """CPU slots of a machine with `cpu_count` CPUs, None for unknown. Pure (no I/O)."""
    return max(LEAST_PROCESSES, PROCESSES_PER_CPU * (cpu_count or 1))


def folder_problems(mode: int, owner: int, uid: int) -> tuple[str, ...]:
    """Why user `uid` must not keep locks in a folder, of its `lstat`; empty if fine. Pure (no I/O).

    `mode` is the whole st_mode: in a folder that others may write to, they could create a lock file
    and hold it forever, or make us open the target of a link.
    """
    problems = []
    if not stat.S_ISDIR(mode):
        problems.append("is a symbolic link" if stat.S_ISLNK(mode) else "is not a folder")
    elif stat.S_IMODE(mode) != stat.S_IRWXU:
        problems.append(f"has mode {stat.S_IMODE(mode):04o}, expected 0700")
    if owner != uid:
        problems.append(f"belongs to uid {owner}, expected {uid}")
    return tuple(problems)


def _default_folder() -> Path:
    return Path(tempfile.gettempdir()).absolute() / f"pytest-dcp-{os.getuid()}"


def _secure(folder: Path) -> None:
    """Make the folder if it is missing. Raises `LeaseFolderRejected` unless only we can use it."""
    try:
        try:
            status = os.lstat(folder)
        except FileNotFoundError:
            with suppress(FileExistsError):
                folder.mkdir(mode=stat.S_IRWXU)
            status = os.lstat(folder)
    except OSError as exc:
        raise LeaseFolderRejected(folder, (f"cannot be made: {exc}",)) from exc
    if problems := folder_problems(status.st_mode, status.st_uid, os.getuid()):
        raise LeaseFolderRejected(folder, problems)


def _tries(deadline: float, longest_pause_s: float) -> Iterator[None]:
    """A turn to try at once, then one after each pause, the last at the deadline."""
    pause_s = FIRST_PAUSE_S
    yield
    while (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(pause_s, left_s))
        yield
        pause_s = min(pause_s * PAUSE_GROWTH, longest_pause_s)

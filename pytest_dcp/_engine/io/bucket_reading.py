"""Reads buckets of bytes for several ranks, on threads of its own, a bounded number at a time.

A bucket is a number of segments: ranges of entries' data, which are read and checked like any other
range (`read_copies`), into memory of the reader. `BucketLayout` says where each segment lies in
that memory, the same on all ranks. Memory is used again once a bucket is released, so a rank holds
at most the threads' buckets and SPARE more, however slow the ranks are that receive them.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.io.checked_ranges import ByteCounts
from pytest_dcp._engine.io.copy_plan import Copies
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_copies import CopyRequest, ReadSettings, read_copies
from pytest_dcp._engine.io.tensor_memory import memory_of
from pytest_dcp._engine.io.threads import StopFlag, Stopped
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import ReadItems

SPARE = 2
"""Buckets that may wait to be sent while each thread reads another."""
ALIGNMENT = 64
"""Of segments in a bucket: elements of every dtype are aligned."""
TICK_S = 0.2
"""How often a thread that waits for memory looks whether it shall stop."""


@dataclass(frozen=True, slots=True)
class BucketLayout:
    """A bucket: its segments, and where they lie in its memory."""

    number: int
    segments: Sequence[tuple[int, int, int]]
    """Entry, first and last byte (exclusive) of its data."""
    offsets: Sequence[int]
    """Of each segment in the bucket."""
    nbytes: int

    @classmethod
    def of(cls, number: int, segments: Sequence[tuple[int, int, int]]) -> BucketLayout:
        """The layout of these segments: one after another, aligned.

        >>> BucketLayout.of(0, [(5, 0, 100), (6, 0, 8)]).offsets
        [0, 128]
        """
        offsets, at = [], 0
        for _, low, high in segments:
            offsets.append(at)
            at += high - low + (low - high) % ALIGNMENT
        return cls(number, segments, offsets, at)


@dataclass(frozen=True, slots=True)
class BucketSource:
    """What buckets are read from, and how."""

    folder: Folder
    catalog: Catalog
    items: ReadItems
    settings: ReadSettings
    observer: Observer


class BucketReader:
    """Threads that read buckets, in their order, and then other bytes of this rank."""

    def __init__(
        self,
        source: BucketSource,
        buckets: Sequence[BucketLayout],
        read_rest: Callable[[], ByteCounts] | None = None,
    ) -> None:
        """read_rest: reads bytes that no other rank wants, once every bucket has been begun."""
        self.tally = ByteCounts()
        self._source = source
        self._read_rest = read_rest
        self._todo = deque(buckets)
        self._ready: deque[tuple[int, memoryview]] = deque()
        self._lock = threading.Lock()
        self._stop = StopFlag()
        self._error: BaseException | None = None
        self._memory: dict[int, torch.Tensor] = {}
        """Of buckets that are read or sent, by number."""
        threads = max(1, min(source.settings.threads, len(buckets)))
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        largest = max((bucket.nbytes for bucket in buckets), default=0)
        for _ in range(min(threads + SPARE, len(buckets))):
            self._free.put(torch.empty(largest, dtype=torch.uint8))
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._running = threads
        self._threads = [
            threading.Thread(target=self._work, name=f"dcp-bucket-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_done(self) -> bool:
        """Whether every bucket has been taken."""
        with self._lock:
            return not self._running and not self._ready and self._error is None

    def fileno(self) -> int:
        """Readable when `take` has something to return or to raise."""
        return self._bell.fileno()

    def take(self) -> list[tuple[int, memoryview]]:
        """Buckets that have been read since the last call. Raises the error of a thread."""
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)
        with self._lock:
            if self._error is not None:
                raise self._error
            ready = list(self._ready)
            self._ready.clear()
        return ready

    def release(self, number: int) -> None:
        """Use a bucket's memory again."""
        self._free.put(self._memory.pop(number))

    def close(self) -> None:
        """Stop the threads, and wait for them to end."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._bell.close()
        self._ringer.close()

    def _work(self) -> None:
        try:
            while (bucket := self._next_bucket()) is not None:
                self._read(bucket)
            rest = self._take_rest()
            if rest is not None:
                self._count(rest())
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - `take` raises it
            self._stop.set()
            with self._lock:
                self._error = self._error or error
        with self._lock:
            self._running -= 1
        self._ring()

    def _next_bucket(self) -> BucketLayout | None:
        with self._lock:
            return self._todo.popleft() if self._todo else None

    def _take_rest(self) -> Callable[[], ByteCounts] | None:
        with self._lock:
            rest, self._read_rest = self._read_rest, None
        return rest

    def _read(self, bucket: BucketLayout) -> None:
        memory = self._wait_for_memory()
        self._memory[bucket.number] = memory
        self._count(read_bucket(self._source, bucket, memory))
        with self._lock:
            self._ready.append((bucket.number, memory_of(memory)[: bucket.nbytes]))
        self._ring()

    def _wait_for_memory(self) -> torch.Tensor:
        while True:
            self._stop.check()
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=TICK_S)

    def _count(self, tally: ByteCounts) -> None:
        with self._lock:
            self.tally.add(tally)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._ringer.send(b"!")


def read_bucket(source: BucketSource, bucket: BucketLayout, memory: torch.Tensor) -> ByteCounts:
    """Read a bucket's segments into memory, which holds at least its bytes; checked.

    Raises CheckpointCorruptError naming file, entry and offset.
    """
    entry, low, high = np.array(bucket.segments, dtype=np.int64).reshape(-1, 3).T
    address = memory.data_ptr() + np.array(bucket.offsets, dtype=np.int64)
    flat = _flat_copies(entry, low, high - low, address)
    settings = replace(source.settings, threads=1)
    silent = source.observer.silent()
    return read_copies(
        CopyRequest(source.folder, source.catalog, source.items, flat, settings, silent)
    )


def _flat_copies(entry: Ints, low: Ints, nbytes: Ints, address: Ints) -> Copies:
    """Runs of bytes, from entries' data to memory."""
    ones = np.ones((len(entry), 1), dtype=np.int64)
    return Copies(
        row=np.zeros_like(entry),
        entry=entry,
        shape=nbytes[:, None],
        from_stride=ones,
        from_start=low,
        to_stride=ones,
        address=address,
        nbytes=nbytes,
        flat=np.ones(len(entry), dtype=bool),
        target=(),
    )

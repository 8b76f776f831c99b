"""Items -> data files: one job per file, each written once from start to end.

Tensors go from their memory to the file; only their ends are copied. Writes of flat tensors end at
multiples of a constant, so that the page cache can hold a large file in huge pages. Checksums are
computed on the way, while the bytes are in the processor's cache. Each thread uses at most
`Settings.copy_ahead_bytes` and a huge page of memory besides the tensors.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, cast

import numpy as np
import torch

from pytest_dcp._engine.format.catalog import BLOCK_BYTES
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.entry import tensor_frame
from pytest_dcp._engine.format.wrapper_entry import WrapperEntry
from pytest_dcp._engine.format.write_results import WriteColumns
from pytest_dcp._engine.io.block_sums import BlockSums, block_sums
from pytest_dcp._engine.io.disk import Buffer, Out
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.mapped_windows import HUGE_PAGE_BYTES
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.tensor_memory import is_flat, memory_of, pieces
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.io.transforms import Through
from pytest_dcp._engine.plan.boxes import Ints, row_bounds
from pytest_dcp._engine.plan.columns import UNKNOWN
from pytest_dcp._torch_internals.checkpoint_classes import StreamTransformExtension
from pytest_dcp.errors import PlanError

Source = Callable[[int], torch.Tensor | bytes]
"""The data of a row: a tensor, or a value's entry."""

WRITE_BYTES = 1 << 20
"""Writes end at multiples of this."""
HUGE_FROM_BYTES = 1 << 30
"""Files of at least this size are written in whole huge pages: the cache then keeps them that way,
and a load maps each at almost no cost, instead of 90 us. A huge page needs memory that was not in
use lately, which a virtual machine may have to request from its host (2.5 ms). Shorter files can
use recently freed small pages instead; there are not enough of these for long files.
"""
PIECE_BYTES = 1 << 20
"""Bytes hashed and written at a time: fits the second-level cache."""
COPY_AHEAD_BYTES = 10_000_000
"""The least to copy at a time of a tensor that is not in flat CPU memory; torch's default."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to write."""

    sync: bool = True
    """fsync each file once it is whole."""
    threads: int = 1
    copy_ahead_bytes: int = COPY_AHEAD_BYTES
    """Bytes to copy at a time of a tensor that must be copied (strided, or on a GPU)."""
    transforms: Sequence[StreamTransformExtension] = ()
    through: Through | None = None
    """Instead of `transforms`: a function that gives the stream for an entry."""

    @property
    def is_plain(self) -> bool:
        """Whether entries reach the file untransformed."""
        return not self.transforms and self.through is None


@dataclass(frozen=True, slots=True)
class FileJob:
    """One file to be."""

    name: str
    rows: Sequence[int]
    """Rows of the plan, in the file's order."""
    nbytes: int = 0
    """A lower bound of the file's size, derived from the plan."""
    awaited: int = 0
    """How many of the first rows are reported by `WriteRequest.awaited_rows_done`."""


@dataclass(slots=True)
class Rows:
    """Facts about the rows written so far."""

    places: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """Per row: the row, its entry's start and length, its data's start and size in bytes."""
    sums: list[list[int]] = field(default_factory=list)
    descriptors: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """For the rows that went through a user's own stream."""

    def add(
        self, row: int, start: int, length: int, data_start: int, nbytes: int, sums: list[int]
    ) -> None:
        self.places.append((row, start, length, data_start, nbytes))
        self.sums.append(sums)


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """Files to write, and where their contents come from."""

    folder: Folder
    jobs: Sequence[FileJob]
    source: Source
    """Gives the data of a row."""
    settings: Settings
    observer: Observer
    awaited_rows_done: Callable[[], None] = lambda: None
    """Called by each job that has awaited rows, once their memory is no longer read."""


def write_files(request: WriteRequest) -> WriteColumns:
    """Write the files; returns where every row went. If `settings.sync`, the files are on stable
    storage.

    Raises errors of the disk, the source or the observer, from any thread.
    """

    def job(number: int) -> Callable[[StopFlag], Rows]:
        return lambda stop: _write_file(request, request.jobs[number], stop)

    names = [job.name for job in request.jobs]
    done = run_all([job(n) for n in range(len(names))], request.settings.threads)
    return written_rows(done, names, request.settings)


def _write_file(request: WriteRequest, job: FileJob, stop: StopFlag) -> Rows:
    settings = request.settings
    with request.folder.create(job.name) as out:
        if settings.is_plain:
            out.reserve(job.nbytes)
        file = File(out, request.observer, stop, job.nbytes, sync=settings.sync)
        rows = Rows()
        if job.awaited:
            _put_rows(file, rows, job.rows[: job.awaited], request)
            request.awaited_rows_done()
        _put_rows(file, rows, job.rows[job.awaited :], request)
        file.flush()
        out.end_at(file.position)
        file.sync()
    return rows


def _put_rows(file: File, rows: Rows, numbers: Sequence[int], request: WriteRequest) -> None:
    """Write these rows; afterwards their tensors may change."""
    source, settings = request.source, request.settings
    plain = settings.is_plain
    for row in numbers:
        data = source(row)
        if not plain:
            _put_transformed(file, rows, row, data, settings)
        elif isinstance(data, torch.Tensor):
            _put_tensor(file, rows, row, data, settings)
        else:
            _put_value(file, rows, row, data)


class File:
    """A file being written, in parts that end at multiples of `step` unless flushed."""

    def __init__(
        self, out: Out, observer: Observer, stop: StopFlag, nbytes: int = 0, *, sync: bool
    ) -> None:
        """nbytes: a lower bound of its size. sync: whether it goes to stable storage."""
        self.step = WRITE_BYTES if nbytes < HUGE_FROM_BYTES else HUGE_PAGE_BYTES
        self.out = out
        self.observer = observer
        self.stop = stop
        self.syncs = sync
        self.position = 0
        self._written = 0
        self._buffers: list[Buffer] = []
        self._data = 0

    def put(self, buffer: Buffer, data: int = 0) -> None:
        """Append bytes, some of them tensor data.

        They must not change until `settle` or `flush`.
        """
        self.position += len(buffer)
        self._data += data
        self._buffers.append(buffer)
        # Only once a multiple of `step` is passed; the bytes beyond it wait for the next write.
        if self.position // self.step > self._written // self.step:
            self._write(self.position % self.step)

    def settle(self) -> None:
        """Copy pending pieces that lie in the caller's memory; they are shorter than `step`.

        A planner may reuse the memory of one tensor for the next.
        """
        for n in range(len(self._buffers) - 1, -1, -1):
            if isinstance(self._buffers[n], bytes):
                return  # and the pieces before it are copies, too, or parts of one
            self._buffers[n] = bytes(self._buffers[n])

    def flush(self) -> None:
        """Write the pending pieces."""
        if self._buffers:
            self._write(0)

    def sync(self) -> None:
        """Return once what was flushed is on stable storage, if this file goes there."""
        if self.syncs:
            self.out.sync()

    def _write(self, tail_bytes: int) -> None:
        """Write the buffers, but for some bytes at the end of the last one."""
        self.stop.check()
        last = memoryview(self._buffers.pop())
        cut = len(last) - tail_bytes
        self.out.write([*self._buffers, last[:cut]])
        if self.syncs:
            self.out.begin_sync()
        self._written = self.position - tail_bytes
        self._buffers = [last[cut:]] if tail_bytes else []
        data, self._data = self._data, min(tail_bytes, self._data)
        self.observer.advance(data - self._data)


def _put_tensor(file: File, rows: Rows, row: int, tensor: torch.Tensor, settings: Settings) -> None:
    frame = tensor_frame(tensor.dtype, tuple(tensor.shape))
    start = file.position
    data_start = start + len(frame.head)
    if frame.data_nbytes <= BLOCK_BYTES and is_flat(tensor):
        # Head, data and tail joined: one copy of a small tensor costs less than three buffers.
        memory = memory_of(tensor)
        crc = crc32(memory)
        sums = [crc] if frame.data_nbytes else []
        file.put(b"".join((frame.head, memory, frame.tail(crc))), frame.data_nbytes)
    else:
        file.put(frame.head)
        sums = put_data(file, tensor, settings)
        file.put(frame.tail(sums[-1] if sums else 0))
    rows.add(row, start, frame.length, data_start, frame.data_nbytes, sums)


def put_data(file: File, tensor: torch.Tensor, settings: Settings) -> list[int]:
    """Write the tensor's values; their checksums."""
    sums = BlockSums()
    flat = is_flat(tensor)
    step = PIECE_BYTES if flat else max(settings.copy_ahead_bytes, BLOCK_BYTES)
    for piece in pieces(tensor, step):
        for part in range(0, len(piece), PIECE_BYTES):
            view = piece[part : part + PIECE_BYTES]
            sums.update(view)
            file.put(view, len(view))
        if not flat:  # the next piece reuses this one's memory
            file.flush()
    file.settle()
    return sums.finish()


def _put_value(file: File, rows: Rows, row: int, entry: bytes) -> None:
    start = file.position
    if type(entry) is WrapperEntry:
        rows.add(row, start, len(entry), UNKNOWN, UNKNOWN, [])
    else:
        rows.add(row, start, len(entry), start, len(entry), block_sums(entry))
    file.put(entry)
    file.settle()


def _put_transformed(
    file: File, rows: Rows, row: int, data: torch.Tensor | bytes, settings: Settings
) -> None:
    """Write the entry through the stream transforms; sums are of the bytes that are stored."""
    if type(data) is WrapperEntry:
        raise PlanError(
            f"{data.fqn!r} is a DTensor of a wrapper of other tensors, which cannot pass through "
            "stream transforms: save it without them"
        )
    start = file.position
    tap = _Tap(file)
    stream: IO[bytes] = cast(IO[bytes], tap)
    for transform in settings.transforms:
        stream = transform.transform_to(stream)
    if settings.through is not None:
        stream, descriptors = settings.through(row, tap)
        rows.descriptors[row] = tuple(descriptors)
    if isinstance(data, torch.Tensor):
        frame = tensor_frame(data.dtype, tuple(data.shape))
        stream.write(frame.head)
        crc = 0
        for piece in pieces(data, max(settings.copy_ahead_bytes, BLOCK_BYTES)):
            crc = crc32(piece, crc)
            stream.write(piece)
        stream.write(frame.tail(crc))
        file.put(b"", frame.data_nbytes)
    else:
        stream.write(data)
    stream.close()
    length = file.position - start
    if settings.through is not None and not rows.descriptors[row]:
        # The metadata cannot say that it is transformed, so a reader must look up where its data
        # is.
        rows.add(row, start, length, -1, -1, [])
    else:
        rows.add(row, start, length, start, length, tap.sums())


class _Tap(io.RawIOBase):
    """The end of a chain of transforms: passes bytes to the file and hashes them."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._sums = BlockSums()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.position

    def write(self, data: Any, /) -> int:
        view = memoryview(bytes(data))
        self._sums.update(view)
        self._file.put(view)
        self._file.settle()
        return len(view)

    def sums(self) -> list[int]:
        """Checksums of what has passed."""
        return self._sums.finish()


def balance_by_bytes(size_bytes: Ints, bins: int) -> list[list[int]]:
    """The rows in at most `bins` groups of nearly equal bytes, each in the rows' order."""
    if bins <= 1 or len(size_bytes) <= 1:
        return [list(range(len(size_bytes)))]
    # Largest first, each to the emptiest bin (LPT, as in `plan.save`).
    load = [0] * bins
    groups: list[list[int]] = [[] for _ in range(bins)]
    for row in np.argsort(-size_bytes, kind="stable").tolist():
        least = load.index(min(load))
        load[least] += int(size_bytes[row])
        groups[least].append(row)
    return [sorted(group) for group in groups if group]


def written_rows(
    file_rows: Sequence[Rows], names: Sequence[str], settings: Settings
) -> WriteColumns:
    """The rows of all files, in the plan's order."""
    places = [place for rows in file_rows for place in rows.places]
    columns = np.array(places, dtype=np.int64).reshape(-1, 5).T
    order = np.argsort(columns[0])
    _, start, length, data_start, data_nbytes = columns[:, order]
    sums = [block for rows in file_rows for block in rows.sums]
    ordered = [sums[i] for i in order.tolist()]
    counts = np.fromiter(map(len, ordered), np.int64, len(ordered))
    descriptors = tuple(t.get_descriptor() for t in reversed(settings.transforms))
    file = np.repeat(
        np.arange(len(file_rows), dtype=np.int32), [len(rows.places) for rows in file_rows]
    )
    return WriteColumns(
        files=tuple(names),
        file=file[order],
        start=start,
        length=length,
        data_start=data_start,
        data_nbytes=data_nbytes,
        first_sum=row_bounds(counts),
        sums=np.fromiter(chain.from_iterable(ordered), np.uint32),
        transforms=descriptors,
        own_transforms={at: of for rows in file_rows for at, of in rows.descriptors.items()},
    )

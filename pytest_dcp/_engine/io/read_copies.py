"""Copies from files into tensors: several threads, each with its own part of a file.

Every file's copies are sorted by their place in it. A flat box is read straight into the target's
memory, small ones many at a time (see `small_reads`). A strided box is read run by run if its runs
are long, otherwise from slabs of the file that are mapped or read into a staging buffer; so are
targets on another device or of another dtype. Each thread uses `staging_bytes` of memory besides
the targets, and maps at most `window_bytes` plus the rest of the huge pages at both ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.format.shared_names import missing_data_file
from pytest_dcp._engine.io.checked_ranges import ByteCounts, RangeReader, Verify
from pytest_dcp._engine.io.copy_plan import Copies, runs, slabs, span_of, starts
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.small_reads import (
    BATCH,
    SPARSE,
    ReadKind,
    read_together,
    split_by_read_kind,
)
from pytest_dcp._engine.io.tensor_memory import memory_at, memory_of, strided_tensor
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp.errors import CheckpointCorruptError

RUN_BYTES = 4096
"""Runs of at least this size are read one by one; for shorter ones a read costs more than a
copy."""
CHECKED_RUN_BYTES = 1 << 18
"""Runs of at least this size are checked by the blocks inside them."""
STAGING_BYTES = 4 << 20
WINDOW_BYTES = 16 << 20
"""Bytes of a file mapped at a time (cached pages). Smaller windows cost a third more."""
BYTES_PER_THREAD = 16 << 20
"""Below twice this, a second thread costs more than it reads: it must start, and the threads wait
for each other to run Python. It gained from 32 MiB on where every byte came from the page cache."""


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How to read."""

    verify: Verify = "auto"
    threads: int = 1
    """At most."""
    bytes_per_thread: int = 0
    """A thread for each so many bytes of copies, and at least one; 0: all threads for any bytes."""
    staging_bytes: int = STAGING_BYTES
    """Bytes of the file read at a time if it cannot be mapped."""
    window_bytes: int = WINDOW_BYTES
    """Bytes of the file mapped at a time."""
    memory: MemoryLimit = DEFAULT_LIMIT
    """The limit for values that are decompressed or lie in sparse files."""

    def threads_for(self, nbytes: int) -> int:
        """How many threads copy this many bytes.

        >>> ReadSettings(threads=4, bytes_per_thread=100).threads_for(250)
        2
        """
        if not self.bytes_per_thread:
            return self.threads
        return max(1, min(self.threads, nbytes // self.bytes_per_thread))


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """Copies from a checkpoint's files into memory."""

    folder: Folder
    catalog: Catalog
    items: ReadItems
    """The read items that the copies are for."""
    copies: Copies
    settings: ReadSettings
    observer: Observer


def read_copies(request: CopyRequest) -> ByteCounts:
    """Fill every copy's part of its target. Returns the bytes read and checked.

    Raises CheckpointCorruptError naming file, entry and offset.
    """
    catalog, copies = request.catalog, request.copies
    threads = request.settings.threads_for(int(copies.nbytes.sum()))
    places = catalog.places
    file = places.file[copies.entry]
    nowhere = np.flatnonzero((file < 0) & (copies.nbytes > 0))
    if len(nowhere):
        key = catalog.index.key_of[copies.entry[nowhere[0]]]
        raise CheckpointCorruptError("no file has this part", entry=catalog.index.fqns[key])
    place = places.data_start[copies.entry] + copies.from_start
    order = np.lexsort((place, file))
    order = order[copies.nbytes[order] > 0]
    parts = _parts(order, file, copies.nbytes, threads)

    def job(rows: Ints) -> Callable[[StopFlag], ByteCounts]:
        return lambda stop: _read_part(request, rows, stop)

    total = ByteCounts()
    for tally in run_all([job(rows) for rows in parts], threads):
        total.add(tally)
    return total


def _parts(order: Ints, file: NDArray[np.int32], nbytes: Ints, threads: int) -> list[Ints]:
    """Sorted rows in parts of one file each; files are cut where a thread's share ends."""
    if not len(order):
        return []
    start_bytes = nbytes[order].cumsum() - nbytes[order]
    share = start_bytes * max(threads, 1) // max(int(nbytes[order].sum()), 1)
    new = (np.diff(file[order]) != 0) | (np.diff(share) != 0)
    return np.split(order, np.flatnonzero(new) + 1)


def _read_part(request: CopyRequest, rows: Ints, stop: StopFlag) -> ByteCounts:
    catalog, copies, settings = request.catalog, request.copies, request.settings
    name = catalog.places.files[catalog.places.file[copies.entry[rows[0]]]]
    try:
        with request.folder.open(name) as file:
            reader = RangeReader(file, name, catalog, settings.verify, request.observer, stop)
            boxes = _BoxReader(reader, request.items, copies, settings)
            for kind, some in split_by_read_kind(catalog, copies, rows, settings.verify):
                if kind is ReadKind.ALONE:
                    _read_boxes(reader, boxes, copies, some)
                else:
                    read_together(reader, copies, some, kind, settings.window_bytes)
            return reader.tally
    except FileNotFoundError as error:
        key = catalog.index.key_of[copies.entry[rows[0]]]
        raise missing_data_file(name, catalog.index.fqns[key]) from error


def _read_boxes(reader: RangeReader, boxes: _BoxReader, copies: Copies, rows: Ints) -> None:
    """Read them one by one."""
    entry, low = copies.entry[rows].tolist(), copies.from_start[rows].tolist()
    address, nbytes = copies.address[rows].tolist(), copies.nbytes[rows].tolist()
    flat = copies.flat[rows].tolist()
    for n, row in enumerate(rows.tolist()):
        if flat[n]:
            reader.read(entry[n], low[n], memory_at(address[n], nbytes[n]))
        else:
            boxes.read(row)


class _BoxReader:
    """Reads the boxes of one file that are not flat."""

    def __init__(
        self, reader: RangeReader, items: ReadItems, copies: Copies, settings: ReadSettings
    ) -> None:
        self.reader = reader
        self.items = items
        self.copies = copies
        self.settings = settings
        self._staging: torch.Tensor | None = None

    def read(self, row: int) -> None:
        """Fill the part of the target that the row describes."""
        copies = self.copies
        if not copies.address[row] or self.settings.verify == "full":
            self._by_slabs(row, checked=True)
            return
        itemsize = copies.target[row].itemsize
        inner, nbytes = runs(
            copies.shape[row], copies.from_stride[row], copies.to_stride[row], itemsize
        )
        span = span_of(copies.shape[row], copies.from_stride[row], itemsize)
        if nbytes >= CHECKED_RUN_BYTES:
            self._by_runs(row, inner, nbytes)
        elif nbytes < RUN_BYTES or copies.nbytes[row] == span:
            # Runs without a gap between them are read together, and checked.
            self._by_slabs(row, checked=True)
        elif copies.nbytes[row] * SPARSE >= span and self.reader.maps(int(copies.entry[row])):
            self._by_slabs(row, checked=False)
        else:
            self._by_rows(row, inner, nbytes)

    def _by_runs(self, row: int, inner: int, nbytes: int) -> None:
        """Long runs, each read and checked by itself."""
        low, address = self._starts(row, inner)
        for at, to in zip(low, address, strict=True):
            self.reader.read(int(self.copies.entry[row]), at, memory_at(to, nbytes))

    def _by_rows(self, row: int, inner: int, nbytes: int) -> None:
        """Runs of less than a block, with unwanted gaps between them: not checked."""
        copies, reader = self.copies, self.reader
        low, address = self._starts(row, inner)
        for at in range(0, len(low), BATCH):
            reader.stop.check()
            views = [memory_at(to, nbytes) for to in address[at : at + BATCH]]
            reader.rows(int(copies.entry[row]), low[at : at + BATCH], views)
            reader.observer.advance(nbytes * len(views))

    def _starts(self, row: int, inner: int) -> tuple[list[int], list[int]]:
        """Where each run begins in the chunk's data, and its address in memory."""
        copies = self.copies
        outer = copies.shape.shape[1] - inner
        shape = copies.shape[row, :outer]
        low = copies.from_start[row] + starts(shape, copies.from_stride[row, :outer])
        address = copies.address[row] + starts(shape, copies.to_stride[row, :outer])
        return low.tolist(), address.tolist()

    def _by_slabs(self, row: int, *, checked: bool) -> None:
        """Copy the box out of slabs of the file that are in memory, gaps and all."""
        copies = self.copies
        entry = int(copies.entry[row])
        index = self.reader.catalog.index
        dtype = index.properties[index.property_of[index.key_of[entry]]].dtype
        stride = copies.from_stride[row]
        target = self._target(row)
        ndim = int(self.items.ndim[copies.row[row]])
        mapped = target.is_cpu and self.reader.maps(entry)
        limit = self.settings.window_bytes if mapped else self.settings.staging_bytes
        for offset, shape in slabs(copies.shape[row], stride, dtype.itemsize, limit):
            low = int(copies.from_start[row] + (offset * stride).sum())
            nbytes = int(shape.prod()) * dtype.itemsize
            span = span_of(shape, stride, dtype.itemsize)
            source = self._source(entry, low, span, target, nbytes if not checked else None)
            self.reader.observer.advance(nbytes)
            part = target
            for dim in range(ndim):
                part = part.narrow(dim, int(offset[dim]), int(shape[dim]))
            part.copy_(strided_tensor(source, dtype, shape[:ndim], stride[:ndim] // dtype.itemsize))
            del source  # otherwise this window would stay until the next one exists

    def _source(
        self, entry: int, low: int, span: int, target: torch.Tensor, unchecked: int | None
    ) -> memoryview:
        """A span of the entry's data in memory: a window of the file, or read into the buffer.

        unchecked: how many of its bytes are wanted, if the span need not be checked.
        """
        reader = self.reader
        # From pinned memory a copy to a GPU is one DMA.
        window = reader.window(entry, low, span) if target.is_cpu else None
        if window is None:
            window = self._buffer(target, span)
            reader.fetch(entry, low, window)
            return window
        if unchecked is None:
            reader.check(entry, low, window)
        else:
            reader.stop.check()
            reader.tally.read += unchecked
        return window

    def _target(self, row: int) -> torch.Tensor:
        target = self.copies.target[row].detach()
        item = int(self.copies.row[row])
        for dim in range(int(self.items.ndim[item])):
            start, length = int(self.items.to_offset[item, dim]), int(self.copies.shape[row, dim])
            target = target.narrow(dim, start, length)
        return target

    def _buffer(self, target: torch.Tensor, nbytes: int) -> memoryview:
        """Memory for `nbytes`: pinned where the target is on a GPU, so that the copy is one
        DMA."""
        if self._staging is None or self._staging.numel() < nbytes:
            size, pinned = max(self.settings.staging_bytes, nbytes), target.device.type == "cuda"
            self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return memory_of(self._staging)[:nbytes]


def read_values(
    folder: Folder,
    catalog: Catalog,
    entries: Sequence[int],
    settings: ReadSettings,
    observer: Observer,
) -> tuple[dict[int, bytes | memoryview], ByteCounts]:
    """The whole entries of byte values, by row of the catalog.

    Also raises CheckpointCorruptError if a sparse file holds more bytes of values than
    `settings.memory` allows for its occupied space.
    """
    found: dict[int, bytes | memoryview] = {}
    total = ByteCounts()

    def read(reader: RangeReader, rows: Sequence[int]) -> None:
        for row in rows:
            view = memoryview(bytearray(int(catalog.places.data_nbytes[row])))
            reader.read(row, 0, view)
            found[row] = view.toreadonly()
        total.add(reader.tally)

    _visit_values(folder, catalog, entries, settings, observer, read)
    return found, total


def check_values(
    folder: Folder,
    catalog: Catalog,
    entries: Sequence[int],
    settings: ReadSettings,
    observer: Observer,
) -> None:
    """Raise the errors of `read_values` that need no reading, before memory is allocated."""
    _visit_values(folder, catalog, entries, settings, observer, lambda _, __: None)


def _visit_values(
    folder: Folder,
    catalog: Catalog,
    entries: Sequence[int],
    settings: ReadSettings,
    observer: Observer,
    visit: Callable[[RangeReader, Sequence[int]], None],
) -> None:
    """Open each file of these entries, and visit those in it, which lie inside the file."""
    places = catalog.places
    ordered = sorted(entries, key=lambda row: (places.file[row], places.start[row]))
    for number in dict.fromkeys(int(places.file[row]) for row in ordered):
        rows = [row for row in ordered if places.file[row] == number]
        if number < 0:
            fqn = catalog.index.fqns[catalog.index.key_of[rows[0]]]
            raise CheckpointCorruptError("no file has this value", entry=fqn)
        name = places.files[number]
        try:
            with folder.open(name) as file:
                nbytes = int(places.data_nbytes[rows].sum())
                if nbytes > file.stored_bytes:
                    settings.memory.check(f"values in {name}", nbytes, file.stored_bytes)
                reader = RangeReader(file, name, catalog, settings.verify, observer, StopFlag())
                for row in rows:
                    _check_inside(reader, row)
                visit(reader, rows)
        except FileNotFoundError as error:
            raise missing_data_file(name) from error


def _check_inside(reader: RangeReader, row: int) -> None:
    """Raise unless the entry lies in its file: checked before memory is allocated for it."""
    places, size = reader.catalog.places, reader.file.size
    start, nbytes = int(places.data_start[row]), int(places.data_nbytes[row])
    if start + nbytes > size:
        reader.fail(row, 0, f"the entry of {nbytes} bytes leaves the file, which has {size}")

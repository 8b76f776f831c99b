"""Copies from files into tensors: several threads, each with its own part of a file.

Every file's copies are sorted by their place. A flat box is read straight into the target's
memory; a strided one by its runs where they are long, else by spans through a staging buffer, as
are targets on another device or of another dtype. What is held besides the targets is
`staging_bytes` for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from pytest_dcp.checkpoint.plan.boxes import Ints
from pytest_dcp.checkpoint.plan.columns import ReadItems
from pytest_dcp.checkpoint.store.catalog import Catalog
from pytest_dcp.checkpoint.store.disk import Disk
from pytest_dcp.checkpoint.store.memory import memory_at, memory_of, strided
from pytest_dcp.checkpoint.store.observe import Observer
from pytest_dcp.checkpoint.store.ranges import RangeReader, Tally, Verify
from pytest_dcp.checkpoint.store.threads import Stop, run_all
from pytest_dcp.checkpoint.store.transfer import Copies, runs, slabs, span_of, starts
from pytest_dcp.errors import CheckpointCorruptError, CheckpointFileMissingError

RUN_BYTES = 4096
"""Runs from this size on are read one by one; shorter ones cost more to ask for than to copy."""
CHECKED_RUN_BYTES = 1 << 18
"""Runs from this size on are checked by the blocks inside them."""
STAGING_BYTES = 4 << 20
BATCH = 256
"""Small chunks that are read between two looks at whether to go on."""


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How to read."""

    verify: Verify = "auto"
    threads: int = 1
    staging_bytes: int = STAGING_BYTES


def read_copies(
    disk: Disk,
    folder: Any,
    catalog: Catalog,
    items: ReadItems,
    copies: Copies,
    settings: ReadSettings,
    observer: Observer,
) -> Tally:
    """Fill every copy's part of its target; what was read and checked.

    Raises CheckpointCorruptError naming file, entry and offset.
    """
    places = catalog.places
    file = places.file[copies.entry]
    nowhere = np.flatnonzero((file < 0) & (copies.nbytes > 0))
    if len(nowhere):
        key = catalog.index.key_of[copies.entry[nowhere[0]]]
        raise CheckpointCorruptError("no file has this part", entry=catalog.index.fqns[key])
    place = places.data_start[copies.entry] + copies.from_start
    order = np.lexsort((place, file))
    order = order[copies.nbytes[order] > 0]
    parts = _parts(order, file, copies.nbytes, settings.threads)

    def job(rows: Ints) -> Callable[[Stop], Tally]:
        return lambda stop: _read_part(
            disk, folder, catalog, items, copies, rows, settings, observer, stop
        )

    total = Tally()
    for tally in run_all([job(rows) for rows in parts], settings.threads):
        total.add(tally)
    return total


def _parts(order: Ints, file: NDArray[np.int32], nbytes: Ints, threads: int) -> list[Ints]:
    """Sorted rows in parts of one file each, files cut where a thread has had its share."""
    if not len(order):
        return []
    done = nbytes[order].cumsum() - nbytes[order]
    share = done * max(threads, 1) // max(int(nbytes[order].sum()), 1)
    new = (np.diff(file[order]) != 0) | (np.diff(share) != 0)
    return np.split(order, np.flatnonzero(new) + 1)


def _read_part(
    disk: Disk,
    folder: Any,
    catalog: Catalog,
    items: ReadItems,
    copies: Copies,
    rows: Ints,
    settings: ReadSettings,
    observer: Observer,
    stop: Stop,
) -> Tally:
    name = catalog.places.files[catalog.places.file[copies.entry[rows[0]]]]
    try:
        with disk.open(folder, name) as file:
            reader = RangeReader(file, name, catalog, settings.verify, observer, stop)
            boxes = _BoxReader(reader, items, copies, settings)
            blocks = _single_blocks(catalog, copies, rows, settings)
            _read_blocks(reader, copies, rows[blocks])
            _read_boxes(reader, boxes, copies, rows[~blocks])
            return reader.tally
    except FileNotFoundError as error:
        key = catalog.index.key_of[copies.entry[rows[0]]]
        raise CheckpointFileMissingError(
            "the data file is missing", file=name, entry=catalog.index.fqns[key]
        ) from error


def _single_blocks(
    catalog: Catalog, copies: Copies, rows: Ints, settings: ReadSettings
) -> NDArray[np.bool_]:
    """Which copies are a whole chunk of one block, as most small tensors are."""
    places, entry = catalog.places, copies.entry[rows]
    whole = copies.flat[rows] & (copies.nbytes[rows] == places.data_nbytes[entry])
    summed = places.first_sum[entry + 1] - places.first_sum[entry] == 1
    single: NDArray[np.bool_] = whole & summed & (settings.verify != "off")
    return single


def _read_blocks(reader: RangeReader, copies: Copies, rows: Ints) -> None:
    """Read whole chunks of one block, many at a time: one read and one checksum each."""
    places = reader.catalog.places
    for at in range(0, len(rows), BATCH):
        batch = rows[at : at + BATCH]
        entry = copies.entry[batch]
        place, nbytes = places.data_start[entry].tolist(), copies.nbytes[batch].tolist()
        sums = places.sums[places.first_sum[entry]].tolist()
        address = copies.address[batch].tolist()
        read_into = reader.file.read_into
        reader.stop.check()
        for n, size in enumerate(nbytes):
            view = memory_at(address[n], size)
            if read_into(place[n], view) != size or crc32(view) != sums[n]:
                # Again, to say what is wrong with it.
                reader.read(int(entry[n]), 0, view)
        done = sum(nbytes)
        reader.tally.add(Tally(done, done))
        reader.observer.advance(done)


def _read_boxes(reader: RangeReader, boxes: _BoxReader, copies: Copies, rows: Ints) -> None:
    """Read everything else, one by one."""
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
        """Fill the part of the target that the row says."""
        copies = self.copies
        if copies.address[row] and self.settings.verify != "full":
            itemsize = copies.target[row].itemsize
            inner, nbytes = runs(
                copies.shape[row], copies.from_stride[row], copies.to_stride[row], itemsize
            )
            gaps = copies.nbytes[row] < span_of(
                copies.shape[row], copies.from_stride[row], itemsize
            )
            # Runs without a gap between them are read together, and checked.
            if nbytes >= CHECKED_RUN_BYTES or (nbytes >= RUN_BYTES and gaps):
                self._by_runs(row, inner, nbytes)
                return
        self._by_spans(row)

    def _by_runs(self, row: int, inner: int, nbytes: int) -> None:
        copies, reader = self.copies, self.reader
        outer = copies.shape.shape[1] - inner
        shape, entry = copies.shape[row, :outer], int(copies.entry[row])
        low = copies.from_start[row] + starts(shape, copies.from_stride[row, :outer])
        address = copies.address[row] + starts(shape, copies.to_stride[row, :outer])
        read = reader.read if nbytes >= CHECKED_RUN_BYTES else reader.raw
        for at, to in zip(low.tolist(), address.tolist(), strict=True):
            read(entry, at, memory_at(to, nbytes))
        if nbytes < CHECKED_RUN_BYTES:
            reader.stop.check()
            reader.observer.advance(int(copies.nbytes[row]))

    def _by_spans(self, row: int) -> None:
        copies = self.copies
        entry = int(copies.entry[row])
        index = self.reader.catalog.index
        dtype = index.properties[index.property_of[index.key_of[entry]]].dtype
        stride = copies.from_stride[row]
        target = self._target(row)
        ndim = int(self.items.ndim[copies.row[row]])
        limit = max(self.settings.staging_bytes, dtype.itemsize)
        for offset, shape in slabs(copies.shape[row], stride, dtype.itemsize, limit):
            low = int(copies.from_start[row] + (offset * stride).sum())
            view = self._buffer(target, limit)[: span_of(shape, stride, dtype.itemsize)]
            self.reader.fetch(entry, low, view)
            self.reader.observer.advance(int(shape.prod()) * dtype.itemsize)
            steps = stride[:ndim] // dtype.itemsize
            part = target
            for dim in range(ndim):
                part = part.narrow(dim, int(offset[dim]), int(shape[dim]))
            part.copy_(strided(view, dtype, shape[:ndim], steps))

    def _target(self, row: int) -> torch.Tensor:
        target = self.copies.target[row].detach()
        item = int(self.copies.row[row])
        for dim in range(int(self.items.ndim[item])):
            start, length = int(self.items.to_offset[item, dim]), int(self.copies.shape[row, dim])
            target = target.narrow(dim, start, length)
        return target

    def _buffer(self, target: torch.Tensor, nbytes: int) -> memoryview:
        """The staging buffer: pinned where the target is on a GPU, so that the copy is one DMA."""
        if self._staging is None:
            pinned = target.device.type == "cuda"
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return memory_of(self._staging)


def read_values(
    disk: Disk,
    folder: Any,
    catalog: Catalog,
    entries: Sequence[int],
    settings: ReadSettings,
    observer: Observer,
) -> tuple[dict[int, bytes], Tally]:
    """The whole entries of byte values, by row of the catalog."""
    places = catalog.places
    found: dict[int, bytes] = {}
    total = Tally()
    ordered = sorted(entries, key=lambda row: (places.file[row], places.start[row]))
    for number in dict.fromkeys(int(places.file[row]) for row in ordered):
        rows = [row for row in ordered if places.file[row] == number]
        if number < 0:
            fqn = catalog.index.fqns[catalog.index.key_of[rows[0]]]
            raise CheckpointCorruptError("no file has this value", entry=fqn)
        name = places.files[number]
        try:
            with disk.open(folder, name) as file:
                reader = RangeReader(file, name, catalog, settings.verify, observer, Stop())
                for row in rows:
                    found[row] = _value(reader, file.size, catalog, row)
                total.add(reader.tally)
        except FileNotFoundError as error:
            raise CheckpointFileMissingError("the data file is missing", file=name) from error
    return found, total


def _value(reader: RangeReader, size: int, catalog: Catalog, row: int) -> bytes:
    start, nbytes = int(catalog.places.data_start[row]), int(catalog.places.data_nbytes[row])
    if start + nbytes > size:
        # Before memory is taken for it.
        reader.fail(row, 0, f"the entry of {nbytes} bytes leaves the file, which has {size}")
    buffer = bytearray(nbytes)
    reader.read(row, 0, memoryview(buffer))
    return bytes(buffer)

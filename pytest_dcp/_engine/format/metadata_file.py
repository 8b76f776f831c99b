"""A committed checkpoint's `.metadata` file. Pure (no I/O).

Enters and leaves: a catalog and the file's bytes:

    pickle    for torch; `pickle.load` stops at its end (see `metadata_pickle`)
    pages     checksums of the manifest's pages, where it is large (see `page_table`)
    zeros     up to the next multiple of 64
    manifest  for the engine (see `manifest_columns`)
    trailer   48 bytes: where both are, and their checksums (see `metadata_trailer`)

Both parts are in one file, so one rename publishes both and they can
never be from two saves. A file without a trailer is torch's: the engine's own reader reads its
pickle. Two things distinguish it from a file of ours that lost its end: ours says within its first
bytes that a manifest follows, and torch's ends with STOP.

`decode` checks every byte except the pickle's and the page table's, which it does not read;
`verify_pickle` checks those. `open_pages` opens a file that has a page table, and leaves most of
its manifest for later.
"""

from __future__ import annotations

import mmap
from collections.abc import Generator
from typing import NoReturn

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pytest_dcp._engine.format import manifest_columns, page_table
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.catalog_checks import check_catalog
from pytest_dcp._engine.format.checksum import check_crc, crc32
from pytest_dcp._engine.format.manifest_pages import ManifestPages, ReadRange
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.format.metadata_pickle import MARK_OF_OURS, MARK_WITHIN, pickle_metadata
from pytest_dcp._engine.format.metadata_trailer import (
    ALIGNMENT,
    MAGIC,
    TRAILER_BYTES,
    Trailer,
    check_gap,
    check_parts,
    read_trailer,
)
from pytest_dcp._engine.format.page_table import PageTable
from pytest_dcp._engine.format.paged_catalog import PagedManifest
from pytest_dcp._engine.unpickle import read_metadata
from pytest_dcp.errors import CheckpointCorruptError
from pytest_dcp.garbage_collection import collector_paused

_STOP = ord(".")
VERIFIED_AT_ONCE = 8 << 20
"""Bytes of a pickle that are in memory while it is verified."""

FileBytes = bytes | bytearray | memoryview | mmap.mmap


def encode(catalog: Catalog) -> list[bytes]:
    """The parts of the file, to be written one after the other."""
    columns = manifest_columns.encode(catalog)
    stock = pickle_metadata(catalog)
    table = page_table.make_table(columns)
    pages = b"" if table is None else table.pack()
    length = len(stock) + len(pages)
    gap = bytes(-length % ALIGNMENT)
    trailer = Trailer(
        manifest_crc=crc32(columns) if table is None else table.sums[-1],
        manifest_start=length + len(gap),
        manifest_length=len(columns),
        pickle_length=length,
        pickle_crc=crc32(pages, crc32(stock)),
    )
    return [stock, pages, gap, columns, trailer.pack()]


def decode(data: FileBytes, limit: MemoryLimit = DEFAULT_LIMIT) -> Catalog:
    """The catalog of a `.metadata` file, of this engine or of torch.

    Its arrays are read-only views of `data` where the file has a manifest.

    Raises:
        CheckpointCorruptError: the file is damaged, cut off, or holds things that no checkpoint
        holds.
    """
    view = memoryview(data)
    trailer = _trailer(view)
    if trailer is None:
        return _decode_torchs(view)
    start = trailer.manifest_start
    part = view[start : start + trailer.manifest_length]
    check_crc("the manifest", part, trailer.manifest_crc, start)
    try:
        return manifest_columns.decode(part, lambda: _checked_pickle(view, trailer), limit)
    except CheckpointCorruptError as error:
        raise error.at(offset=start) from None


def read_by_ranges(
    size: int, stored_bytes: int | None = None, limit: MemoryLimit = DEFAULT_LIMIT
) -> Generator[tuple[int, int], memoryview, Catalog]:
    """A generator that returns the catalog of a `.metadata` file of `size` bytes.

    It yields the offset and the length of each range that it needs, and must be sent the bytes:
    fewer where the file ends early. Like `decode`, but does not need the pickle, which is most of
    the file, if there is a manifest. Allocates memory only within `limit`. stored_bytes: the size
    of the file's blocks on disk; None: its size.
    """
    stored = size if stored_bytes is None else stored_bytes
    at = size - TRAILER_BYTES
    tail = (yield at, TRAILER_BYTES) if at >= 0 else memoryview(b"")
    if tail[: len(MAGIC)] != MAGIC:
        # Before memory is allocated for it: a sparse file of any size takes no room on disk.
        _check_torchs(memoryview(bytes((yield 0, MARK_WITHIN)) + bytes(tail)))
        limit.check("a pickle", size, stored)
        return decode((yield 0, size), limit)
    trailer = read_trailer(tail, at)
    start, length = trailer.manifest_start, trailer.pickle_length
    check_parts(trailer, at)
    limit.check("a pickle and a manifest", size, stored)
    check_gap((yield length, start - length), length)
    part = yield start, trailer.manifest_length
    check_crc("the manifest", part, trailer.manifest_crc, start)
    try:
        try:
            return manifest_columns.decode(part, _want_pickle, limit)
        except _PickleWantedError:
            pickle = yield 0, length
        return manifest_columns.decode(part, lambda: _checked_pickle(pickle, trailer), limit)
    except CheckpointCorruptError as error:
        raise error.at(offset=start) from None


def open_pages(
    read: ReadRange, size: int, stored_bytes: int, limit: MemoryLimit = DEFAULT_LIMIT
) -> PagedManifest | None:
    """The manifest of a `.metadata` file, of which only the keys are read; None for a file that
    must be read whole, by `read_by_ranges`.

    read: reads from the file; it is called whenever something is read that was not needed before.

    Raises CheckpointCorruptError if a part that is read is damaged.
    """
    at = size - TRAILER_BYTES
    if size < page_table.TABLE_FROM_BYTES:
        return None
    tail = _read_range(read, at, TRAILER_BYTES)
    if tail[: len(MAGIC)] != MAGIC:
        return None
    trailer = read_trailer(tail, at)
    check_parts(trailer, at)
    table = _read_table(read, trailer)
    if table is None:
        return None
    start, length = trailer.manifest_start, trailer.manifest_length
    limit.check("a pickle and a manifest", size, stored_bytes)

    pages = ManifestPages(read, start, length, table)
    try:
        opened = manifest_columns.open_keys(pages.view, pages.fill_range, limit)
    except CheckpointCorruptError as error:
        raise error.at(offset=start) from None
    if opened is None:
        return None

    def read_all() -> Catalog:
        part = _read_range(read, start, length)
        check_crc("the manifest", part, trailer.manifest_crc, 0)
        return manifest_columns.decode_chunks(part, opened)

    return PagedManifest(pages, opened, read_all, start)


def _read_table(read: ReadRange, trailer: Trailer) -> PageTable | None:
    """The page table, if there is one; the zeros behind it are checked, too."""
    end, manifest_bytes = trailer.pickle_length, trailer.manifest_length
    foot_start = end - page_table.FOOT_BYTES
    if foot_start < 0 or not manifest_bytes:
        return None
    foot = _read_range(read, foot_start, trailer.manifest_start - foot_start)
    check_gap(foot[page_table.FOOT_BYTES :], end)
    length = page_table.length_in_foot(foot[: page_table.FOOT_BYTES], end, manifest_bytes)
    if length is None:
        return None
    return PageTable.unpack(_read_range(read, end - length, length), manifest_bytes, end)


def _read_range(read: ReadRange, offset: int, nbytes: int) -> memoryview:
    """The bytes of the file, fewer where it ends early."""
    view = np.empty(nbytes, dtype=np.uint8).data
    return view[: read(offset, view)]


class _PickleWantedError(Exception):
    """The manifest could not hold everything: the rest is in the pickle."""


def _want_pickle() -> NoReturn:
    raise _PickleWantedError


def verify_pickle_of(read: ReadRange, size: int) -> None:
    """As `verify_pickle`, of a file of `size` bytes that is read in parts."""
    at = size - TRAILER_BYTES
    tail = _read_range(read, max(at, 0), TRAILER_BYTES)
    if at < 0 or tail[: len(MAGIC)] != MAGIC:
        return
    trailer = read_trailer(tail, at)
    length, crc = trailer.pickle_length, 0
    for start in range(0, length, VERIFIED_AT_ONCE):
        crc = crc32(_read_range(read, start, min(VERIFIED_AT_ONCE, length - start)), crc)
    if crc != trailer.pickle_crc:
        raise CheckpointCorruptError(
            f"expected CRC-32 {trailer.pickle_crc:#010x} of the pickle for torch ({length} bytes), "
            f"got {crc:#010x}: the file is damaged, and torch may not read it",
            offset=0,
        )


def verify_pickle(data: FileBytes) -> None:
    """Check that the pickle for torch, and the page table, are the ones that were written.

    A file written by torch has no checksum for it.

    Raises:
        CheckpointCorruptError: it differs, or the trailer with its checksum is damaged.
    """
    view = memoryview(data)
    trailer = _trailer(view)
    if trailer is not None:
        check_crc("the pickle", view[: trailer.pickle_length], trailer.pickle_crc, 0)


def _checked_pickle(view: memoryview, trailer: Trailer) -> Metadata:
    part = view[: trailer.pickle_length]
    check_crc("the pickle", part, trailer.pickle_crc, 0)
    return read_metadata(part)


def _decode_torchs(view: memoryview) -> Catalog:
    with collector_paused():
        metadata = read_metadata(view, to_the_end=True)
        _check_dimensions(metadata)
        try:
            catalog = Catalog.of(metadata)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise CheckpointCorruptError(
                f"expected chunks and places that fit together in torch's metadata, got "
                f"{error!r:.200}"
            ) from error
        # Its objects, up to a million, are freed here, before the garbage collector runs again.
        del metadata
    check_catalog(catalog)
    return catalog


def _check_dimensions(metadata: Metadata) -> None:
    """Check that chunks have their tensor's number of dimensions: the columns cannot show it
    later."""
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
                    raise CheckpointCorruptError(
                        f"expected chunks of {len(entry.size)} dimensions, got offset "
                        f"{tuple(chunk.offsets)} and shape {tuple(chunk.sizes)}",
                        entry=fqn,
                    )


def _trailer(view: memoryview) -> Trailer | None:
    """The trailer, or None for a file of torch."""
    at = len(view) - TRAILER_BYTES
    if at < 0 or view[at : at + len(MAGIC)] != MAGIC:
        _check_torchs(view)
        return None
    trailer = read_trailer(view[at:], at)
    check_parts(trailer, at)
    length, start = trailer.pickle_length, trailer.manifest_start
    check_gap(view[length:start], length)
    return trailer


def _check_torchs(view: memoryview) -> None:
    if MARK_OF_OURS in bytes(view[:MARK_WITHIN]):
        raise CheckpointCorruptError(
            "expected a trailer at the file's end, since a manifest follows the pickle, got none: "
            "the file was cut off or its end is damaged",
            offset=len(view),
        )
    if not len(view) or view[-1] != _STOP:
        raise CheckpointCorruptError(
            f"expected a .metadata file that ends with a pickle's STOP, got {bytes(view[-1:])!r}: "
            "the file was cut off or damaged",
            offset=max(len(view) - 1, 0),
        )

"""The page table of a large manifest: checksums by which single pages of it are checked.

Opening a checkpoint of a million chunks must not read all of its manifest. So where the manifest
has at least `TABLE_FROM_BYTES`, a table lies behind the pickle for torch, as the last bytes of what
the trailer calls the pickle. Neither `pickle.load` nor older versions of this reader look there:
both stop at the pickle's STOP. All numbers are little-endian:

    sums        n u4   CRC-32 of the manifest from its first byte to the end of each page
    page_bytes  u4     bytes of a page; the last one may be shorter
    CRC-32      u4     of the bytes before
    magic       8

n follows from `page_bytes` and the manifest's length, which the trailer has. The sums before and
after a page check that page alone, as with the blocks of a tensor's data, so the table and the
checksum of the whole manifest, which is the last sum, take one pass. Pure (no I/O).

A file without the magic is read whole, as is a shorter manifest. So damage to the magic costs time
and nothing else; damage to the rest of the table is an error.

>>> manifest = bytes(range(256)) * 20
>>> table = PageTable.of(manifest, page_bytes=4096)
>>> table.sums[-1] == crc32(manifest)
True
>>> PageTable.unpack(memoryview(table.pack()), len(manifest), end=0) == table
True
>>> table.check_page(1, memoryview(manifest)[4096:], start=4096)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from pytest_dcp._engine.format.checksum import check_crc, crc32
from pytest_dcp.errors import CheckpointCorruptError

MAGIC = b"\x89DCPpag\n"
"""Like PNG's: it is not text, and any conversion of line ends damages it."""
TABLE_FROM_BYTES = 1 << 20
"""A shorter manifest is read and checked in less than a millisecond: of some 13,000 chunks."""
PAGE_BYTES = 1 << 16
"""A page of 64 KiB is read and checked in some 15 microseconds, of which two thirds depend on its
size; the table has 4 bytes for each."""
LEAST_PAGE_BYTES = 1 << 12
"""A table of smaller pages, which only a hostile file can have, would take longer than its
manifest."""
_FOOT = struct.Struct("<II8s")
FOOT_BYTES = _FOOT.size


@dataclass(frozen=True, slots=True)
class PageTable:
    """The checksums of a manifest's pages."""

    page_bytes: int
    sums: tuple[int, ...]
    """Of the manifest from its first byte to the end of each page."""

    @classmethod
    def of(cls, manifest: bytes, page_bytes: int) -> PageTable:
        """The table of a manifest of at least one byte."""
        view, sums, crc = memoryview(manifest), [], 0
        for start in range(0, len(view), page_bytes):
            crc = crc32(view[start : start + page_bytes], crc)
            sums.append(crc)
        return cls(page_bytes, tuple(sums))

    def pack(self) -> bytes:
        """The table's bytes."""
        body = np.array(self.sums, "<u4").tobytes() + struct.pack("<I", self.page_bytes)
        return body + struct.pack("<I8s", crc32(body), MAGIC)

    @classmethod
    def unpack(cls, packed: memoryview, manifest_bytes: int, end: int) -> PageTable:
        """The table of a manifest of this length, from all of its bytes. end: where they end in
        the file.

        Raises CheckpointCorruptError if they are damaged.
        """
        page_bytes, crc, _ = _FOOT.unpack(packed[-FOOT_BYTES:])
        start = end - len(packed)
        if len(packed) != packed_length(manifest_bytes, page_bytes):
            raise CheckpointCorruptError(
                f"expected a page table of {packed_length(manifest_bytes, page_bytes)} bytes, got "
                f"{len(packed)}: the file was cut off or damaged",
                offset=start,
            )
        check_crc("the page table", packed[: -FOOT_BYTES + 4], crc, start)
        sums = np.frombuffer(packed[:-FOOT_BYTES], "<u4")
        return cls(page_bytes, tuple(sums.tolist()))

    def check_page(self, number: int, page: memoryview, start: int) -> None:
        """Check the bytes of a page. start: its offset, for the error.

        Raises CheckpointCorruptError naming the page.
        """
        before = self.sums[number - 1] if number else 0
        check_crc(f"page {number} of the manifest", page, self.sums[number], start, before)


def packed_length(manifest_bytes: int, page_bytes: int) -> int:
    """Bytes of the table of a manifest with pages of this size."""
    return -(-manifest_bytes // page_bytes) * 4 + FOOT_BYTES


def make_table(manifest: bytes) -> PageTable | None:
    """The table of a manifest that is long enough to have one."""
    return PageTable.of(manifest, PAGE_BYTES) if len(manifest) >= TABLE_FROM_BYTES else None


def table_bytes(manifest_bytes: int) -> int:
    """Bytes of the table that `make_table` makes for a manifest of this length."""
    return packed_length(manifest_bytes, PAGE_BYTES) if manifest_bytes >= TABLE_FROM_BYTES else 0


def length_in_foot(foot: memoryview, end: int, manifest_bytes: int) -> int | None:
    """Bytes of the table that ends with this foot at `end`; None if there is none.

    Raises CheckpointCorruptError for a foot that no table has.
    """
    if len(foot) != FOOT_BYTES or foot[-len(MAGIC) :] != MAGIC:
        return None
    page_bytes, _, _ = _FOOT.unpack(foot)
    if page_bytes < LEAST_PAGE_BYTES or packed_length(manifest_bytes, page_bytes) > end:
        raise CheckpointCorruptError(
            f"expected pages of {LEAST_PAGE_BYTES} bytes or more, whose table lies in the {end} "
            f"bytes before, got pages of {page_bytes}: the file is damaged",
            offset=end - FOOT_BYTES,
        )
    return packed_length(manifest_bytes, page_bytes)

"""Pure (no I/O): changes that are not yet on stable storage, and the parts of a torn write.

A crash loses some of the changes; see `disk_model` for their life and `losses` for the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

SECTORS = (512, 4096)
"""Sizes of the units that a disk writes atomically, on older and newer disks."""
BORDERS = 6
"""Number of sector borders of each size at which a write is torn: half of them its first, half its
last.
"""


@dataclass(frozen=True, slots=True)
class NameChange:
    """A name bound to a node, or removed, and not known to be stable."""

    operation: int
    """Its index in the trace."""
    ended_ns: int
    folder: int
    name: str
    node: int | None
    needs_bytes: bool = False
    """It cannot become stable before the bytes that the node had then."""


@dataclass(frozen=True, slots=True)
class ByteChange:
    """A write (data), or a new size (no data), not known to be stable."""

    operation: int
    ended_ns: int
    node: int
    offset: int
    """Of a write, else the new size."""
    data: bytes | None
    grows_only: bool = False
    """For an allocation: a lower bound of the size, not the size itself."""

    def apply(self, content: bytes) -> bytes:
        """The content after the change."""
        if self.data is not None:
            start = content[: self.offset].ljust(self.offset, b"\0")
            return start + self.data + content[self.offset + len(self.data) :]
        if self.grows_only:
            return content.ljust(self.offset, b"\0")
        return content[: self.offset].ljust(self.offset, b"\0")

    def zero_fill(self, content: bytes) -> bytes:
        """The content when the size has grown and the bytes have not arrived."""
        return content.ljust(self.offset + len(self.data or b""), b"\0")


def torn_at(offset: int, nbytes: int) -> tuple[int, ...]:
    """Numbers of bytes after which a write is torn, from 1 to one less than all.

    After the first byte, in the middle, before the last byte, and at borders of sectors.
    """
    places = {1, nbytes // 2, nbytes - 1}
    for sector in SECTORS:
        borders = range(sector - offset % sector, nbytes, sector)
        places |= {*borders[: BORDERS // 2], *borders[-(BORDERS // 2) :]}
    return tuple(sorted(place for place in places if 0 < place < nbytes))

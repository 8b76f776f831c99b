"""The checksums of an entry's data: the running CRC-32 at the end of each block.

Blocks are counted from the data's start, whatever the pieces in which it comes.

>>> sums = BlockSums()
>>> for piece in (b"a" * 100_000, b"b"):
...     sums.update(memoryview(piece))
>>> [hex(crc) for crc in sums.finish()] == [hex(crc) for crc in block_sums(b"a" * 100_000 + b"b")]
True
>>> len(sums.finish()), block_sums(b"")
(2, [])
"""

from __future__ import annotations

from pytest_dcp._engine.format.catalog import BLOCK_BYTES
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.io.disk import Buffer


class BlockSums:
    """The sums of data that comes piece by piece."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._crc = 0
        self._filled = 0
        """Bytes of the current block."""

    def update(self, piece: memoryview) -> None:
        """Sum the next bytes."""
        at = 0
        while at < len(piece):
            until = min(at + BLOCK_BYTES - self._filled, len(piece))
            self._crc = crc32(piece[at:until], self._crc)
            self._filled = (self._filled + until - at) % BLOCK_BYTES
            at = until
            if not self._filled:
                self._sums.append(self._crc)

    def finish(self) -> list[int]:
        """The sums, the last one of a block that may be short."""
        return [*self._sums, *([self._crc] if self._filled else [])]


def block_sums(data: Buffer) -> list[int]:
    """The sums of data that is there as a whole."""
    sums = BlockSums()
    sums.update(memoryview(data))
    return sums.finish()

"""Ranges of entries' data, read and checked.

A range is checked by the blocks that it covers completely: the catalog has the checksum before the
first and the one after the last. At its ragged ends the range covers only parts of blocks. The rest
of these blocks is read too if it is small (compared with the range, or because the whole chunk is
one block), and always for `full`.

Files of checkpoints with checksums are written once, under unique names, so it is safe to map
windows of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.io.disk import In
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.threads import StopFlag
from pytest_dcp.errors import CheckpointCorruptError

Verify = Literal["auto", "full", "off"]

PIECE_BYTES = 1 << 18
"""Bytes read and summed at a time: still in a core's own cache when they are summed. Of 1 MiB the
first part has left it by then, and the sum takes twice as long."""
UNCHECKED_BYTES = 16 << 20
"""Bytes read at a time without a sum: in longer calls the kernel copies faster."""
WINDOW_PIECE_BYTES = 1 << 20
"""Bytes of a window summed at a time: they come from memory in any case."""
EXTEND_FROM_BYTES = 16 << 20
"""Ranges of at least this size are extended to whole blocks for `auto` too: on average by two
halves of a block of 64 KiB, 0.4 % of the range."""


@dataclass(slots=True)
class ByteCounts:
    """Bytes of data so far."""

    read: int = 0
    verified: int = 0

    def add(self, other: ByteCounts) -> None:
        """Count another's as well."""
        self.read += other.read
        self.verified += other.verified


class RangeReader:
    """Reads ranges of the entries of one open file. For one thread."""

    def __init__(
        self,
        file: In,
        name: str,
        catalog: Catalog,
        verify: Verify,
        observer: Observer,
        stop: StopFlag,
    ) -> None:
        self.file = file
        self.name = name
        self.catalog = catalog
        self.verify = verify
        self.observer = observer
        self.stop = stop
        self.tally = ByteCounts()
        self._carry: tuple[int, int, int] | None = None
        """Where the last range ended, if inside a block whose beginning it had read: entry, end,
        and the sum up to there."""

    def read(self, entry: int, low: int, view: memoryview) -> None:
        """Fill the view from byte `low` of the entry's data, all of which is wanted.

        Raises CheckpointCorruptError where the file is too short or a checksum differs.
        """
        self.fetch(entry, low, view)
        self.observer.advance(len(view))

    def fetch(self, entry: int, low: int, view: memoryview) -> None:
        """Like `read`, for bytes of which only some may be wanted: the caller reports progress."""
        places = self.catalog.places
        nbytes = int(places.data_nbytes[entry])
        if len(view) == nbytes <= places.block_bytes and self._checks(entry):
            # Most small tensors: one block, one sum, one read.
            self.raw(entry, 0, view)
            if crc32(view) != places.sums[places.first_sum[entry]]:
                self.fail(entry, 0, "the checksum differs")
            self.tally.verified += nbytes
        else:
            self._take(entry, low, len(view), self._fill_by_pieces(entry, low, view))

    def check(self, entry: int, low: int, window: memoryview) -> None:
        """Check a window of the entry's data, from byte `low`, as if it had been read."""
        self._take(entry, low, len(window), _cut(low, window))
        self.tally.read += len(window)

    def window(self, entry: int, low: int, nbytes: int) -> memoryview | None:
        """Bytes of the entry's data as memory, unchecked; None if they must be read."""
        if not self.maps(entry):
            return None
        return self.file.window(int(self.catalog.places.data_start[entry]) + low, nbytes)

    def maps(self, entry: int) -> bool:
        """Whether this entry can be mapped: its file was written once, under a unique name, and is
        never truncated."""
        return self.file.maps and self._has_sums(entry)

    def raw(self, entry: int, low: int, view: memoryview) -> None:
        """Fill the view without a check."""
        read_bytes = self.file.read_into(int(self.catalog.places.data_start[entry]) + low, view)
        if read_bytes != len(view):
            self.fail(
                entry, low + read_bytes, f"the file ends here, {len(view) - read_bytes} bytes early"
            )
        self.tally.read += read_bytes

    def rows(self, entry: int, lows: Sequence[int], views: Sequence[memoryview]) -> None:
        """Fill each view from its byte of the entry's data, without a check."""
        start = int(self.catalog.places.data_start[entry])
        read_bytes = self.file.read_rows([start + low for low in lows], views)
        if read_bytes != sum(map(len, views)):
            self.fail(entry, self.file.size - start, "the file ends here, too early")
        self.tally.read += read_bytes

    def fail(self, entry: int, low: int, reason: str) -> None:
        """Raise CheckpointCorruptError naming file, entry and the offset in the file."""
        index = self.catalog.index
        raise CheckpointCorruptError(
            reason,
            file=self.name,
            entry=index.fqns[index.key_of[entry]],
            offset=int(self.catalog.places.data_start[entry]) + low,
        )

    def _has_sums(self, entry: int) -> bool:
        first: Any = self.catalog.places.first_sum
        return bool(first[entry + 1] > first[entry])

    def _checks(self, entry: int) -> bool:
        return self.verify != "off" and self._has_sums(entry)

    def _fill_by_pieces(
        self, entry: int, low: int, view: memoryview
    ) -> Iterator[tuple[int, memoryview]]:
        """Fill the view piece by piece; yields where each piece begins in the entry's data, and the
        piece."""
        step = PIECE_BYTES if self._checks(entry) else UNCHECKED_BYTES
        step = max(step, self.file.request_bytes)
        for at in range(0, len(view), step):
            piece = view[at : at + step]
            self.raw(entry, low + at, piece)
            yield low + at, piece

    def _take(
        self, entry: int, low: int, nbytes: int, pieces: Iterator[tuple[int, memoryview]]
    ) -> None:
        """Check the pieces as they are filled."""
        have = int(self.catalog.places.data_nbytes[entry])
        if low + nbytes > have:
            self.fail(entry, low, f"asks for bytes past the data, which has {have}")
        if self._checks(entry):
            self._check(entry, low, low + nbytes, pieces)
            return
        for _ in pieces:
            self.stop.check()

    def _check(
        self, entry: int, low: int, high: int, pieces: Iterator[tuple[int, memoryview]]
    ) -> None:
        """Check every block that the pieces complete, together with the bytes read just before.

        The sums are cumulative: the state at `start` and the one at `end` check all blocks between.
        """
        places = self.catalog.places
        block, nbytes = places.block_bytes, int(places.data_nbytes[entry])
        one_block = nbytes <= block
        extend = self.verify == "full" or one_block or high - low >= EXTEND_FROM_BYTES
        crc, start, carried = self._begin(entry, low, extend)
        last = -(-high // block) if extend or high == nbytes else high // block
        end = min(last * block, nbytes)
        # Two running sums: `whole` up to the end of the last block checked, `rest` to the range's
        # end.
        whole = rest = crc
        for begin, piece in pieces:
            self.stop.check()
            until = begin + len(piece)
            if begin < end:
                whole = rest = _run_checksum(
                    piece, begin, max(begin, start), min(until, end), whole
                )
            # Bytes after the last whole block, kept for the next read.
            rest = _run_checksum(piece, begin, max(begin, start, end), until, rest)
        if end > high:
            whole = crc32(self._extra(entry, high, end), whole)
        if start < end:
            if whole != self._sum(entry, last - 1):
                self._find_damage(entry, start // block, last, nbytes)
            self.tally.verified += min(end, high) - max(start, low) + carried
        self._carry = (entry, high, rest) if end < high and start <= high else None

    def _begin(self, entry: int, low: int, extend: bool) -> tuple[int, int, int]:
        """The running checksum; where it continues, at or after `low`; and how many bytes before
        `low` it covers: bytes that the last range read but could not check alone.
        """
        block = self.catalog.places.block_bytes
        first, inside = divmod(low, block)
        if self._carry is not None and self._carry[:2] == (entry, low):
            return self._carry[2], low, inside
        if not inside:
            return self._sum(entry, first - 1), low, 0
        if extend:
            before = self._extra(entry, first * block, low)
            return crc32(before, self._sum(entry, first - 1)), low, 0
        return self._sum(entry, first), (first + 1) * block, 0

    def _sum(self, entry: int, block: int) -> int:
        """The running checksum after a block; 0 before the first."""
        if block < 0:
            return 0
        return int(self.catalog.places.sums[self.catalog.places.first_sum[entry] + block])

    def _extra(self, entry: int, low: int, high: int) -> memoryview:
        view = memoryview(bytearray(high - low))
        self.raw(entry, low, view)
        return view

    def _find_damage(self, entry: int, first: int, last: int, nbytes: int) -> None:
        """Raise for the first block that differs from the one that was written."""
        size = self.catalog.places.block_bytes
        # Read again, block by block: the running sum shows that something differs, but not where.
        for block in range(first, last):
            data = self._extra(entry, block * size, min((block + 1) * size, nbytes))
            if crc32(data, self._sum(entry, block - 1)) != self._sum(entry, block):
                self.fail(entry, block * size, "the checksum of the block that starts here differs")
        self.fail(entry, first * size, "the checksum differed once and not when read again")


def _cut(low: int, window: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The pieces of the window, and where each begins in the entry's data."""
    for at in range(0, len(window), WINDOW_PIECE_BYTES):
        yield low + at, window[at : at + WINDOW_PIECE_BYTES]


def _run_checksum(piece: memoryview, begin: int, low: int, high: int, crc: int) -> int:
    """Continue the checksum over bytes `low` to `high` of a piece that begins at `begin`."""
    return crc32(piece[low - begin : high - begin], crc) if low < high else crc

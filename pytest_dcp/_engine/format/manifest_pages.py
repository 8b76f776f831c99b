"""The bytes of a manifest, read and checked page by page when they are needed.

They are read into memory, never mapped: a mapped file that is cut off meanwhile would end the
process with SIGBUS, where a read reports that bytes are missing. No page is read twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

from pytest_dcp._engine.format.page_table import PageTable
from pytest_dcp.errors import CheckpointCorruptError

ReadRange = Callable[[int, memoryview], int]
"""Fills memory from an offset of a file; returns the bytes read, fewer where the file ends."""


class ManifestPages:
    """Memory for a manifest, which is filled with checked pages. For one thread at a time."""

    def __init__(self, read: ReadRange, start: int, length: int, table: PageTable) -> None:
        """start: of the manifest in the file. length: its bytes, at least one."""
        self.pages_read = self._not_counted = 0
        self._read = read
        self._start = start
        self._table = table
        self._is_filled = bytearray(len(table.sums))
        # Untouched pages of it take no memory. An array of numpy would, since its memory comes in
        # huge pages, each of which is filled with zeros when its first byte is touched.
        # Private: a forked process must not write into this one's pages.
        self._memory = memoryview(mmap.mmap(-1, length, access=mmap.ACCESS_COPY))
        self.view = self._memory.toreadonly()
        """The manifest's bytes; meaningless where `fill_range` has not been called for them."""

    @property
    def part_read(self) -> float:
        """Which part of all pages has been read since `start_count`."""
        return (self.pages_read - self._not_counted) / len(self._is_filled)

    def start_count(self) -> None:
        """Do not count the pages that have been read until now."""
        self._not_counted = self.pages_read

    def fill_range(self, start: int, end: int) -> None:
        """Read and check the pages of these bytes, unless that was done before.

        Raises CheckpointCorruptError naming a damaged page, with its offset in the manifest.
        """
        if start >= end:
            return
        page_bytes = self._table.page_bytes
        first, stop = start // page_bytes, -(-end // page_bytes)
        for low, high in self._missing_runs(first, stop):
            self._fill(low, high)

    def _missing_runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The pages from `first` to `stop` that have not been read, in runs."""
        filled = self._is_filled
        while (low := filled.find(0, first, stop)) >= 0:
            high = filled.find(1, low, stop)
            first = stop if high < 0 else high
            yield low, first

    def _fill(self, low: int, high: int) -> None:
        page_bytes = self._table.page_bytes
        run = self._memory[low * page_bytes : high * page_bytes]
        at = low * page_bytes
        if self._read(self._start + at, run) != len(run):
            raise CheckpointCorruptError(
                f"expected {len(run)} bytes of the manifest, got fewer: the file was cut off",
                offset=at,
            )
        for number in range(low, high):
            begin = (number - low) * page_bytes
            self._table.check_page(number, run[begin : begin + page_bytes], at + begin)
            self._is_filled[number] = 1
            self.pages_read += 1

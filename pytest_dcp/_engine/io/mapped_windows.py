"""Windows: bytes of an open file as memory of this process, safe to look at.

Copying a small part out of mapped pages costs less than a system call. But if a page is not
available, because the file was truncated or the disk fails, accessing it raises SIGBUS and ends the
process. So a window is handed out only once all of its pages are in memory; otherwise the caller
reads, and gets an ordinary error. This holds as long as nothing truncates the file, so windows are
for files that are never written again.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from functools import cache

import numpy as np

if sys.platform == "linux":
    import fcntl

HUGE_PAGE_BYTES = 2 << 20
"""The size on x86-64 and, with pages of 4 KiB, arm64. If the page cache holds a file in pages of
this size (ext4 since Linux 6.16, xfs), each is mapped by one entry of the page table."""
MADV_POPULATE_READ = 22
"""Of Linux 5.14; the mmap module of Python 3.11 has no name for it."""
AROUND_BYTES = 64 << 10
"""Reading an unmapped page also maps this many bytes of the cached pages around it (fault-around,
Linux 3.15)."""
TOUCHED_FROM_BYTES = 1 << 20
"""Shorter windows are populated page by page, since there is little to save."""
IOV_MAX = 1024
"""Buffers that one writev takes (POSIX asks for 16, Linux and macOS have 1024)."""
PAGEMAP = "/proc/self/pagemap"
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_PRESENT = 1 << 3
"""Of linux/fs.h."""


class Windows:
    """Windows of one open file, for one thread; to be closed."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._sink = -1
        """Where touched bytes go: a file in memory."""
        self._pagemap = -1

    def close(self) -> None:
        """Close the file; windows given to callers stay valid."""
        for fd in (self._sink, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._sink = self._pagemap = -1

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        """These bytes as memory, to be dropped soon; None if they cannot be mapped."""
        end = offset + nbytes
        if not nbytes or end > self.size or sys.platform != "linux":
            return None
        # Mapped from huge page to huge page, as the cache may hold it.
        low = offset - offset % HUGE_PAGE_BYTES
        first = offset - offset % mmap.PAGESIZE - low
        try:
            # torch only accepts writable memory; private pages never reach the file.
            length = min(end + -end % HUGE_PAGE_BYTES, self.size) - low
            pages = mmap.mmap(self.fd, length, access=mmap.ACCESS_COPY, offset=low)
            if nbytes < TOUCHED_FROM_BYTES or not self._touch(pages, first, end - low):
                # Linux only: elsewhere the window would not be safe.
                pages.madvise(MADV_POPULATE_READ, first, end - low - first)
        except (OSError, ValueError):
            return None
        # The view keeps the mapping alive; it goes with the last view.
        return memoryview(pages)[offset - low : end - low]

    def _touch(self, pages: mmap.mmap, first: int, end: int) -> bool:
        """Map the pages by touching some of them; returns whether all are mapped then.

        Takes a third of the time of MADV_POPULATE_READ, which goes from page to page. The kernel
        does the touching: pwritev(2) fails where a read would raise SIGBUS. Pages that were not in
        the cache, or were locked, stay unmapped.
        """
        if not tells_what_is_mapped():
            return False
        view = memoryview(pages)
        start = np.frombuffer(view, dtype=np.uint8).ctypes.data
        try:
            if self._pagemap < 0:
                self._pagemap = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
            if self._sink < 0:
                self._sink = os.memfd_create("touched", os.MFD_CLOEXEC)
            # A huge page needs one touch; if there are no huge pages, the first touch shows it.
            for each in (HUGE_PAGE_BYTES, max(AROUND_BYTES, mmap.PAGESIZE)):
                touched = [first, *range(first + each - (start + first) % each, end, each)]
                for at in range(0, len(touched), IOV_MAX):
                    os.pwritev(self._sink, [view[n : n + 1] for n in touched[at : at + IOV_MAX]], 0)
                if all_mapped(self._pagemap, start + first, start + end):
                    return True
        except OSError:
            pass
        return False


@cache
def tells_what_is_mapped() -> bool:
    """Whether this system reports which pages are present, and has files in memory."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return False
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 1
    start = np.frombuffer(page, dtype=np.uint8).ctypes.data
    try:
        pagemap = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return all_mapped(pagemap, start, start + 1)
    except OSError:
        return False
    finally:
        os.close(pagemap)


def all_mapped(pagemap: int, start: int, end: int) -> bool:
    """Whether all pages of these addresses are present. Raises OSError if that cannot be found out.

    Asks for the first run of pages that are not present: the struct pm_scan_arg of PAGEMAP_SCAN
    (ioctl_pagemap_scan(2), Linux 6.7).
    """
    found = np.zeros(3, dtype=np.uint64)  # a struct page_region
    end += -end % mmap.PAGESIZE
    # Categories of pages: inverted, all, any, and the ones to report.
    categories = (_PAGE_IS_PRESENT, _PAGE_IS_PRESENT, 0, _PAGE_IS_PRESENT)
    scan = struct.pack("<12Q", 96, 0, start, end, 0, found.ctypes.data, 1, 0, *categories)
    if sys.platform != "linux":
        raise OSError("no PAGEMAP_SCAN")
    runs: int = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(scan))
    return not runs

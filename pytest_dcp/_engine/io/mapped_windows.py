"""Windows: bytes of an open file as memory of this process, safe to look at.

Many small parts are copied out of mapped pages for less than a call of the system each. But where
a page cannot be had, because the file was cut short or the disk fails, an access is a SIGBUS and
the end of the process. So a window is given out only once all of its pages are there; else the
caller reads, and gets the error by its name. That holds as long as nothing cuts the file short, so
windows are for files that are never written again.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from functools import cache

import numpy as np

HUGE_PAGE_BYTES = 2 << 20
"""Of x86-64 and, with pages of 4 KiB, arm64. A cache that has a file in pages of this size (ext4
since Linux 6.16, xfs) maps each by one entry of the page table."""
MADV_POPULATE_READ = 22
"""Of Linux 5.14; the mmap module of Python 3.11 has no name for it."""
AROUND_BYTES = 64 << 10
"""A read of a page that is not mapped also maps the cache's pages around it, this many bytes of
them (fault-around, Linux 3.15)."""
TOUCHED_FROM_BYTES = 1 << 20
"""Shorter windows are populated page by page: there is little to save."""
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
        """These bytes as memory, to be dropped soon; None where they are not to be had so."""
        end = offset + nbytes
        if not nbytes or end > self.size:
            return None
        # Mapped from huge page to huge page, as the cache may hold it.
        low = offset - offset % HUGE_PAGE_BYTES
        first = offset - offset % mmap.PAGESIZE - low
        try:
            # torch only accepts writable memory; private pages never reach the file.
            length = min(end + -end % HUGE_PAGE_BYTES, self.size) - low
            pages = mmap.mmap(self.fd, length, access=mmap.ACCESS_COPY, offset=low)
            if nbytes < TOUCHED_FROM_BYTES or not self._touch(pages, first, end - low):
                pages.madvise(MADV_POPULATE_READ, first, end - low - first)
        except (OSError, ValueError):
            return None
        # The view keeps the mapping, and the last one takes it along.
        return memoryview(pages)[offset - low : end - low]

    def _touch(self, pages: mmap.mmap, first: int, end: int) -> bool:
        """Map the pages by touching some of them; whether all are there then.

        A third of what MADV_POPULATE_READ takes, which goes from page to page. The touching is
        done by the kernel: pwritev(2) fails where a read would be a SIGBUS. Not mapped by it are
        pages that were not in the cache, or that somebody had locked.
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
            # A huge page needs one touch, and that there are none is seen at the first.
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
    """Whether this system says which pages are there, and has files in memory."""
    if not hasattr(os, "memfd_create"):
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
    """Whether no page of these addresses is missing. Raises OSError where that cannot be found out.

    Asks for the first run of pages that are not present: the struct pm_scan_arg of PAGEMAP_SCAN
    (ioctl_pagemap_scan(2), Linux 6.7).
    """
    found = np.zeros(3, dtype=np.uint64)  # a struct page_region
    end += -end % mmap.PAGESIZE
    asked = (_PAGE_IS_PRESENT, _PAGE_IS_PRESENT, 0, _PAGE_IS_PRESENT)  # inverted, all, any, told
    scan = struct.pack("<12Q", 96, 0, start, end, 0, found.ctypes.data, 1, 0, *asked)
    runs: int = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(scan))
    return not runs

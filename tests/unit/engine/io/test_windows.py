"""Windows of files: their contents; every page is resident before a window is handed out."""

import errno
import mmap
import os
import random
import sys

import numpy as np
import pytest

from pytest_dcp._engine.io import mapped_windows as subject
from pytest_dcp._engine.io.mapped_windows import Windows

HUGE = subject.HUGE_PAGE_BYTES
TOUCHED = subject.TOUCHED_FROM_BYTES
SIZE = 2 * HUGE + 19_999

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux only")


@pytest.fixture(scope="module")
def content():
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def opened(tmp_path, content):
    """The windows of a file of this content, and its descriptor."""
    (tmp_path / "f").write_bytes(content)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    windows = Windows(fd, SIZE)
    yield windows
    windows.close()
    os.close(fd)


@pytest.fixture
def populated(monkeypatch):
    """How often pages were populated one by one."""
    calls = []

    class Noted(mmap.mmap):
        def madvise(self, option, start=0, length=0):
            calls.append((option, start, length))
            return super().madvise(option, start, length)

    monkeypatch.setattr(subject.mmap, "mmap", Noted)
    return calls


def missing(view):
    """Pages of the view that are not mapped."""
    start = np.frombuffer(view, dtype=np.uint8).ctypes.data
    first, last = start // mmap.PAGESIZE, -(-(start + len(view)) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first)), dtype=np.uint64)
    return int((entries >> np.uint64(63) == 0).sum())


PLACES = [
    *[(0, SIZE), (1, 1), (4095, 2), (4096, 4096), (SIZE - 1, 1), (HUGE - 1, 2)],
    *[(HUGE, HUGE), (HUGE + 5000, HUGE), (2 * HUGE, 1), (2 * HUGE + 4097, 15_902)],
    *[(0, TOUCHED), (4097, TOUCHED), (65_535, TOUCHED + 1), (HUGE - 1, TOUCHED + 65_537)],
]


@pytest.mark.parametrize(("low", "nbytes"), PLACES)
def test_a_window_is_the_file_whole_and_its_writes_stay_inside(
    low, nbytes, opened, content, tmp_path
):
    window = opened.window(low, nbytes)
    assert missing(window) == 0
    assert window == content[low : low + nbytes]
    window[0] ^= 1
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize(("low", "nbytes"), [(SIZE - 1, 2), (0, SIZE + 1), (SIZE, 1), (0, 0)])
def test_there_is_no_window_past_the_end_or_of_nothing(low, nbytes, opened):
    assert opened.window(low, nbytes) is None


@pytest.mark.parametrize("left", [0, 1, 5_000, TOUCHED - 1, SIZE - 5_000])
def test_a_file_that_was_cut_short_is_not_mapped(left, opened, tmp_path):
    os.truncate(tmp_path / "f", left)
    assert opened.window(0, SIZE) is None
    assert opened.window(left - left % mmap.PAGESIZE, SIZE - left) is None


def test_pages_of_the_cache_are_mapped_by_touching_some(opened, populated, content):
    if not subject.tells_what_is_mapped():
        pytest.skip("this system cannot say which pages are mapped (Linux before 6.7)")
    # More than once: a page that somebody has locked is not mapped at once.
    found = [opened.window(0, SIZE) for _ in range(5)]
    assert all(missing(window) == 0 for window in found)
    assert len(populated) < 5


@pytest.mark.parametrize("around", [1 << 20, SIZE])
def test_pages_that_touching_did_not_map_are_populated(
    around, opened, populated, content, monkeypatch
):
    """As on a system that maps fewer pages around one, or where some are not in the cache."""
    monkeypatch.setattr(subject, "AROUND_BYTES", around)
    window = opened.window(0, SIZE)
    # An even larger part may have been mapped at once; then there was nothing to populate.
    assert missing(window) == 0
    assert window == content


def gone(*_):
    raise OSError(errno.ENOTTY, "no such ioctl")


@pytest.mark.parametrize(
    "lacks",
    [
        lambda m: m.setattr(subject.fcntl, "ioctl", gone),
        lambda m: m.setattr(subject.os, "pwritev", gone),
        lambda m: m.setattr(subject.os, "open", gone),
        lambda m: m.delattr(subject.os, "memfd_create"),
        lambda m: m.setattr(subject, "all_mapped", lambda *_: False),
    ],
    ids=["no PAGEMAP_SCAN", "no touching", "no /proc", "no memfds", "some missing"],
)
def test_without_touching_every_page_is_populated(lacks, opened, populated, content, monkeypatch):
    subject.tells_what_is_mapped.cache_clear()
    try:
        with monkeypatch.context() as patch:
            lacks(patch)
            windows = [opened.window(5000, TOUCHED) for _ in range(2)]
    finally:
        subject.tells_what_is_mapped.cache_clear()
    assert populated == [(subject.MADV_POPULATE_READ, 4096, TOUCHED + 5000 - 4096)] * 2
    for window in windows:
        assert missing(window) == 0
        assert window == content[5000 : 5000 + TOUCHED]


def test_all_mapped_finds_a_single_page_that_is_not():
    if not subject.tells_what_is_mapped():
        pytest.skip("this system cannot say which pages are mapped (Linux before 6.7)")
    pages = mmap.mmap(-1, 64 * mmap.PAGESIZE)
    start = np.frombuffer(pages, dtype=np.uint8).ctypes.data
    pages[:] = b"x" * len(pages)
    with open("/proc/self/pagemap", "rb") as pagemap:
        ask = lambda low, high: subject.all_mapped(pagemap.fileno(), low, high)  # noqa: E731
        assert ask(start, start + len(pages))
        pages.madvise(mmap.MADV_DONTNEED, 63 * mmap.PAGESIZE, mmap.PAGESIZE)
        assert not ask(start, start + len(pages))
        assert not ask(start + 60 * mmap.PAGESIZE, start + 63 * mmap.PAGESIZE + 1)
        assert ask(start, start + 63 * mmap.PAGESIZE)


def test_opened_files_are_closed_and_windows_outlive_them(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    windows = Windows(fd, SIZE)
    window = windows.window(0, SIZE)
    windows.close()
    windows.close()
    os.close(fd)
    assert window == content
    del window
    assert len(os.listdir("/proc/self/fd")) == before

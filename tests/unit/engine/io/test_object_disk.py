"""File systems of fsspec as a disk: requests to them, and the use of their answers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import object_disk
from pytest_dcp._engine.io.object_disk import GAP_BYTES, GET_BYTES, ObjectDisk, renames, spans

BYTES = bytes(range(251)) * 8


class Counting(MemoryFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Files of one test; records what is fetched."""

    cachable = False

    def __init__(self) -> None:
        super().__init__(global_store=False)
        self.gets: list[tuple[int | None, int | None]] = []

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self.gets.append((start, end))
        content: bytes = super().cat_file(path, start, end)
        return content


@pytest.fixture
def fs() -> Counting:
    return Counting()


@pytest.fixture
def disk(fs: Counting) -> ObjectDisk:
    return ObjectDisk(fs, {"url://folder": "/folder"})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_disk, "ONE_PUT_BYTES", 100)
    monkeypatch.setattr(object_disk, "GET_BYTES", 64)
    monkeypatch.setattr(object_disk, "GAP_BYTES", 16)


def put(disk: ObjectDisk, name: str, parts: Iterable[bytes]) -> None:
    with disk.create("url://folder", name) as out:
        for part in parts:
            out.write([part])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 2000])
def test_written_objects_are_read(disk: ObjectDisk, length: int) -> None:
    put(disk, "f", [BYTES[: length // 2], BYTES[length // 2 : length]])
    assert disk.names("url://folder") == ["f"]
    assert disk.exists("url://folder", "f")
    with disk.open("url://folder", "f") as file:
        assert file.size == length
        for start, size in ((0, length), (length // 3, 5), (length - 1, 1), (length, 3)):
            view = memoryview(bytearray(size))
            got = file.read_into(max(start, 0), view)
            assert bytes(view[:got]) == BYTES[:length][max(start, 0) : max(start, 0) + size]


def test_a_buffer_may_be_used_again_as_soon_as_it_is_written(disk: ObjectDisk) -> None:
    buffer = bytearray(b"one")
    with disk.create("url://folder", "f") as out:
        out.write([memoryview(buffer)])
        buffer[:] = b"two"
        out.write([buffer])
    with disk.open("url://folder", "f") as file:
        view = memoryview(bytearray(6))
        assert file.read_into(0, view) == 6
        assert bytes(view) == b"onetwo"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("written", [10, 500])
def test_a_file_that_fails_is_not_there(disk: ObjectDisk, written: int) -> None:
    def failing() -> Iterator[bytes]:
        yield BYTES[:written]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        put(disk, "f", failing())
    assert disk.names("url://folder") == []


class Upload(io.BytesIO):
    """A file that is sent in parts and made by closing it."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[str] = []

    def discard(self) -> None:
        self.ends.append("discarded")

    def close(self) -> None:
        self.ends.append("completed")
        super().close()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fails", [True, False])
def test_an_upload_is_completed_only_when_the_file_is_whole(
    disk: ObjectDisk, fs: Counting, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    upload = Upload()
    monkeypatch.setattr(fs, "open", lambda path, mode: upload)

    def parts() -> Iterator[bytes]:
        yield BYTES[:500]
        if fails:
            raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            put(disk, "f", parts())
    else:
        put(disk, "f", parts())
    assert upload.ends == ["discarded" if fails else "completed"]


@pytest.mark.usefixtures("small")
def test_metadata_are_put_whole_however_long_they_are(disk: ObjectDisk, fs: Counting) -> None:
    put(disk, "__3.metadata", [b"old"])
    before = fs.store["/folder/__3.metadata"]
    with disk.create("url://folder", "__3.metadata") as out:
        out.write([BYTES[:500]])
        assert fs.store["/folder/__3.metadata"] is before
    with disk.open("url://folder", "__3.metadata") as file:
        fs.gets.clear()
        view = memoryview(bytearray(500))
        assert file.read_into(0, view[:250]) + file.read_into(250, view[250:]) == 500
        assert bytes(view) == BYTES[:500]
        assert fs.gets == []


def test_removing_a_missing_object_does_nothing(disk: ObjectDisk) -> None:
    disk.remove("url://folder", "f")
    put(disk, "f", [b"x"])
    disk.remove("url://folder", "f")
    assert not disk.exists("url://folder", "f")


def test_a_missing_file_is_a_file_not_found_error(disk: ObjectDisk) -> None:
    for name in ("f", ".metadata"):
        with pytest.raises(FileNotFoundError), disk.open("url://folder", name):
            pass


def refuse_to_tell(patch: pytest.MonkeyPatch) -> None:
    """A store that answers no question about a file, by fsspec's own `exists`."""

    def info(self: Any, path: str, **keywords: Any) -> Any:
        raise OSError("503 Slow Down")

    patch.setattr(MemoryFileSystem, "exists", AbstractFileSystem.exists)
    patch.setattr(MemoryFileSystem, "info", info)


def test_a_refused_request_does_not_mean_that_a_file_is_missing(
    disk: ObjectDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(disk, "there", [b"1"])
    assert disk.exists("url://folder", "there")
    assert not disk.exists("url://folder", "other")
    refuse_to_tell(monkeypatch)
    with pytest.raises(OSError, match="503 Slow Down"):
        disk.exists("url://folder", "there")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_refused_request_does_not_let_a_save_overwrite(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    writer = dcp.FsspecWriter(url, overwrite=False)
    dcp.save({"w": torch.ones(2)}, storage_writer=writer)
    with pytest.MonkeyPatch.context() as patch:
        refuse_to_tell(patch)
        with pytest.raises(OSError, match="503 Slow Down"):
            dcp.save({"w": torch.zeros(2)}, storage_writer=writer)
    state = {"w": torch.zeros(2)}
    dcp.load(state, checkpoint_id=url)
    assert torch.equal(state["w"], torch.ones(2))


def test_a_refused_request_does_not_mean_that_a_url_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text would then be that there is no checkpoint."""
    url = f"memory://{tmp_path.name}/one.safetensors"
    fsspec.filesystem("memory").pipe_file(url, save({"w": torch.ones(2)}))
    with dcp.open(url) as opened:
        assert list(opened) == ["w"]
    answers = MemoryFileSystem.info
    refusals = [OSError("503 Slow Down")]

    def refuse_once(self: Any, path: str, **keywords: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return answers(self, path, **keywords)

    monkeypatch.setattr(MemoryFileSystem, "isfile", AbstractFileSystem.isfile)
    monkeypatch.setattr(MemoryFileSystem, "info", refuse_once)
    with pytest.raises(OSError, match="503 Slow Down"):
        dcp.open(url)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_that_may_not_be_asked_about_is_opened_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}"
    dcp.save({"w": torch.ones(2)}, checkpoint_id=url)
    answers = MemoryFileSystem.info

    def forbid_folders(self: Any, path: str, **keywords: Any) -> Any:
        if path.strip("/").endswith(tmp_path.name):
            raise PermissionError(path)
        return answers(self, path, **keywords)

    monkeypatch.setattr(MemoryFileSystem, "info", forbid_folders)
    with dcp.open(url) as opened:
        assert list(opened) == ["w"]


def test_reads_near_each_other_are_fetched_ahead(disk: ObjectDisk, fs: Counting) -> None:
    put(disk, "f", [BYTES])
    with disk.open("url://folder", "f") as file:
        for start in range(0, 2000, 20):
            view = memoryview(bytearray(8))
            assert file.read_into(start, view) == 8
            assert bytes(view) == BYTES[start : start + 8]
    assert len(fs.gets) <= 2


def test_a_read_far_from_the_last_fetches_only_its_own_bytes(
    disk: ObjectDisk, fs: Counting
) -> None:
    put(disk, "f", [bytes(3 * GAP_BYTES)])
    with disk.open("url://folder", "f") as file:
        file.read_into(2 * GAP_BYTES, memoryview(bytearray(8)))
    assert fs.gets == [(2 * GAP_BYTES, 2 * GAP_BYTES + 8)]


@pytest.mark.usefixtures("small")
@given(rows=st.lists(st.tuples(st.integers(0, 2100), st.integers(0, 40)), max_size=20))
def test_rows_equal_the_bytes_of_the_file(rows: list[tuple[int, int]]) -> None:
    disk = ObjectDisk(Counting(), {"url://folder": "/folder"})
    put(disk, "f", [BYTES])
    views = [memoryview(bytearray(size)) for _, size in rows]
    with disk.open("url://folder", "f") as file:
        got = file.read_rows([start for start, _ in rows], views)
    expected = [BYTES[start : start + size] for start, size in rows]
    assert got == sum(map(len, expected))
    for view, part in zip(views, expected, strict=True):
        assert bytes(view[: len(part)]) == part


@given(
    st.lists(
        st.tuples(st.integers(-GAP_BYTES, 3 * GAP_BYTES), st.integers(0, GET_BYTES + 10)),
        min_size=1,
    )
)
def test_rows_are_got_together_where_little_lies_between(rows: list[tuple[int, int]]) -> None:
    offsets: list[int] = []
    at = 0
    for gap, size in rows:
        offsets.append(max(at + gap, 0))
        at = offsets[-1] + size
    nbytes = [size for _, size in rows]
    ends = [offset + size for offset, size in zip(offsets, nbytes, strict=True)]
    found = list(spans(offsets, nbytes))
    assert [row for first, last, _, _ in found for row in range(first, last)] == list(
        range(len(rows))
    )
    for number, (first, last, low, high) in enumerate(found):
        assert low == offsets[first] == min(offsets[first:last])
        assert high == max(ends[first:last])
        assert last == first + 1 or high - low <= GET_BYTES
        gaps = [offsets[n] - max(ends[first:n]) for n in range(first + 1, last)]
        assert all(gap <= GAP_BYTES for gap in gaps)
        if number and low >= found[number - 1][2]:
            _, _, before, until = found[number - 1]
            assert low - until > GAP_BYTES or max(ends[first], until) - before > GET_BYTES


def test_one_part_that_is_asked_for_often_is_got_once() -> None:
    assert list(spans([7] * 50, [100] * 50)) == [(0, 50, 7, 107)]


def test_only_some_file_systems_rename() -> None:
    assert not renames(MemoryFileSystem())
    assert renames(LocalFileSystem())

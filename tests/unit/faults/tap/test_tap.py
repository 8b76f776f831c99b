"""The tap sees all operations below a watched root, by any way, and no others."""

from __future__ import annotations

import builtins
import io
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_dcp.faults.tap import os_calls as calls
from pytest_dcp.faults.tap import watch_operations
from pytest_dcp.faults.tap.operation import Alternative, Operation, Replace, Shorten, Skip, Verdict


class Notes:
    """Records its calls, and answers with the given verdict."""

    def __init__(self, verdict: Callable[[Operation], Verdict | None] = lambda _: None) -> None:
        self.asked: list[Operation] = []
        self.done: list[Operation] = []
        self.verdict = verdict

    def before(self, operation: Operation) -> Verdict | None:
        self.asked.append(operation)
        return self.verdict(operation)

    def after(self, operation: Operation) -> None:
        self.done.append(operation)

    @property
    def short(self) -> list[str]:
        return [f"{op.kind} {op.path}" + (f" > {op.to}" if op.to else "") for op in self.done]


@contextmanager
def noted(
    root: Path, verdict: Callable[[Operation], Verdict | None] = lambda _: None
) -> Iterator[Notes]:
    notes = Notes(verdict)
    with watch_operations([root], notes):
        yield notes


def on(kind: str, verdict: Verdict) -> Callable[[Operation], Verdict | None]:
    return lambda operation: verdict if operation.kind == kind else None


def test_a_buffered_file_appears_as_the_writes_that_reach_the_kernel(tmp_path: Path) -> None:
    with noted(tmp_path) as notes, (tmp_path / "f").open("wb", buffering=16) as file:
        file.write(b"0123456789")
        assert notes.short == ["create f"]
        file.write(b"0123456789")
        file.flush()
        os.fsync(file.fileno())
        file.truncate(5)
    assert notes.short[-2:] == ["truncate f", "close f"]
    written = [op for op in notes.done if op.kind == "write"]
    assert b"".join(op.data or b"" for op in written) == b"01234567890123456789"
    assert written[0].offset == 0
    assert "sync f" in notes.short
    assert len({op.handle for op in notes.done}) == 1


def test_every_way_of_writing_is_seen(tmp_path: Path) -> None:
    with noted(tmp_path) as notes:
        fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
        assert os.write(fd, b"ab") == 2
        assert os.writev(fd, [b"c", memoryview(b"de")]) == 3
        assert os.pwrite(fd, b"X", 0) == 1
        assert os.pwritev(fd, [b"Y", b"Z"], 6) == 2
        os.posix_fallocate(fd, 0, 20)
        os.ftruncate(fd, 10)
        os.fdatasync(fd)
        copy = os.dup(fd)
        os.close(fd)
        os.write(copy, b"f")
        os.close(copy)
    assert (tmp_path / "f").read_bytes() == b"XbcdefYZ\0\0"
    assert [op.offset for op in notes.done if op.kind == "write"] == [0, 2, 0, 6, 5]
    assert notes.short == [
        "create f", *["write f"] * 4, "allocate f", "truncate f", "sync f", "close f",
        "write f", "close f",
    ]  # fmt: skip


def test_every_way_of_reading_is_seen(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    with noted(tmp_path) as notes:
        fd = os.open(tmp_path / "f", os.O_RDONLY)
        one, two = bytearray(2), bytearray(3)
        assert os.readv(fd, [one, two]) == 5
        assert (one, two) == (b"01", b"234")
        assert os.read(fd, 2) == b"56"
        assert os.pread(fd, 3, 1) == b"123"
        assert os.preadv(fd, [one], 8) == 2
        assert one == b"89"
        os.close(fd)
        assert (tmp_path / "f").read_text() == "0123456789"
        with open(tmp_path / "f") as file:
            assert list(file) == ["0123456789"]
    reads = [op for op in notes.done if op.kind == "read"]
    assert [(op.offset, op.nbytes) for op in reads[:4]] == [(0, 5), (5, 2), (1, 3), (8, 2)]


def test_names_and_folders_are_seen(tmp_path: Path) -> None:
    with noted(tmp_path) as notes:
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "f").touch()
        (tmp_path / "f").replace(tmp_path / "a" / "g")
        os.renames(tmp_path / "a" / "g", tmp_path / "h")
        os.link(tmp_path / "h", tmp_path / "i")
        (tmp_path / "s").symlink_to("i")
        assert sorted(os.listdir(tmp_path)) == ["a", "h", "i", "s"]
        (tmp_path / "h").unlink()
        fd = os.open(tmp_path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        shutil.rmtree(tmp_path / "a")
    assert [note for note in notes.short if not note.startswith(("list", "open", "close"))] == [
        "make_folder a", "make_folder a/b", "create f", "rename f > a/g", "rename a/g > h",
        "link h > i", "link s > s", "remove h", "sync_folder .", "remove_folder a/b",
        "remove_folder a",
    ]  # fmt: skip
    assert "list ." in notes.short


def test_copies_inside_the_kernel_are_reads_and_writes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    with noted(tmp_path) as notes:
        shutil.copyfile(tmp_path / "f", tmp_path / "g")
        with (tmp_path / "f").open("rb") as one, (tmp_path / "h").open("wb", 0) as other:
            assert os.copy_file_range(one.fileno(), other.fileno(), 30) == 30
            assert os.copy_file_range(one.fileno(), other.fileno(), 30) == 30
    assert (tmp_path / "g").read_bytes() == b"abc" * 1000
    assert (tmp_path / "h").read_bytes() == b"abc" * 20
    assert {"read f", "write g", "write h"} <= set(notes.short)


def test_temporary_files_and_descriptors_as_files_are_seen(tmp_path: Path) -> None:
    with noted(tmp_path) as notes:
        with tempfile.NamedTemporaryFile(dir=tmp_path, delete=False) as file:
            file.write(b"x")
        os.unlink(file.name)
        fd = os.open(tmp_path / "g", os.O_WRONLY | os.O_CREAT)
        with os.fdopen(fd, "w") as text:
            text.write("line\n")
    kinds = [op.kind for op in notes.done]
    assert sorted(kinds) == ["close", "close", "create", "create", "remove", "write", "write"]


def test_appending_returns_the_position(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    with noted(tmp_path) as notes, (tmp_path / "f").open("a") as file:
        file.write("6")
    assert [(op.kind, op.offset) for op in notes.done][:2] == [("open", None), ("write", 5)]
    assert (tmp_path / "f").read_bytes() == b"123456"


@pytest.mark.parametrize("mode", ["r+b", "w+b", "a+b", "x+b", "r+", "w", "rb", "ab", "xb"])
@pytest.mark.parametrize("buffering", [-1, 0, 1, 7])
def test_watched_files_behave_as_files_do(tmp_path: Path, mode: str, buffering: int) -> None:
    """The same steps on a watched file and on another one give the same."""
    if (buffering == 0 and "b" not in mode) or (buffering == 1 and "b" in mode):
        pytest.skip("no such file object")

    def steps(path: Path) -> list[Any]:
        said: list[Any] = []
        with open(path, mode, buffering) as file:
            payload: Any = b"hello world\n" if "b" in mode else "hello world\n"
            for step in (
                lambda: file.tell(), lambda: file.read(3), lambda: file.write(payload),
                lambda: file.flush(), lambda: file.seek(2), lambda: file.read(4),
                lambda: file.truncate(9), lambda: file.seek(0), lambda: file.readline(),
                lambda: file.read(), lambda: file.mode, lambda: type(file).__mro__[-3],
            ):  # fmt: skip
                try:
                    said.append(step())
                except (OSError, ValueError) as error:
                    said.append(type(error))
        return [*said, file.closed, path.read_bytes()]

    for name in ("plain", "watched"):
        (tmp_path / name).mkdir()
        if "x" not in mode:
            (tmp_path / name / "f").write_bytes(b"first line\nsecond\n")
    with noted(tmp_path / "watched") as notes:
        watched = steps(tmp_path / "watched" / "f")
    assert watched == steps(tmp_path / "plain" / "f")
    assert notes.done


@pytest.mark.parametrize("mode", ["", "q", "rw", "rbt", "b", "rr", "r++"])
def test_a_wrong_mode_is_the_same_error(tmp_path: Path, mode: str) -> None:
    (tmp_path / "f").touch()
    with noted(tmp_path) as notes, pytest.raises(ValueError, match="mode"):
        open(tmp_path / "f", mode)  # noqa: SIM115 - it never opens
    assert not notes.done


def test_operations_outside_the_folder_are_not_seen(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with noted(tmp_path / "in") as notes:
        (tmp_path / "in2").mkdir()
        (tmp_path / "out").write_bytes(b"x")
        assert (tmp_path / "out").read_bytes() == b"x"
        with open(tmp_path / "out") as file:
            assert type(file.buffer.raw) is io.FileIO
        read, write = os.pipe()
        os.write(write, b"x")
        os.close(read)
        os.close(write)
    assert notes.asked == []


def test_a_way_through_a_link_is_seen_under_the_real_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    with noted(tmp_path / "alias") as notes:
        (tmp_path / "real" / "a").touch()
        (tmp_path / "alias" / "b").touch()
        assert len(os.listdir(tmp_path / "alias")) == 2
        (tmp_path / "real" / ".." / "alias" / "a").unlink()
    assert [note for note in notes.short if "close" not in note] == [
        "create a", "create b", "list .", "remove a",
    ]  # fmt: skip


def test_a_file_that_comes_in_or_leaves_has_an_absolute_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "f").write_bytes(b"bytes")
    with noted(tmp_path / "in") as notes:
        (tmp_path / "f").rename(tmp_path / "in" / "f")
        (tmp_path / "in" / "f").rename(tmp_path / "g")
    assert notes.short == [f"rename {tmp_path}/f > f", f"rename f > {tmp_path}/g"]
    assert notes.done[0].data == b"bytes"


def test_a_number_that_is_another_file_by_now_is_not_taken_for_the_first(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with noted(tmp_path / "in") as notes:
        fd = os.open(tmp_path / "in" / "f", os.O_WRONLY | os.O_CREAT)
        calls.real.close(fd)  # behind the tap's back
        again = calls.real.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
        assert again == fd
        os.write(again, b"x")
        os.close(again)
    assert notes.short == ["create f"]


def test_everything_is_put_back_when_the_last_block_ends(tmp_path: Path) -> None:
    names = [name for name in calls.REPLACED if hasattr(os, name)]
    before = [getattr(os, name) for name in names]
    sets = [set(able) for able in (os.supports_dir_fd, os.supports_fd)]
    opens = (builtins.open, io.open)
    with noted(tmp_path):
        with noted(tmp_path), pytest.raises(KeyError):
            raise KeyError
        assert os.open is calls.open
        assert os.unlink in os.supports_dir_fd
    assert [getattr(os, name) for name in names] == before
    assert (builtins.open, io.open) == opens
    assert [set(able) for able in (os.supports_dir_fd, os.supports_fd)] == sets


def test_a_file_that_outlives_the_block_goes_on_working(tmp_path: Path) -> None:
    with noted(tmp_path) as notes:
        file = (tmp_path / "f").open("w")
    file.write("late")
    file.close()
    assert (tmp_path / "f").read_text() == "late"
    assert notes.short == ["create f"]


def test_each_watcher_sees_its_own_roots(tmp_path: Path) -> None:
    for name in ("a", "a/b", "c"):
        (tmp_path / name).mkdir()
    two = Notes()
    with (
        noted(tmp_path / "a" / "b") as one,
        watch_operations([tmp_path / "c", tmp_path / "a"], two),
    ):
        (tmp_path / "a" / "b" / "f").touch()
        (tmp_path / "c" / "g").touch()
    assert one.short == ["create f", "close f"]
    assert [(op.root, op.path) for op in two.done][::2] == [(1, "b/f"), (0, "g")]


def test_threads_are_distinguished_and_nothing_is_lost(tmp_path: Path) -> None:
    def writes(number: int) -> None:
        for n in range(50):
            (tmp_path / f"{number}-{n}").write_bytes(b"x" * n)

    with noted(tmp_path) as notes:
        threads = [threading.Thread(target=writes, args=(n,), name=f"t{n}") for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    creates = [op for op in notes.done if op.kind == "create"]
    assert len(creates) == 200
    assert all(op.thread == f"t{op.path[0]}" for op in creates)
    assert all(0 < op.started_ns <= op.ended_ns for op in notes.done)


# ---- verdicts


def test_an_error_of_before_reaches_the_caller_and_nothing_is_done(tmp_path: Path) -> None:
    def refuse(operation: Operation) -> None:
        raise OSError(28, "no room")

    with noted(tmp_path, refuse) as notes, pytest.raises(OSError, match="no room"):
        (tmp_path / "f").touch()
    assert not (tmp_path / "f").exists()
    assert notes.done == []


def test_a_close_that_fails_has_closed(tmp_path: Path) -> None:
    def refuse(operation: Operation) -> None:
        if operation.kind == "close":
            raise OSError(5, "lost")

    with noted(tmp_path, refuse):
        fd = os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="lost"):
            os.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_shortened_write_is_taken_up_by_the_caller(tmp_path: Path) -> None:
    with noted(tmp_path, on("write", Shorten(3))) as notes:
        with (tmp_path / "f").open("wb") as file:
            file.write(b"0123456789")
        fd = os.open(tmp_path / "g", os.O_WRONLY | os.O_CREAT)
        assert os.write(fd, b"01234") == 3
        os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert [op.nbytes for op in notes.done if op.kind == "write"] == [3, 3, 3, 1, 3]


def test_a_skipped_write_leaves_a_hole(tmp_path: Path) -> None:
    skips = iter([Skip(), None])
    with noted(tmp_path, lambda op: next(skips) if op.kind == "write" else None) as notes:
        fd = os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
        assert os.write(fd, b"ab") == 2
        assert os.write(fd, b"cd") == 2
        os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"\0\0cd"
    assert notes.short == ["create f", "write f", "close f"]


def test_a_skipped_sync_pretends_success(tmp_path: Path) -> None:
    with noted(tmp_path, on("sync", Skip())) as notes, (tmp_path / "f").open("wb") as file:
        os.fsync(file.fileno())
    assert "sync f" not in notes.short


def test_an_opening_cannot_be_skipped(tmp_path: Path) -> None:
    with noted(tmp_path, on("create", Skip())), pytest.raises(TypeError, match="instead of create"):
        (tmp_path / "f").touch()


def test_replaced_bytes(tmp_path: Path) -> None:
    with noted(tmp_path, on("write", Replace(b"other"))) as notes:
        fd = os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
        assert os.write(fd, b"mine") == 4
        os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"other"
    assert [op.data for op in notes.done if op.kind == "write"] == [b"other"]
    with noted(tmp_path, on("read", Replace(b"OTHER"))):
        fd = os.open(tmp_path / "f", os.O_RDONLY)
        assert os.read(fd, 3) == b"OTH"
        buffer = bytearray(5)
        assert os.preadv(fd, [buffer], 0) == 5
        os.close(fd)
    assert buffer == b"OTHER"


def test_only_observers_see_the_operations_of_an_alternative(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")

    def torn(operation: Operation, do: Callable[[], Any]) -> Any:
        os.unlink(tmp_path / str(operation.to))
        return do()

    observer = Notes()
    with (
        watch_operations([tmp_path], observer, observing=True),
        noted(tmp_path, on("rename", Alternative(torn))) as notes,
    ):
        os.replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new"
    assert observer.short == ["remove old", "rename new > old"]
    assert observer.asked == []
    assert notes.short == ["rename new > old"]


def test_observers_are_called_before_another_watcher_raises(tmp_path: Path) -> None:
    class Late(Notes):
        def after(self, operation: Operation) -> None:
            raise ConnectionError("the reply was lost")

    observer = Notes()
    with (
        watch_operations([tmp_path], Late()),
        watch_operations([tmp_path], observer, observing=True),
        pytest.raises(ConnectionError),
    ):
        os.mkdir(tmp_path / "d")
    assert observer.short == ["make_folder d"]


def test_a_watchers_own_operations_are_not_watched(tmp_path: Path) -> None:
    class Writes(Notes):
        def before(self, operation: Operation) -> None:
            super().before(operation)
            (tmp_path / "log").write_text(str(operation))

    with watch_operations([tmp_path], writes := Writes()):
        os.mkdir(tmp_path / "d")
    assert writes.short == ["make_folder d"]
    assert (tmp_path / "log").read_text().startswith("make_folder d (rank 0, MainThread)")


def test_a_watched_file_is_not_mapped_and_others_are(tmp_path: Path) -> None:
    real = mmap.mmap
    for name in ("in/f", "out/f"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"1234")
    with noted(tmp_path / "in"):
        with (tmp_path / "in" / "f").open("rb") as file, pytest.raises(OSError, match="watched"):
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with (tmp_path / "out" / "f").open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            assert isinstance(view, real)
            assert view[:] == b"1234"
            view.close()
    assert mmap.mmap is real

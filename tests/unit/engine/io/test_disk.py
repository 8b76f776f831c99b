import errno
import os
import random
import socket
import sys
import threading
import warnings
from itertools import product
from pathlib import Path
from typing import NoReturn

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystem as TorchFileSystem

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.io import disk, local_disk, local_file
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.local_file import LocalIn, LocalOut
from pytest_dcp._engine.io.object_disk import ObjectDisk
from pytest_dcp._engine.io.stream_disk import StreamDisk, StreamIn, StreamOut
from pytest_dcp.checkpoint.filesystem import FileSystem
from pytest_dcp.errors import CheckpointCorruptError
from support.tilings import fewer

DISKS = [LocalDisk(), StreamDisk(TorchFileSystem()), StreamDisk(FileSystem())]
contents = st.lists(st.binary(max_size=9), max_size=8)


@pytest.mark.parametrize("disk", DISKS)
class TestEveryDisk:
    def test_a_file_is_written_and_read_by_position(self, disk, tmp_path):
        with disk.create(tmp_path, "a") as out:
            out.reserve(0)
            out.write([b"0123", bytearray(b""), memoryview(b"4567")])
            out.write([b"89"])
            out.sync()
        with disk.open(tmp_path, "a") as file:
            assert file.size == 10
            for offset in range(12):
                for length in range(12):
                    view = memoryview(bytearray(length))
                    got = file.read_into(offset, view)
                    assert bytes(view[:got]) == b"0123456789"[offset : offset + length]

    def test_an_existing_file_is_replaced(self, disk, tmp_path):
        (tmp_path / "a").write_bytes(b"long content")
        with disk.create(tmp_path, "a") as out:
            out.write([b"new"])
        assert (tmp_path / "a").read_bytes() == b"new"

    def test_names_come_and_go(self, disk, tmp_path):
        folder = tmp_path / "x" / "y"
        assert disk.names(folder) == []
        unsynced, again = disk.make_folder(folder), disk.make_folder(folder)
        assert [*unsynced] in ([tmp_path / "x", tmp_path], [])
        assert [*again] == [*unsynced][:1]
        for name in "ba":
            with disk.create(folder, name):
                pass
        assert disk.names(folder) == ["a", "b"]
        disk.replace(folder, "a", "b")
        assert disk.names(folder) == ["b"]
        assert disk.exists(folder, "b")
        assert not disk.exists(folder, "a")
        disk.remove(folder, "b")
        disk.remove(folder, "b")
        assert disk.names(folder) == []
        disk.sync_folder(folder)

    def test_a_missing_file_is_not_found(self, disk, tmp_path):
        with pytest.raises(FileNotFoundError), disk.open(tmp_path, "a"):
            pass

    def test_threads_read_one_file_together(self, disk, tmp_path):
        content = random.Random(0).randbytes(4096)
        (tmp_path / "a").write_bytes(content)
        wrong: list[int] = []

        def reads(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(100):
                at = rng.randrange(4096)
                view = memoryview(bytearray(64))
                got = file.read_into(at, view)
                if bytes(view[:got]) != content[at : at + 64]:
                    wrong.append(at)

        with disk.open(tmp_path, "a") as file:
            threads = [threading.Thread(target=reads, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []


class FakeFile:
    """A file behind writev and preadv that take and give as few bytes as they like."""

    def __init__(self, steps: random.Random, content: bytes = b"") -> None:
        self.steps = steps
        self.content = bytearray(content)
        self.most = 0

    def writev(self, fd: int, buffers: list) -> int:
        self.most = max(self.most, len(buffers))
        whole = b"".join(map(bytes, buffers))
        taken = whole[: self.steps.randint(1, max(len(whole), 1))]
        self.content += taken
        return len(taken)

    def preadv(self, fd: int, views: tuple, offset: int) -> int:
        (view,) = views
        part = self.content[offset : offset + self.steps.randint(1, max(len(view), 1))][: len(view)]
        view[: len(part)] = part
        return len(part)


@given(contents, st.randoms(use_true_random=False), st.integers(1, 4))
@fewer(2)
def test_a_write_that_takes_a_part_is_continued(buffers, steps, most):
    fake = FakeFile(steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "writev", fake.writev)
        patch.setattr(local_file, "IOV_MAX", most)
        LocalOut(-1).write(buffers)
    assert bytes(fake.content) == b"".join(buffers)
    assert fake.most <= most


@given(st.binary(max_size=20), st.randoms(use_true_random=False), st.data())
@fewer(2)
def test_a_read_that_gives_a_part_is_continued(content, steps, data):
    fake = FakeFile(steps, content)
    offset, length = data.draw(st.integers(0, 25)), data.draw(st.integers(0, 25))
    view = memoryview(bytearray(length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", fake.preadv)
        got = LocalIn(-1, len(content)).read_into(offset, view)
    assert bytes(view[:got]) == content[offset : offset + length]


class RawStream:
    """A raw stream that takes and gives one byte at a time."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.at = 0

    def write(self, data) -> int:
        self.content += bytes(data[:1])
        return 1

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (len(self.content) if whence == os.SEEK_END else 0)
        return self.at

    def read(self, nbytes: int) -> bytes:
        part = bytes(self.content[self.at : self.at + min(nbytes, 1)])
        self.at += len(part)
        return part

    def flush(self) -> None:
        pass


def test_a_raw_stream_is_written_and_read_whole():
    stream = RawStream()
    out = StreamOut(stream)
    out.write([b"abc", b"", bytearray(b"de")])
    out.sync()
    file = StreamIn(stream)
    view = memoryview(bytearray(9))
    assert (file.size, file.read_into(1, view)) == (5, 4)
    assert bytes(view[:4]) == b"bcde"


def test_a_stream_that_cannot_be_synced_says_so(tmp_path):
    class Full(RawStream):
        def fileno(self) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        StreamOut(Full()).sync()


def test_more_buffers_than_one_call_takes_are_written(tmp_path):
    parts = [bytes([n % 256]) for n in range(3000)]
    with LocalDisk().create(tmp_path, "a") as out:
        out.write(parts)
    assert (tmp_path / "a").read_bytes() == b"".join(parts)


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_file_ends_where_it_was_written_despite_reserved_space(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(local_file, "kind_of_device", lambda major, minor: kind)
    with LocalDisk().create(tmp_path, "a") as out:
        out.reserve(2 << 20)
        out.write([b"x"])
        out.end_at(1)
        out.end_at(9)
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("code", ["EOPNOTSUPP", "EINVAL", "ENOSPC"])
def test_only_a_full_disk_stops_a_reservation(code, tmp_path, monkeypatch):
    def fails(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(local_file, "kind_of_device", lambda major, minor: "ext4")
    monkeypatch.setattr(os, "posix_fallocate", fails)
    with LocalDisk().create(tmp_path, "a") as out:
        out.reserve(100)
        if code == "ENOSPC":
            with pytest.raises(OSError, match="ENOSPC"):
                out.reserve(2 << 20)
        else:
            out.reserve(2 << 20)


def test_the_kind_of_a_mounted_file_system_is_known():
    status = os.stat("/proc/self")
    device = os.major(status.st_dev), os.minor(status.st_dev)
    assert local_file.kind_of_device(*device) == "proc"
    assert local_file.kind_of_device(0xFFF, 0xFFF) is None


def test_a_link_inside_the_folder_is_followed_and_one_out_of_it_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "data").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (folder / "in").symlink_to("data")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    with LocalDisk().open(folder, "in") as file:
        assert file.size == 6
    for name in ["out", "up/secret", "../secret"]:
        with (
            pytest.raises(CheckpointCorruptError, match="leads out") as caught,
            LocalDisk().open(folder, name),
        ):
            pass
        assert caught.value.file == name


def test_a_refused_link_error_says_how_to_follow_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "out").symlink_to(tmp_path / "data")
    (tmp_path / "data").write_bytes(b"1")
    said = rf"to {tmp_path}/data: FileSystemReader\(folder, follow_links=True\) reads it"
    with (
        pytest.raises(CheckpointCorruptError, match=said),
        LocalDisk().open(tmp_path / "folder", "out"),
    ):
        pass


def test_links_lead_to_plain_files_anywhere_where_they_are_followed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "data").write_bytes(b"12345")
    (tmp_path / "more").symlink_to("data")
    (folder / "out").symlink_to("../data")
    (folder / "twice").symlink_to(tmp_path / "more")
    (folder / "up").symlink_to("..")
    for name in ["out", "twice", "up/data"]:
        with LocalDisk(follow_links=True).open(folder, name) as file:
            assert file.size == 5


@pytest.mark.parametrize("name", ["../data", "/etc/passwd", "in/../../data", "up/../../data"])
def test_names_escape_nothing_where_links_are_followed(name, tmp_path):
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    (tmp_path / "data").write_bytes(b"12345")
    (folder / "up").symlink_to("..")
    with (
        pytest.raises(CheckpointCorruptError, match=r"the name leads out"),
        LocalDisk(follow_links=True).open(folder, name),
    ):
        pass


@pytest.mark.parametrize(
    "target", ["fifo", "directory", "/dev/null", "/dev/zero", "/proc/self/status", "/sys/kernel"]
)
def test_followed_links_lead_to_plain_files_alone(target, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (folder / "out").symlink_to(tmp_path / target)
    opened = []
    real = os.open

    def noted(path, *args, **options):
        opened.append(os.fspath(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", noted)
    with (
        pytest.raises(CheckpointCorruptError, match=r"no plain file"),
        LocalDisk(follow_links=True).open(folder, "out"),
    ):
        pass
    assert [path for path in opened if "folder" not in path] == [], "it was opened"


def test_a_followed_link_to_nothing_is_missing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "out").symlink_to("../nothing")
    with (
        pytest.raises(FileNotFoundError),
        LocalDisk(follow_links=True).open(tmp_path / "folder", "out"),
    ):
        pass


def test_a_folder_that_is_itself_a_link_is_opened(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"1")
    (tmp_path / "latest").symlink_to("real")
    with LocalDisk().open(tmp_path / "latest", "a") as file:
        assert file.size == 1


def test_a_path_that_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ["fifo", "folder", "device"]:
        with pytest.raises(CheckpointCorruptError), LocalDisk().open(tmp_path, name):
            pass


def test_a_socket_is_refused_as_no_plain_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        with pytest.raises(CheckpointCorruptError), LocalDisk().open(tmp_path, "socket"):
            pass


def test_descriptors_are_closed_after_use_and_after_failure(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a").write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with LocalDisk().open(tmp_path, "a"), LocalDisk().create(tmp_path, "b"):
            pass
        with pytest.raises(CheckpointCorruptError), LocalDisk().open(tmp_path, "fifo"):
            pass
        with pytest.raises(ZeroDivisionError), LocalDisk().create(tmp_path, "c"):
            raise ZeroDivisionError
        LocalDisk().sync_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["tmpfs", "nfs4", "overlay", None])
def test_only_files_of_local_disks_are_mapped(kind, tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"1234")
    monkeypatch.setattr(local_file, "kind_of_device", lambda major, minor: kind)
    with LocalDisk().open(tmp_path, "f") as file:
        assert not file.maps
        assert file.window(0, 4) is None


def test_rows_are_read_also_where_a_call_gives_a_part(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    real = os.preadv
    with LocalDisk().open(tmp_path, "f") as file:
        views = [memoryview(bytearray(3)) for _ in range(3)]
        assert file.read_rows([0, 50, 97], views) == 9
        assert [bytes(view) for view in views] == [b"\0\1\2", b"234", b"abc"]
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:2]], at))
        views = [memoryview(bytearray(3)) for _ in range(3)]
        assert file.read_rows([0, 50, 98], views) == 8
        assert bytes(views[1]) == b"234"


def test_a_write_that_takes_nothing_is_an_error(tmp_path, monkeypatch):
    class TakesNothing(RawStream):
        def write(self, data):
            return 0

    with pytest.raises(OSError, match="took no byte"):
        StreamOut(TakesNothing()).write([b"1234"])
    with LocalDisk().create(tmp_path, "f") as out:
        monkeypatch.setattr(os, "writev", lambda fd, buffers: 0)
        with pytest.raises(OSError, match="took no byte"):
            out.write([b"1234"])


MIB = 1 << 20


class EarlyWrites:
    """Stands in for `operating_system.write_early`, and records its calls."""

    def __init__(self, *, can: bool = True) -> None:
        self.can = can
        self.calls: list[tuple[int, int, bool]] = []

    def __call__(self, fd: int, offset: int, nbytes: int, *, wait: bool) -> bool:
        self.calls.append((offset // MIB, nbytes // MIB, wait))
        return self.can


def write_mib(count: int, folder: Path) -> None:
    piece = bytes(MIB)
    with LocalDisk().create(folder, "data") as out:
        for _ in range(count):
            out.write([piece])
            out.begin_sync()
        out.sync()
    assert (folder / "data").stat().st_size == count * MIB


def test_a_file_goes_to_its_medium_while_it_is_written(tmp_path, monkeypatch):
    early = EarlyWrites()
    monkeypatch.setattr(operating_system, "write_early", early)
    write_mib(7, tmp_path)
    assert early.calls == []
    write_mib(90, tmp_path)
    begun = [(start, nbytes) for start, nbytes, wait in early.calls if not wait]
    assert begun == [(start, 8) for start in range(0, 88, 8)]
    # It waits for what is 64 MiB behind, so that no more is in memory only.
    assert [start for start, _, wait in early.calls if wait] == [0, 8, 16]
    assert early.calls.index((64, 8, False)) + 1 == early.calls.index((0, 8, True))


def test_a_file_system_that_cannot_write_early_is_asked_once(tmp_path, monkeypatch):
    early = EarlyWrites(can=False)
    monkeypatch.setattr(operating_system, "write_early", early)
    write_mib(40, tmp_path)
    assert early.calls == [(0, 8, False)]


@pytest.mark.skipif(sys.platform != "linux", reason="sync_file_range is a call of Linux")
def test_early_writes_reach_the_system_and_their_failures_the_caller(tmp_path, monkeypatch):
    with open(tmp_path / "a", "wb") as file:
        file.write(bytes(MIB))
        file.flush()
        assert operating_system.write_early(file.fileno(), 0, MIB, wait=False)
        assert operating_system.write_early(file.fileno(), 0, MIB, wait=True)
    read_end, write_end = os.pipe()
    try:
        # ESPIPE: there is no such thing for a pipe.
        assert not operating_system.write_early(write_end, 0, MIB, wait=True)
    finally:
        os.close(read_end)
        os.close(write_end)
    with pytest.raises(OSError, match="Bad file descriptor"):
        operating_system.write_early(write_end, 0, MIB, wait=True)

    def refuse(fd: int, offset: int, nbytes: int, *, wait: bool) -> bool:
        if wait:
            raise OSError(errno.EIO, "Input/output error")
        return True

    monkeypatch.setattr(operating_system, "write_early", refuse)
    with pytest.raises(OSError, match=r"Input/output error: .*/data'") as caught:
        write_mib(80, tmp_path)
    assert caught.value.filename == str(tmp_path / "data")


WRITES = {
    "writev": lambda out: out.write([b"x"]),
    "fsync": lambda out: out.sync(),
    "posix_fallocate": lambda out: out.reserve(2 << 20),
    "ftruncate": lambda out: (out.write([b"xy"]), out.end_at(1)),
}
CODES = [errno.ENOSPC, errno.EIO, errno.EINVAL, errno.EDQUOT]


def failing(code: int, then=lambda *_: None):
    def fails(*arguments: object) -> NoReturn:
        then(*arguments)
        raise OSError(code, os.strerror(code))

    return fails


def write_with_failing(call: str, code: int, folder: Path, patch: pytest.MonkeyPatch) -> None:
    with LocalDisk().create(folder, "data") as out:
        patch.setattr(os, call, failing(code, *([os.close] if call == "close" else [])))
        if call != "close":
            WRITES[call](out)


@pytest.mark.parametrize(
    ("call", "code"),
    # EINVAL of a reservation says that there is none.
    sorted({*product([*WRITES, "close"], CODES)} - {("posix_fallocate", errno.EINVAL)}),
)
def test_a_write_that_fails_names_its_file(call, code, tmp_path, monkeypatch):
    monkeypatch.setattr(local_file, "kind_of_device", lambda major, minor: "ext4")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"/data'$") as caught:
        write_with_failing(call, code, tmp_path, patch)
    assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / "data"))


@pytest.mark.parametrize("read", ["read_into", "read_rows"])
def test_a_read_that_fails_names_its_file(read, tmp_path, monkeypatch):
    (tmp_path / "data").write_bytes(b"1234")
    view = memoryview(bytearray(4))
    with LocalDisk().open(tmp_path, "data") as file, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(errno.EIO))
        with pytest.raises(OSError, match=r"Input/output error: .*/data'$"):
            file.read_into(0, view) if read == "read_into" else file.read_rows([0], [view])


@pytest.mark.parametrize("call", ["write", "flush"])
def test_a_stream_that_fails_names_its_file(call, tmp_path):
    with StreamDisk(FileSystem()).create(tmp_path, "data") as out:
        stream, out.stream = out.stream, MagicFailure(call)
        with pytest.raises(OSError, match=r"No space left on device: .*/data'$"):
            out.write([b"x"]) if call == "write" else out.sync()
        out.stream = stream


class MagicFailure:
    """A stream that has no room."""

    def __init__(self, call: str) -> None:
        setattr(self, call, failing(errno.ENOSPC))


def test_a_folder_that_fails_to_be_synced_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        LocalDisk().sync_folder(tmp_path)


@pytest.mark.parametrize("code", local_disk.CANNOT_SYNC_FOLDERS)
def test_a_file_system_that_cannot_sync_folders_is_warned_of_once(code, tmp_path, monkeypatch):
    local_disk._warn_of_unsynced.cache_clear()
    monkeypatch.setattr(os, "fsync", failing(code))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            LocalDisk().sync_folder(tmp_path)
    (text,) = (str(one.message) for one in warned)
    assert f"{tmp_path} is on a file system that cannot sync folders" in text
    assert "sync_files=False" in text


@pytest.mark.parametrize(
    ("kind", "is_remote"),
    [
        *((kind, True) for kind in ("nfs4", "lustre", "cifs", "9p", "fuse.gcsfuse", "fuse")),
        *((kind, False) for kind in ("ext4", "xfs", "tmpfs", "overlay", "fuseblk", None)),
    ],
)
def test_network_file_systems_are_remote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, is_remote: bool
) -> None:
    monkeypatch.setattr(local_disk, "kind_of_device", lambda *_: kind)
    local_disk._is_network_device.cache_clear()
    assert disk.is_remote(LocalDisk(), tmp_path) == is_remote
    local_disk._is_network_device.cache_clear()
    assert not disk.is_remote(LocalDisk(), tmp_path / "no folder")


def test_a_disk_that_says_nothing_of_it_is_not_remote(tmp_path: Path) -> None:
    assert not disk.is_remote(StreamDisk(FileSystem()), tmp_path)
    assert not disk.is_remote(ObjectDisk(fsspec.filesystem("memory"), {}), "memory://a")

"""Leases of readers: commits wait for them, never for long, and not for the dead."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import lease, open_files
from pytest_dcp._engine.io.lease import hold_lease, wait_for_leases
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.open_files import OpenFiles

pytestmark = pytest.mark.filterwarnings("ignore")

WAIT_S = 30.0
NAME = ".metadata"


class Commit(threading.Thread):
    """Replaces the file of a folder, as a save's commit does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        (self.folder / "new").write_text("new")
        with wait_for_leases(self.folder, NAME):
            (self.folder / "new").replace(self.folder / NAME)
            self.done.set()

    def end(self) -> None:
        self.join(WAIT_S)
        assert not self.is_alive()
        assert (self.folder / NAME).read_text() == "new"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAME).write_text("old")
    return tmp_path


def test_a_commit_waits_until_the_last_reader_has_let_go(folder: Path) -> None:
    with hold_lease(folder, NAME):
        with hold_lease(folder, NAME):
            commit = Commit(folder)
            assert not commit.done.wait(0.1)
        assert not commit.done.wait(0.1)
        assert (folder / NAME).read_text() == "old"
    commit.end()


def test_a_commit_waits_for_a_stopped_reader_no_longer_than_its_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.1)
    with hold_lease(folder, NAME):
        Commit(folder).end()


def test_a_commit_waits_for_no_dead_reader(folder: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with hold_lease(folder, NAME):
            os.write(writing, b"!")
            time.sleep(WAIT_S)
        os._exit(0)
    os.read(reading, 1)
    commit = Commit(folder)
    assert not commit.done.wait(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    commit.end()
    os.close(reading)
    os.close(writing)


def test_a_reader_gets_the_lease_of_the_file_that_has_the_name_now(folder: Path) -> None:
    """A commit is about to replace the file that the reader has opened."""
    with wait_for_leases(folder, NAME):
        held = threading.Event()
        end = threading.Event()

        def read() -> None:
            with hold_lease(folder, NAME):
                held.set()
                end.wait(WAIT_S)

        reader = threading.Thread(target=read)
        reader.start()
        assert not held.wait(0.1)
        (folder / "new").write_text("newer")
        (folder / "new").replace(folder / NAME)
    assert held.wait(WAIT_S)
    commit = Commit(folder)
    assert not commit.done.wait(0.1), "the lease is on the file that is gone"
    end.set()
    reader.join(WAIT_S)
    commit.end()


def test_there_is_no_lease_without_a_file(tmp_path: Path) -> None:
    with hold_lease(tmp_path, NAME), wait_for_leases(tmp_path, NAME):
        (tmp_path / NAME).write_text("first")
    with hold_lease(tmp_path / "nowhere", NAME):
        pass


# ---- files that stay open


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for n in range(4):
        (tmp_path / f"f{n}").write_bytes(bytes([n]) * 10)
    return tmp_path


def content(disk: Any, folder: Path, name: str) -> bytes:
    with disk.open(folder, name) as file:
        view = memoryview(bytearray(file.size))
        assert file.read_into(0, view) == file.size
        return bytes(view)


def test_kept_files_are_read_though_they_are_removed_or_replaced(files: Path) -> None:
    kept = OpenFiles(LocalDisk(), files)
    for n in range(2):
        kept.keep(f"f{n}")
    (files / "f0").unlink()
    (files / "f3").replace(files / "f1")
    assert content(kept, files, "f0") == bytes(10)
    assert content(kept, files, "f1") == bytes([1]) * 10
    assert content(kept, files, "f2") == bytes([2]) * 10
    assert kept.complete
    kept.close()
    with pytest.raises(FileNotFoundError):
        content(kept, files, "f0")


def test_a_load_takes_no_more_descriptors_than_half_of_the_limit(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "most_files", lambda: 3)
    kept = OpenFiles(LocalDisk(), files)
    for n in range(4):
        kept.keep(f"f{n}")
    assert not kept.complete
    assert [content(kept, files, f"f{n}")[0] for n in range(4)] == [0, 1, 2, 3]
    kept.close()


def test_descriptors_are_closed_after_a_load_and_after_one_that_fails(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4), "v": 1}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"w": torch.zeros(4)}, checkpoint_id=tmp_path, no_dist=True)
    before = sorted(os.listdir("/proc/self/fd"))
    reader = dcp.FileSystemReader(tmp_path)
    dcp.load({"w": torch.zeros(4)}, storage_reader=reader, no_dist=True)
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"w": torch.zeros(5)}, storage_reader=reader, no_dist=True)
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"x": torch.zeros(5)}, storage_reader=reader, no_dist=True)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_load_with_no_descriptor_to_spare_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "most_files", lambda: 0)
    dcp.save({"w": torch.ones(4), "v": 1}, checkpoint_id=tmp_path, no_dist=True)
    state = {"w": torch.zeros(4), "v": 0}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state["w"].tolist() == [1, 1, 1, 1]
    assert state["v"] == 1

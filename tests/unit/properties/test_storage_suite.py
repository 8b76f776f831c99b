"""The storage suite on storages that should pass it, and on one that should not."""

from __future__ import annotations

import importlib
import os
import pathlib
from typing import Any, ClassVar

import pytest
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.storages.fsspec import FsspecReader, FsspecWriter
from pytest_dcp.errors import LawError, RecordingError
from pytest_dcp.properties.suite import StorageSuite
from support.sqlite_storage import SqliteReader, SqliteWriter

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")
Path = str | os.PathLike[str]

IN_PLACE = (
    "torch 2.13 rewrites data files in place, and removes .metadata before the new one is there"
)


class TestOurs(StorageSuite):
    def make_writer(self, path: Path) -> StorageWriter:
        return dcp.FileSystemWriter(path)

    def make_reader(self, path: Path) -> StorageReader:
        return dcp.FileSystemReader(path, verify="full")


class TestFsspecFile(StorageSuite):
    """Our fsspec storage on local files, through their URLs."""

    def checkpoint_id(self, path: Path) -> str:
        return f"file://{path}"

    def make_writer(self, path: Path) -> StorageWriter:
        return FsspecWriter(f"file://{path}")

    def make_reader(self, path: Path) -> StorageReader:
        return FsspecReader(f"file://{path}", verify="full")


class TestFsspecMemory(StorageSuite):
    """A store without files, which no other process sees."""

    shared = False
    keeps_files = False

    def checkpoint_id(self, path: Path) -> str:
        return f"memory://{path}"

    def make_writer(self, path: Path) -> StorageWriter:
        return FsspecWriter(f"memory://{path}")

    def make_reader(self, path: Path) -> StorageReader:
        return FsspecReader(f"memory://{path}", verify="full")


class TestTorchs(StorageSuite):
    """torch's storage under torch's engine."""

    engine = torch_dcp
    known_failures: ClassVar[dict[str, str]] = {
        "test_killed_save": IN_PLACE,
        "test_power_loss": IN_PLACE,
        "test_crash_of_2_ranks": IN_PLACE,
        "test_failing_save": IN_PLACE,
        "test_power_loss_first": (
            "torch 2.13 syncs no folder, and .metadata before its bytes are flushed"
        ),
        "test_meta_tensors": "torch 2.13 asks a process group for the device",
        "test_flipped_bits": "torch 2.13 has no checksums",
    }

    def make_writer(self, path: Path) -> StorageWriter:
        return torch_dcp.FileSystemWriter(path)

    def make_reader(self, path: Path) -> StorageReader:
        return torch_dcp.FileSystemReader(path)


class TestSqlite(StorageSuite):
    """A storage whose files are written by C code, so that saves cannot be recorded."""

    records = False
    known_failures: ClassVar[dict[str, str]] = {
        "test_flipped_bits": "sqlite has no checksums",
    }

    def make_writer(self, path: Path) -> StorageWriter:
        return SqliteWriter(path)

    def make_reader(self, path: Path) -> StorageReader:
        return SqliteReader(path)


class Unrecorded(TestSqlite):
    """Does not say that it cannot be recorded."""

    __test__ = False
    records = True


def test_a_storage_that_cannot_be_recorded_gets_advice(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecordingError, match="Python does not see") as caught:
        Unrecorded().test_killed_first_save(tmp_path)
    assert any("has records = False" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("name", ["shared", "keeps_files", "records"])
def test_a_switch_that_is_no_bool_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^Wrong\.{name} must be True or False, got 'no'$"):
        type("Wrong", (StorageSuite,), {name: "no"})


def test_a_skip_says_by_which_setting(tmp_path: pathlib.Path) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^records = False: C code writes the files"):
        TestSqlite().test_killed_save(tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"^keeps_files = False: "):
        TestFsspecMemory().test_power_loss(tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"^shared = False: "):
        TestFsspecMemory().needs_sharing()


def names_of(storage: type[StorageSuite]) -> list[str]:
    return [name for name in dir(storage) if name.startswith("test_")]


def test_names_leave_room_for_the_reason_in_a_summary_of_80_columns() -> None:
    assert len(names_of(StorageSuite)) == 39
    assert max(map(len, names_of(StorageSuite))) <= 22
    assert all(getattr(StorageSuite, name).__doc__ for name in names_of(StorageSuite))


def test_a_reader_that_always_fails_does_not_pass_for_one_that_finds_nothing(
    tmp_path: pathlib.Path,
) -> None:
    class Broken(TestOurs):
        def make_reader(self, path: Path) -> StorageReader:
            raise TypeError("a mistake of the suite's user")

    for name in ("test_unfinished", "test_no_checkpoint", "test_missing_key", "test_missing_file"):
        with pytest.raises((TypeError, LawError), match="a mistake of the suite's user"):
            getattr(Broken(), name)(tmp_path / name)


def test_a_known_failure_is_one_of_the_tests() -> None:
    with pytest.raises(TypeError, match="there is no test 'test_of_nothing'"):
        type("Wrong", (StorageSuite,), {"known_failures": {"test_of_nothing": "no reason"}})
    with pytest.raises(TypeError, match="did you mean 'test_flipped_bits'"):
        type("Wrong", (StorageSuite,), {"known_failures": {"test_flipped_bit": "no reason"}})


def test_marks_of_one_storage_are_not_those_of_another() -> None:
    name = next(iter(TestTorchs.known_failures))
    marks = [getattr(getattr(c, name), "pytestmark", []) for c in (TestOurs, TestTorchs)]
    assert [[mark.name for mark in some] for some in marks] == [[], ["xfail"]]

"""The storage suite on storages that should pass it, and on one that should not."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

import pytest
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.fsspec_storage import FsspecReader, FsspecWriter
from pytest_dcp.properties.suite import StorageSuite

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
        "test_a_killed_save_leaves_the_old_one_or_the_new": IN_PLACE,
        "test_a_save_leaves_the_old_one_or_the_new_when_the_machine_dies": IN_PLACE,
        "test_a_crash_of_two_ranks_leaves_the_old_one_or_the_new": IN_PLACE,
        "test_data_that_cannot_be_had_fail_the_save_and_leave_the_old_one": IN_PLACE,
        "test_a_first_save_leaves_it_whole_or_none_when_the_machine_dies": (
            "torch 2.13 syncs no folder, and .metadata before its bytes are flushed"
        ),
        "test_meta_tensors_are_made": "torch 2.13 asks a process group for the device",
        "test_a_flipped_bit_never_gives_a_wrong_tensor": "torch 2.13 has no checksums",
    }

    def make_writer(self, path: Path) -> StorageWriter:
        return torch_dcp.FileSystemWriter(path)

    def make_reader(self, path: Path) -> StorageReader:
        return torch_dcp.FileSystemReader(path)


def test_a_known_failure_is_one_of_the_tests() -> None:
    with pytest.raises(TypeError, match="there is no test 'test_of_nothing'"):
        type("Wrong", (StorageSuite,), {"known_failures": {"test_of_nothing": "no reason"}})


def test_marks_of_one_storage_are_not_those_of_another() -> None:
    name = next(iter(TestTorchs.known_failures))
    marks = [getattr(getattr(c, name), "pytestmark", []) for c in (TestOurs, TestTorchs)]
    assert [[mark.name for mark in some] for some in marks] == [[], ["xfail"]]

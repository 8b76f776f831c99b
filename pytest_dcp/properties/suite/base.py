"""How a storage describes itself to the suite."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.errors import RecordingError
from pytest_dcp.properties.laws.engine import WithStorage
from pytest_dcp.tracebacks import add_note

SWITCHES = ("shared", "keeps_files", "records")


class StorageTests:
    """The base of the suite's parts: how to make storages, and their properties."""

    engine: ClassVar[Any] = checkpoint
    """The engine whose `save` and `load` drive the storage."""
    shared: ClassVar[bool] = True
    """Whether other processes see a process's checkpoints; False skips tests with several ranks."""
    keeps_files: ClassVar[bool] = True
    """Whether a checkpoint is the local folder `path`; False skips crashes and damage."""
    records: ClassVar[bool] = True
    """Whether its files are written through Python's own functions, so that a save can be recorded;
    False, for storages that write from C code (sqlite, LMDB), skips crashes.
    """
    crash_budget: ClassVar[int] = 150
    """Folders tried for each workload and each crash model."""
    known_failures: ClassVar[Mapping[str, str]] = {}
    """Names of failing tests, each with its reason; if one passes after all, it is reported as a
    failure.
    """

    def make_writer(self, path: str | os.PathLike[str]) -> StorageWriter:
        """A new writer to this place, which may hold a checkpoint, or not exist yet."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to make its writer")

    def make_reader(self, path: str | os.PathLike[str]) -> StorageReader:
        """A new reader from this place."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to make its reader")

    def checkpoint_id(self, path: Path) -> str | os.PathLike[str]:
        """The id to pass to `reset` of the storages for this place."""
        return path

    @property
    def dcp(self) -> WithStorage:
        """The engine on this storage, in the form that laws take."""
        return WithStorage(self.make_writer, self.make_reader, self.engine)

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Mark the known failures, on copies: other storages share the tests."""
        super().__init_subclass__(**keywords)
        for name in SWITCHES:
            if not isinstance(value := getattr(cls, name), bool):
                raise TypeError(f"{cls.__name__}.{name} must be True or False, got {value!r}")
        for name, reason in cls.known_failures.items():
            if not callable(getattr(cls, name, None)):
                near = difflib.get_close_matches(name, [n for n in dir(cls) if n[:5] == "test_"])
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{cls.__name__}.known_failures: there is no test {name!r}{hint}")
            setattr(cls, name, _expect_failure(getattr(cls, name), reason))

    def needs_files(self) -> None:
        """Skip the test if the storage keeps no files."""
        if not self.keeps_files:
            pytest.skip("keeps_files = False: the storage keeps no files in a local folder")

    def needs_sharing(self) -> None:
        """Skip the test if other processes do not see a process's checkpoints."""
        if not self.shared:
            pytest.skip("shared = False: other processes do not see what one has written")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Skip the test if saves cannot be recorded; if a recording fails, explain the
        attribute.
        """
        self.needs_files()
        if not self.records:
            pytest.skip("records = False: C code writes the files, where nothing can be recorded")
        try:
            yield
        except RecordingError as error:
            add_note(
                error, "a storage whose files C code writes (sqlite, LMDB) has records = False"
            )
            raise


def _expect_failure(test: Any, reason: str) -> Any:
    @functools.wraps(test)
    def copy(*args: Any, **kwargs: Any) -> Any:
        return test(*args, **kwargs)

    return pytest.mark.xfail(reason=reason, strict=True)(copy)


def files_of(folder: Path) -> list[Path]:
    """The files in a folder and below."""
    return sorted(path for path in folder.rglob("*") if path.is_file())

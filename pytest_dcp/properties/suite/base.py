"""What a storage tells the suite of itself."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.properties.laws.engine import WithStorage


class StorageTests:
    """The base of the suite's parts: how storages are made, and what is true of them."""

    engine: ClassVar[Any] = checkpoint
    """Whose `save` and `load` drive the storage."""
    shared: ClassVar[bool] = True
    """Whether other processes see what one has written; False skips what needs several ranks."""
    keeps_files: ClassVar[bool] = True
    """Whether a checkpoint is the local folder `path`; False skips crashes and damage."""
    crash_budget: ClassVar[int] = 150
    """Folders tried for each workload and each model of crashes."""
    known_failures: ClassVar[Mapping[str, str]] = {}
    """Tests that fail, by name, each with its reason; one that passes after all is a failure."""

    def make_writer(self, path: str | os.PathLike[str]) -> StorageWriter:
        """A new writer to this place, which may hold a checkpoint, or not be there yet."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to make its writer")

    def make_reader(self, path: str | os.PathLike[str]) -> StorageReader:
        """A new reader from this place."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to make its reader")

    def checkpoint_id(self, path: Path) -> str | os.PathLike[str]:
        """What `reset` of the storages is given for this place."""
        return path

    @property
    def dcp(self) -> WithStorage:
        """The engine on this storage, as laws take it."""
        return WithStorage(self.make_writer, self.make_reader, self.engine)

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Mark the known failures, on copies: other storages have the same tests."""
        super().__init_subclass__(**keywords)
        for name, reason in cls.known_failures.items():
            if not callable(getattr(cls, name, None)):
                raise TypeError(f"{cls.__name__}.known_failures: there is no test {name!r}")
            setattr(cls, name, _failing(getattr(cls, name), reason))


def _failing(test: Any, reason: str) -> Any:
    @functools.wraps(test)
    def copy(*args: Any, **kwargs: Any) -> Any:
        return test(*args, **kwargs)

    return pytest.mark.xfail(reason=reason, strict=True)(copy)


def files_of(folder: Path) -> list[Path]:
    """The files in a folder and below."""
    return sorted(path for path in folder.rglob("*") if path.is_file())

"""Checkpoints by URL, wherever fsspec reaches: torch has them in `_fsspec_filesystem` alone."""

from pytest_dcp._engine.storages.fsspec import FileSystem as FileSystem
from pytest_dcp._engine.storages.fsspec import FsspecReader, FsspecWriter

__all__ = ["FsspecWriter", "FsspecReader"]

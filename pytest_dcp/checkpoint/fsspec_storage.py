"""Checkpoints by URL, on any file system of fsspec: torch has these only in
`_fsspec_filesystem`.
"""

from pytest_dcp._engine.storages.fsspec import FileSystem as FileSystem
from pytest_dcp._engine.storages.fsspec import FsspecReader, FsspecWriter

__all__ = ["FsspecWriter", "FsspecReader"]

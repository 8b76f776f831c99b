"""fsspec's file systems: the names of torch's private module `_fsspec_filesystem`."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint import _fsspec_filesystem

from pytest_dcp._engine.storages.fsspec import FileSystem as FileSystem
from pytest_dcp._engine.storages.fsspec import FsspecReader, FsspecWriter
from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.torch_twins import register

register(_fsspec_filesystem, (FileSystem, FsspecReader, FsspecWriter))

__all__ = ["FsspecWriter", "FsspecReader"]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

"""Checkpoints in folders: the writer and the reader, on the local disk or any torch file system.

Arguments, hooks and files are those of `torch.distributed.checkpoint.filesystem`: torch's reader
opens what this writer writes, and this reader what torch's writer wrote. What is new on disk is
described in `store.commit` (when a save becomes the checkpoint) and `store.metadata_file` (the
manifest behind the pickle of `.metadata`).
"""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import FileSystemBase, SerializationFormat

from pytest_dcp.checkpoint.file_reader import FileSystemReader
from pytest_dcp.checkpoint.file_system import FileSystem
from pytest_dcp.checkpoint.file_writer import FileSystemWriter
from pytest_dcp.checkpoint.torch_names import names_of_torch

__all__ = [
    "FileSystemWriter",
    "FileSystemReader",
    "FileSystem",
    "FileSystemBase",
    "SerializationFormat",
]

if not TYPE_CHECKING:  # For what is asked by name; type checkers see what is defined above.
    __getattr__ = names_of_torch(__name__)

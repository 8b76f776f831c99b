"""Checkpoints in folders: the writer and the reader, on the local disk or any torch file system.

Arguments, hooks and files are those of `torch.distributed.checkpoint.filesystem`: torch's reader
opens this writer's checkpoints, and vice versa. Additions to the format are described in
`io.commit` (when a save becomes the checkpoint) and `format.metadata_file` (the manifest behind the
pickle of `.metadata`).
"""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import FileSystemBase, SerializationFormat
from torch.distributed.checkpoint.filesystem import _StorageInfo as _StorageInfo
from torch.distributed.checkpoint.filesystem import _StoragePrefix as _StoragePrefix

from pytest_dcp._engine.io import commit, single_entries, transforms
from pytest_dcp._engine.storages.folder_metadata import new_id
from pytest_dcp._engine.storages.folder_reader import FileSystemReader
from pytest_dcp._engine.storages.folder_writer import CURRENT_DCP_VERSION as CURRENT_DCP_VERSION
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.storages.local_filesystem import FileSystem
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "FileSystemWriter",
    "FileSystemReader",
    "FileSystem",
    "FileSystemBase",
    "SerializationFormat",
]

# Names that storages of other libraries also import, as torch names them.
_metadata_fn = commit.METADATA
DEFAULT_SUFFIX = commit.SUFFIX
_FileSystemWriter = FileSystemWriter
_generate_uuid = new_id
_write_item = single_entries.write_item
_split_by_size_and_type = single_entries.split_by_size_and_type
_StorageWriterTransforms = transforms.StorageWriterTransforms
_StorageReaderTransforms = transforms.StorageReaderTransforms

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

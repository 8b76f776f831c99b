"""Registers our classes as virtual subclasses of torch's classes of the same name.

Code that was written for torch checks `isinstance(reader, FileSystemReader)` with torch's class.
Ours are not real subclasses, which would inherit torch's methods where ours has none; they are
registered with `abc.ABCMeta.register`. The reverse does not hold: the engine itself checks for its
own classes. Values (enumerations, options, plans, metadata) are torch's own classes and need none
of this.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import default_planner as default_planner_of_torch
from torch.distributed.checkpoint import filesystem as filesystem_of_torch
from torch.distributed.checkpoint import hf_storage as hf_storage_of_torch
from torch.distributed.checkpoint import quantized_hf_storage as quantized_hf_storage_of_torch
from torch.distributed.checkpoint import staging as staging_of_torch

from pytest_dcp._engine.huggingface.quantized import QuantizedHuggingFaceStorageReader
from pytest_dcp._engine.huggingface.reader import HuggingFaceStorageReader
from pytest_dcp._engine.huggingface.writer import HuggingFaceStorageWriter
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.staging.stager import BlockingAsyncStager, DefaultStager
from pytest_dcp._engine.storages.folder_reader import FileSystemReader
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.storages.local_filesystem import FileSystem

TWINS: tuple[tuple[Any, tuple[type, ...]], ...] = (
    (default_planner_of_torch, (DefaultSavePlanner,)),
    (filesystem_of_torch, (FileSystem, FileSystemReader, FileSystemWriter)),
    (hf_storage_of_torch, (HuggingFaceStorageReader, HuggingFaceStorageWriter)),
    (quantized_hf_storage_of_torch, (QuantizedHuggingFaceStorageReader,)),
    (staging_of_torch, (BlockingAsyncStager, DefaultStager)),
)
"""Torch's module, and our classes to register for its classes of the same name. Torch's load
planner has no abstract base, so ours is a subclass of it. The classes for fsspec are registered
when they are imported, since the package may be missing."""


def register(theirs: Any, classes: tuple[type, ...]) -> None:
    """Register each of our classes as a subclass of torch's class of the same name."""
    for ours in classes:
        getattr(theirs, ours.__name__).register(ours)


for twins in TWINS:
    register(*twins)

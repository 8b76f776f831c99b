"""Our classes that stand in for a class of torch's of the same name, made known as such.

Code that was written for torch asks `isinstance(reader, FileSystemReader)` of torch's class. Ours
are no subclasses, whose methods would be torch's where ours has none; they are registered, as
`abc.ABCMeta.register` has it. The other way round nothing holds: the engine itself asks whether an
object is of its own classes. Values (enumerations, options, plans, metadata) are torch's own
classes and need none of this.
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
"""Torch's module, and our classes that stand in for those of the same name there. Torch's load
planner has no abstract base, so ours is a subclass of it. Those of fsspec are registered where they
are imported, for the package may be missing."""


def register(theirs: Any, classes: tuple[type, ...]) -> None:
    """Make each class of ours count as an instance of torch's of the same name."""
    for ours in classes:
        getattr(theirs, ours.__name__).register(ours)


for twins in TWINS:
    register(*twins)

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

from pytest_dcp.checkpoint import (
    default_planner,
    filesystem,
    hf_storage,
    quantized_hf_storage,
    staging,
)

TWINS: tuple[tuple[Any, Any, tuple[str, ...]], ...] = (
    (default_planner_of_torch, default_planner, ("DefaultSavePlanner",)),
    (
        filesystem_of_torch,
        filesystem,
        ("FileSystem", "FileSystemReader", "FileSystemWriter"),
    ),
    (
        hf_storage_of_torch,
        hf_storage,
        ("HuggingFaceStorageReader", "HuggingFaceStorageWriter"),
    ),
    (
        quantized_hf_storage_of_torch,
        quantized_hf_storage,
        ("QuantizedHuggingFaceStorageReader",),
    ),
    (staging_of_torch, staging, ("BlockingAsyncStager", "DefaultStager")),
)
"""Torch's module, ours, and the classes of one that the other's stand in for. Torch's load planner
has no abstract base, so ours is a subclass of it. Those of fsspec are registered where they are
imported, for the package may be missing."""


def register(theirs: Any, ours: Any, names: tuple[str, ...]) -> None:
    """Make each class of our module count as an instance of torch's of the same name."""
    for name in names:
        getattr(theirs, name).register(getattr(ours, name))


for twins in TWINS:
    register(*twins)

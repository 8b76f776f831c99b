"""Distributed checkpoints: a drop-in for `torch.distributed.checkpoint`.

`import pytest_dcp.checkpoint as dcp` in place of `import torch.distributed.checkpoint as dcp`; the
names, arguments and files are the same. Saves replace a checkpoint at one instant, loads check what
they read, and a file that somebody altered gives an error, never a wrong tensor or foreign code.
"""

from pytest_dcp.checkpoint.api import CheckpointException
from pytest_dcp.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from pytest_dcp.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from pytest_dcp.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from pytest_dcp.checkpoint.optimizer import load_sharded_optimizer_state_dict
from pytest_dcp.checkpoint.plan.match import LoadReport
from pytest_dcp.checkpoint.plan.per_rank import PerRank
from pytest_dcp.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from pytest_dcp.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from pytest_dcp.checkpoint.state_dict_loader import load, load_state_dict, load_without_template
from pytest_dcp.checkpoint.state_dict_saver import async_save, save, save_state_dict
from pytest_dcp.checkpoint.storage import StorageReader, StorageWriter
from pytest_dcp.checkpoint.store.observe import Progress

__all__ = [
    "save",
    "load",
    "async_save",
    "load_without_template",
    "save_state_dict",
    "load_state_dict",
    "LoadReport",
    "PerRank",
    "Progress",
    "FileSystemReader",
    "FileSystemWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "QuantizedHuggingFaceStorageReader",
    "load_sharded_optimizer_state_dict",
    "StorageReader",
    "StorageWriter",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "LoadPlan",
    "LoadPlanner",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "WriteItem",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "TensorStorageMetadata",
    "CheckpointException",
]

"""Distributed checkpoints: a drop-in for `torch.distributed.checkpoint`.

`import pytest_dcp.checkpoint as dcp` instead of `import torch.distributed.checkpoint as dcp`; the
names, arguments and files are the same. Saves replace a checkpoint atomically, loads verify the
bytes they read, and an altered file gives an error, never a wrong tensor or foreign code.
"""

from typing import TYPE_CHECKING

from pytest_dcp._engine import torch_twins as torch_twins
from pytest_dcp._engine.coordinate import StepError
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.plan.match import LoadReport
from pytest_dcp._engine.plan.per_rank import PerRank
from pytest_dcp._engine.storages.fsspec import FsspecReader, FsspecWriter
from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.verbs.progress_bar import progress_bar
from pytest_dcp.checkpoint import planner_helpers as planner_helpers
from pytest_dcp.checkpoint import staging as staging
from pytest_dcp.checkpoint import stateful as stateful
from pytest_dcp.checkpoint.api import CheckpointException
from pytest_dcp.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from pytest_dcp.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    SerializationFormat,
)
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from pytest_dcp.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from pytest_dcp.checkpoint.optimizer import load_sharded_optimizer_state_dict
from pytest_dcp.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from pytest_dcp.checkpoint.protocol import CheckpointableTensor
from pytest_dcp.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from pytest_dcp.checkpoint.state_dict_loader import load, load_state_dict, load_without_template
from pytest_dcp.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    async_save,
    save,
    save_state_dict,
)
from pytest_dcp.checkpoint.storage import StorageReader, StorageWriter
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointFileMissingError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    PlanError,
    ReplicaMismatchError,
    SaverProcessError,
    UntrustedPickleError,
)

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
    "progress_bar",
    "AsyncCheckpointerType",
    "SerializationFormat",
    "FileSystemReader",
    "FileSystemWriter",
    "FsspecReader",
    "FsspecWriter",
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
    "CheckpointableTensor",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "TensorStorageMetadata",
    "CheckpointException",
    "CheckpointError",
    "CheckpointCorruptError",
    "CheckpointExistsError",
    "CheckpointFileMissingError",
    "CheckpointMismatchError",
    "CheckpointReplacedError",
    "PlanError",
    "ReplicaMismatchError",
    "SaverProcessError",
    "StepError",
    "UntrustedPickleError",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

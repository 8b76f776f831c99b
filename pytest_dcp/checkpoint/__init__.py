"""Distributed checkpoints: a drop-in for `torch.distributed.checkpoint`.

`import pytest_dcp.checkpoint as dcp` instead of `import torch.distributed.checkpoint as dcp`; the
names, arguments and files are the same. Saves replace a checkpoint atomically, loads verify the
bytes they read, and an altered file gives an error, never a wrong tensor or foreign code.

In one process, or in every rank of a group alike:

>>> import torch
>>> import pytest_dcp.checkpoint as dcp
>>> metadata = dcp.save({"w": torch.arange(4.0), "step": 3}, checkpoint_id="step-3")
>>> sorted(metadata.state_dict_metadata)
['step', 'w']

A load fills the tensors of the state dict that it gets, in place, and replaces its values:

>>> state = {"w": torch.zeros(4), "step": 0}
>>> report = dcp.load(state, checkpoint_id="step-3")
>>> state
{'w': tensor([0., 1., 2., 3.]), 'step': 3}
>>> report.bytes_read == report.bytes_verified
True

Without a state dict, whole tensors on the CPU:

>>> dcp.load_without_template("w", checkpoint_id="step-3")
{'w': tensor([0., 1., 2., 3.])}

A mismatch, or damage, raises one error, the same in every rank. It is torch's CheckpointException
and also an instance of the class that says what is wrong:

>>> dcp.load({"weight": torch.zeros(4)}, checkpoint_id="step-3")
Traceback (most recent call last):
    ...
pytest_dcp.checkpoint.StepError: step 'plan' of load failed on rank 0: CheckpointMismatchError:
Missing key in checkpoint state_dict: weight...
>>> issubclass(dcp.StepError, dcp.CheckpointException)
True
"""

from typing import TYPE_CHECKING

from pytest_dcp._engine import torch_twins as torch_twins
from pytest_dcp._engine.coordinate import StepError
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.lazy_reading.contents import StoredShard
from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor, LazyValue
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint, open_checkpoint
from pytest_dcp._engine.lazy_reading.stored_wrappers import StoredPart, StoredWrapper
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.plan.per_rank import PerRank
from pytest_dcp._engine.steps.export_step import ExportReport
from pytest_dcp._engine.steps.known_steps import Step
from pytest_dcp._engine.steps.load_step import LoadedStep
from pytest_dcp._engine.steps.manager import CheckpointManager
from pytest_dcp._engine.steps.measure_steps import StepBytes
from pytest_dcp._engine.steps.running_save import SaveStatus
from pytest_dcp._engine.storages.fsspec import FsspecReader, FsspecWriter
from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.verbs.progress_bar import progress_bar
from pytest_dcp.checkpoint import convert as convert
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
    NotACheckpointError,
    PlanError,
    ReplicaMismatchError,
    SaveAbandonedError,
    SaverProcessError,
    UnknownNameError,
    UntrustedPickleError,
)

open = open_checkpoint
"""Not in `__all__`: after `import *` it would hide the builtin."""

__all__ = [
    "save",
    "load",
    "async_save",
    "load_without_template",
    "save_state_dict",
    "load_state_dict",
    "open_checkpoint",
    "OpenCheckpoint",
    "LazyTensor",
    "LazyValue",
    "StoredPart",
    "StoredShard",
    "StoredWrapper",
    "CheckpointManager",
    "ExportReport",
    "Step",
    "StepBytes",
    "LoadedStep",
    "SaveStatus",
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
    "NotACheckpointError",
    "UnknownNameError",
    "PlanError",
    "ReplicaMismatchError",
    "SaveAbandonedError",
    "SaverProcessError",
    "StepError",
    "UntrustedPickleError",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

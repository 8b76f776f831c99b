"""Checkpointers that keep one file of `torch.save` for each rank: the names of torch's
`torch.distributed.checkpoint._experimental`.

The files are torch's; a rank's file is there whole or not at all. To load with another number of
ranks, or in another layout, use `save` and `load` of `pytest_dcp.checkpoint`.
"""

from typing import TYPE_CHECKING

from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp.checkpoint._experimental.barriers import (
    Barrier,
    BarrierConfig,
    TCPStoreBarrier,
    create_barrier_from_config,
)
from pytest_dcp.checkpoint._experimental.builder import (
    make_async_checkpointer,
    make_sync_checkpointer,
)
from pytest_dcp.checkpoint._experimental.checkpoint_reader import CheckpointReader
from pytest_dcp.checkpoint._experimental.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
    WriterHook,
)
from pytest_dcp.checkpoint._experimental.checkpointer import (
    AsyncCheckpointer,
    Checkpointer,
    SyncCheckpointer,
)
from pytest_dcp.checkpoint._experimental.config import CheckpointerConfig
from pytest_dcp.checkpoint._experimental.staging import (
    CheckpointStager,
    CheckpointStagerConfig,
    DefaultStager,
)
from pytest_dcp.checkpoint._experimental.types import STATE_DICT, RankInfo
from pytest_dcp.checkpoint._experimental.utils import wrap_future

__all__ = [
    "Barrier",
    "TCPStoreBarrier",
    "CheckpointReader",
    "CheckpointWriter",
    "CheckpointWriterConfig",
    "WriterHook",
    "Checkpointer",
    "SyncCheckpointer",
    "AsyncCheckpointer",
    "CheckpointerConfig",
    "BarrierConfig",
    "create_barrier_from_config",
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
    "RankInfo",
    "STATE_DICT",
    "wrap_future",
    "make_sync_checkpointer",
    "make_async_checkpointer",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

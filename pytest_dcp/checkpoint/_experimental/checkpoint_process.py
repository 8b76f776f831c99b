"""Writes in a process: the names of torch's `_experimental.checkpoint_process`.

The messages between rank and process (`RequestType` and the like) are torch's; ours has others.
"""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._experimental.checkpoint_process import (
    CheckpointProcessConfig,
)

from pytest_dcp._engine.rank_files.writer_process import CheckpointProcess
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "CheckpointProcess",
    "CheckpointProcessConfig",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

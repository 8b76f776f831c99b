"""Writes a rank's file: the names of torch's `_experimental.checkpoint_writer`."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._experimental.checkpoint_writer import (
    CheckpointWriterConfig,
    WriterHook,
)

from pytest_dcp._engine.rank_files.writer import CheckpointWriter
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "CheckpointWriter",
    "CheckpointWriterConfig",
    "WriterHook",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

"""Saves and loads: the names of `torch.distributed.checkpoint._experimental.checkpointer`."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._experimental.checkpointer import Checkpointer

from pytest_dcp._engine.rank_files.checkpointers import AsyncCheckpointer, SyncCheckpointer
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "AsyncCheckpointer",
    "Checkpointer",
    "SyncCheckpointer",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

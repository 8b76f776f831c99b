"""Reads a rank's file: the names of torch's `_experimental.checkpoint_reader`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.rank_files.reader import CheckpointReader
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "CheckpointReader",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

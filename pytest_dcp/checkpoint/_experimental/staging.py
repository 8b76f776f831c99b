"""Copies states before they are written: the names of torch's `_experimental.staging`."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._experimental.staging import (
    CheckpointStager,
    CheckpointStagerConfig,
)

from pytest_dcp._engine.rank_files.stager import DefaultStager
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

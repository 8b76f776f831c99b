"""Checkpoints <-> files of `torch.save`: the names of `torch.distributed.checkpoint.format_utils`.

python -m pytest_dcp.checkpoint.format_utils dcp_to_torch FOLDER FILE
python -m pytest_dcp.checkpoint.format_utils torch_to_dcp FILE FOLDER
"""

import sys
from typing import TYPE_CHECKING

from pytest_dcp._engine.conversion.broadcast_reader import (
    BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner,
)
from pytest_dcp._engine.conversion.command import main
from pytest_dcp._engine.conversion.torch_save_files import dcp_to_torch_save, torch_save_to_dcp
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "dcp_to_torch_save",
    "torch_save_to_dcp",
    "BroadcastingTorchSaveReader",
    "DynamicMetaLoadPlanner",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

if __name__ == "__main__":
    sys.exit(main())

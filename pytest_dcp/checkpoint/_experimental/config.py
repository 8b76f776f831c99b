"""Options of a checkpointer: the names of `torch.distributed.checkpoint._experimental.config`."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._experimental.config import CheckpointerConfig

from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "CheckpointerConfig",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

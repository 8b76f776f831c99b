"""Types of ranks and states: the names of `torch.distributed.checkpoint._experimental.types`."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._experimental.types import STATE_DICT, RankInfo

from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "STATE_DICT",
    "RankInfo",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

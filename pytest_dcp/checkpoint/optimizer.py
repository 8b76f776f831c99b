"""Optimizers of FSDP1: the names of `torch.distributed.checkpoint.optimizer`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.state_dicts.sharded_optimizer import load_sharded_optimizer_state_dict
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = ["load_sharded_optimizer_state_dict"]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

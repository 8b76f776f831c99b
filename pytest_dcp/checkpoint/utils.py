"""Look-ups in state dicts: the names of `torch.distributed.checkpoint.utils`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.planners.state_lookup import find_state_dict_object, find_tensor_shard
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = ["find_tensor_shard", "find_state_dict_object"]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

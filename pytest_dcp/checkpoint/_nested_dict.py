"""torch's functions for nested state dicts, which other libraries import."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._nested_dict import (
    FLATTEN_MAPPING,
    flatten_state_dict,
    unflatten_state_dict,
)

from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "FLATTEN_MAPPING",
    "flatten_state_dict",
    "unflatten_state_dict",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

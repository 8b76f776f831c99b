"""torch's functions that walk through state dicts, which other libraries import."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._traverse import (
    OBJ_PATH,
    get_element,
    print_tensor,
    set_element,
    traverse_state_dict,
)

from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "OBJ_PATH",
    "get_element",
    "print_tensor",
    "set_element",
    "traverse_state_dict",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

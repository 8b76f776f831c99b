"""Loading: the public names of `torch.distributed.checkpoint.state_dict_loader`, and ours."""

import inspect
from typing import TYPE_CHECKING

from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.verbs.load import load, load_state_dict, load_without_template

__all__ = ["load_state_dict", "load", "load_without_template"]

_load_state_dict_from_keys = load_without_template
"""torch's name for it, which other libraries import."""

_load_state_dict = inspect.unwrap(load_state_dict)
"""The same, without a warning (torch's name; other libraries import it)."""

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

"""Deep copies of states: the names of `torch.distributed.checkpoint._state_dict_stager`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.staging.state_dict_stager import StateDictStager as StateDictStager
from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

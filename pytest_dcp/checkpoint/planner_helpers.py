"""Functions for planners: the names of `torch.distributed.checkpoint.planner_helpers`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.planners.item_factories import _create_read_items as _create_read_items
from pytest_dcp._engine.planners.item_factories import _create_write_items as _create_write_items
from pytest_dcp._engine.planners.item_factories import create_read_items_for_chunk_list
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = ["create_read_items_for_chunk_list"]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

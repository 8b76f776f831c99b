"""Saves and loads with the same storages: `torch.distributed.checkpoint._checkpointer`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.background.checkpointer import _Checkpointer as _Checkpointer
from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

"""Futures: the names of `torch.distributed.checkpoint._experimental.utils`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.background.futures import wrap_future
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "wrap_future",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

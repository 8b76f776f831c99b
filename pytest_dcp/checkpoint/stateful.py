"""torch's own types, under the same names: they are the protocol between engines."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.stateful import (
    Stateful,
    StatefulT,
)

from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "Stateful",
    "StatefulT",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

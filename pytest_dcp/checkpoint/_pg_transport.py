"""State dicts between ranks: the names of `torch.distributed.checkpoint._pg_transport`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.transport.group_transport import PGTransport

__all__ = ["PGTransport"]

if not TYPE_CHECKING:  # For what is asked by name; type checkers see what is defined above.
    __getattr__ = names_of_torch(__name__)

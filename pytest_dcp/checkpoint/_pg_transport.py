"""State dicts between ranks: the names of `torch.distributed.checkpoint._pg_transport`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.transport.group_transport import PGTransport

__all__ = ["PGTransport"]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

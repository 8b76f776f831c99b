"""Makes checkpointers: the names of `torch.distributed.checkpoint._experimental.builder`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.rank_files.builder import (
    default_subprocess_init_fn,
    default_writer_init_fn,
    make_async_checkpointer,
    make_sync_checkpointer,
)
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "default_subprocess_init_fn",
    "default_writer_init_fn",
    "make_async_checkpointer",
    "make_sync_checkpointer",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

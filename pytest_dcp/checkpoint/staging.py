"""Copying a state before it is saved: public names of `torch.distributed.checkpoint.staging`.

Beyond torch: memory is kept from one copy to the next but never while somebody holds a tensor in
it, and `release_memory` gives back what `async_save` itself keeps.
"""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint.staging import AsyncStager, StagingOptions

from pytest_dcp._engine.staging.stager import BlockingAsyncStager, DefaultStager, release_memory
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "AsyncStager",
    "BlockingAsyncStager",
    "DefaultStager",
    "StagingOptions",
    "release_memory",
]

if not TYPE_CHECKING:  # For what is asked by name; type checkers see what is defined above.
    __getattr__ = names_of_torch(__name__)

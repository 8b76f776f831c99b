"""Copying a state before it is saved: public names of `torch.distributed.checkpoint.staging`.

Beyond torch: memory is reused for the next copy, but never while a tensor in it is still
referenced, and `release_memory` frees the memory that `async_save` itself keeps.
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

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

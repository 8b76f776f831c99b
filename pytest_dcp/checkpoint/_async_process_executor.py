"""Saves in a process: the names of `torch.distributed.checkpoint._async_process_executor`.

Ours is the executor. The other names (`_AsyncCheckpointProcess`, `_ProcessGroupInitInfo` and the
messages between them) are the parts of torch's own background process, which ours does not use:
they are torch's objects, for libraries that build a process of their own from them.
"""

from typing import TYPE_CHECKING

from pytest_dcp._engine.background.executors import (
    _ProcessBasedAsyncCheckpointExecutor as _ProcessBasedAsyncCheckpointExecutor,
)
from pytest_dcp._engine.torch_names import names_of_torch

__all__: list[str] = []

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)

"""Private classes of torch's background saves: libraries ask `isinstance` with them.

They can go when torch gives them public names, or when no library imports them.
"""

from __future__ import annotations

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # The abstract base of ours; libraries subclass it, too.
    from torch.distributed.checkpoint._async_executor import _AsyncCheckpointExecutor

    # Ours are registered as subclasses of these two.
    from torch.distributed.checkpoint._async_process_executor import (
        _ProcessBasedAsyncCheckpointExecutor as _ProcessExecutor,
    )
    from torch.distributed.checkpoint._async_thread_executor import (
        _ThreadBasedAsyncCheckpointExecutor as _ThreadExecutor,
    )

    # The base of ours, which overrides all of its methods: it has no abstract base.
    from torch.distributed.checkpoint._checkpointer import _Checkpointer as _CheckpointerOfTorch

__all__ = [
    "_AsyncCheckpointExecutor",
    "_CheckpointerOfTorch",
    "_ProcessExecutor",
    "_ThreadExecutor",
]

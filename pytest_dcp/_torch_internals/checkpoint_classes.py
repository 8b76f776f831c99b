"""Private classes of `torch.distributed.checkpoint`, which files and users' code hold objects of.

They can go when torch gives them public names; nothing that we define can replace them.
"""

from __future__ import annotations

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # The base of ours, so that it passes for torch's where a training loop asks `isinstance`.
    from torch.distributed.checkpoint import _pg_transport

    # Users pass extensions to storages, and registries of them: the classes must be torch's own.
    from torch.distributed.checkpoint._extension import (
        ExtensionRegistry,
        StreamTransformExtension,
    )

    # The base of ours, for the same reason as that of `_pg_transport`.
    from torch.distributed.checkpoint._state_dict_stager import (
        StateDictStager as StateDictStagerOfTorch,
    )

    # Every `.metadata` file pickles objects of `_StorageInfo`, and plans carry `_StoragePrefix`:
    # torch must read ours, and we torch's. `_StorageWriterTransforms` is what a storage of torch
    # lets a subclass override.
    from torch.distributed.checkpoint.filesystem import (
        _StorageInfo,
        _StoragePrefix,
        _StorageWriterTransforms,
    )

    # How `.metadata` files written since torch 2.1 spell memory formats.
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

__all__ = [
    "_MEM_FORMAT_ENCODING",
    "ExtensionRegistry",
    "StateDictStagerOfTorch",
    "StreamTransformExtension",
    "_pg_transport",
    "_StorageInfo",
    "_StoragePrefix",
    "_StorageWriterTransforms",
]

"""torch's own types, under the same names: they are the protocol between engines."""

from torch.distributed.checkpoint.storage import (
    StorageReader,
    StorageWriter,
    WriteResult,
)

__all__ = [
    "WriteResult",
    "StorageWriter",
    "StorageReader",
]

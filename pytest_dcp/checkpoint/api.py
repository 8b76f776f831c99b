"""torch's own types, under the same names: they are the protocol between engines."""

from torch.distributed.checkpoint.api import (
    CheckpointException,
)

__all__ = [
    "CheckpointException",
]

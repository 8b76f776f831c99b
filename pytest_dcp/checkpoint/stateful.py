"""torch's own types, under the same names: they are the protocol between engines."""

from torch.distributed.checkpoint.stateful import (
    Stateful,
    StatefulT,
)

__all__ = [
    "Stateful",
    "StatefulT",
]

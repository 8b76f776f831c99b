"""Several tensors in one piece of memory, to send them in one message. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BUCKET_BYTES = 1 << 20
"""Small tensors share a message, since each message has a fixed cost: a MiB takes as long to send
as to announce."""

ALIGNMENT = 16
"""Bytes: the largest item of any dtype, so that every tensor can be a view of the memory."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def packed_bytes(self) -> int:
        """Its size in the memory, including padding."""
        return -(-self._nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def _nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, memory: torch.Tensor, at: int) -> torch.Tensor:
        """The tensor that begins at this byte of the memory."""
        return memory[at : at + self._nbytes].view(self.dtype).view(self.shape)


def views(memory: torch.Tensor, specs: Sequence[Spec]) -> list[torch.Tensor]:
    """The tensors that lie one after another in the memory, from its start."""
    found: list[torch.Tensor] = []
    at = 0
    for spec in specs:
        found.append(spec.view(memory, at))
        at += spec.packed_bytes
    return found

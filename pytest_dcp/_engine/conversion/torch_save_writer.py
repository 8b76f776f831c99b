"""Writes the file of `torch.save` from start to end, with one batch of tensors in memory.

The pickle with the values is made first, so that a value that cannot be converted is refused before
anything is written. Then the tensors are read and written, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from pytest_dcp._engine.conversion.converted_contents import ConvertedContents
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.state_dict_archive import (
    PlacedTensor,
    StateDictArchive,
    pickle_state_dict,
)
from pytest_dcp._engine.huggingface.consolidate import Report
from pytest_dcp._engine.io.disk import Buffer, Out
from pytest_dcp._engine.io.tensor_batches import Slab, batch_slabs
from pytest_dcp._engine.io.tensor_memory import memory_of

BUDGET_BYTES = 32 << 20
"""Of tensors in memory: enough that reading and writing a batch costs more than the calls."""
PIECE_BYTES = 1 << 20
"""Hashed and written at a time: fits the second-level cache."""

ReadSlabs = Callable[[Sequence[Slab]], list[torch.Tensor]]


class TorchSaveWriter:
    """The contents of a state dict, to be written."""

    def __init__(self, contents: ConvertedContents) -> None:
        """Reads the values.

        Raises UntrustedPickleError and CheckpointMismatchError for values and containers of classes
        that are not allowed.
        """
        self._tensors = contents.tensors.values()
        self._placed = {
            tensor.name: PlacedTensor(str(n), tensor.dtype, tensor.shape)
            for n, tensor in enumerate(self._tensors)
        }
        placed = self._placed
        self._pickled, self._others = pickle_state_dict(
            contents.build_state(
                lambda name: placed[name] if name in placed else contents.read_value(name)
            )
        )

    def write(self, out: Out, read: ReadSlabs, budget_bytes: int, report: Report) -> None:
        """Write the whole file. read: gives parts of the tensors, valid until its next call."""
        out.reserve(sum(tensor.nbytes for tensor in self._tensors))
        records = _TensorRecords(StateDictArchive(), self._placed, out)
        for tensor in self._tensors:
            if not tensor.nbytes:
                records.put(tensor.name, memoryview(b""), report)
        for batch in batch_slabs(self._tensors, budget_bytes):
            parts = read(batch)  # Kept until the flush: a view does not keep memory alive.
            for slab, part in zip(batch, parts, strict=True):
                records.put(slab.fqn, memory_of(part), report)
            records.flush()
        out.write([*records.pending, *records.archive.close(self._pickled, self._others)])


class _TensorRecords:
    """The records of the tensors, each written part by part."""

    def __init__(
        self, archive: StateDictArchive, placed: Mapping[str, PlacedTensor], out: Out
    ) -> None:
        self.archive = archive
        self.pending: list[Buffer] = []
        """To be written next."""
        self._pending_bytes = 0
        self._placed = placed
        self._out = out
        self._crc = self._filled = 0
        """Of the current tensor: the checksum so far, and its bytes."""

    def put(self, name: str, part: memoryview, report: Report) -> None:
        """Add the next part of a tensor; `flush` before its memory is used again."""
        tensor = self._placed[name]
        if not self._filled:
            self.pending.append(self.archive.begin(tensor))
        for start in range(0, len(part), PIECE_BYTES):
            piece = part[start : start + PIECE_BYTES]
            self._crc = crc32(piece, self._crc)
            self.pending.append(piece)
            self._pending_bytes += len(piece)
            if self._pending_bytes >= PIECE_BYTES:
                self.flush()
        self._filled += len(part)
        if self._filled == tensor.nbytes:
            self.pending.append(self.archive.end(tensor, self._crc))
            self._crc = self._filled = 0
            report(name)

    def flush(self) -> None:
        """Write the parts that are pending."""
        self._out.write(self.pending)
        self._out.begin_sync()
        self.pending, self._pending_bytes = [], 0

"""A sharded checkpoint -> files of full tensors, with bounded memory.

Every full tensor is cut into slabs that are runs of its file. Slabs are gathered into batches; a
batch is read from the shards in the order of their files, checked, and written in one go. Each
thread uses at most `BATCH_BYTES` of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.safetensors_header import StoredTensor, encode, place_tensors
from pytest_dcp._engine.io.copy_plan import Targets, copies
from pytest_dcp._engine.io.disk import Out
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_copies import CopyRequest, ReadSettings, read_copies
from pytest_dcp._engine.io.tensor_batches import Slab, batch_slabs
from pytest_dcp._engine.io.tensor_memory import memory_of
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.plan.boxes import pad_rows
from pytest_dcp._engine.plan.columns import size_of
from pytest_dcp._engine.plan.describe import Wanted
from pytest_dcp._engine.plan.load import read_items

BATCH_BYTES = 32 << 20
"""Large enough that reading and writing a batch costs more than the calls for it."""


class SlabSource(Protocol):
    """Where the full tensors come from."""

    def tensors(self, fqns: Sequence[str]) -> list[StoredTensor]:
        """These tensors in the order of a file."""

    def read(self, parts: Sequence[Slab], observer: Observer) -> list[torch.Tensor]:
        """The parts' values, in their order; valid until the thread's next read."""


Report = Callable[[str], None]
"""Called with the name of each tensor that is written."""


def report_nothing(name: str) -> None:
    """The report of a conversion that shows no progress."""


@dataclass(frozen=True, slots=True)
class Shards:
    """A sharded checkpoint in a folder."""

    folder: Folder
    catalog: Catalog

    def tensors(self, fqns: Sequence[str]) -> list[StoredTensor]:
        """These tensors in the order of a file."""
        index = self.catalog.index
        rows = [index.row_of[fqn] for fqn in fqns]
        return order_tensors(
            (
                index.fqns[row],
                index.properties[index.property_of[row]].dtype,
                tuple(size_of(index.size[row], int(index.ndim[row]))),
            )
            for row in rows
        )

    def read(self, parts: Sequence[Slab], observer: Observer) -> list[torch.Tensor]:
        """The parts' values, in their order."""
        index = self.catalog.index
        rank = index.size.shape[1]
        boxes = Wanted(
            fqns=tuple(part.fqn for part in parts),
            ndim=np.array([len(part.shape) for part in parts], dtype=np.int16),
            offset=pad_rows([part.offset for part in parts], rank, 0),
            shape=pad_rows([part.shape for part in parts], rank, 1),
            nth=np.arange(len(parts), dtype=np.int64),
        )
        items = read_items(boxes, index)
        tensors = [torch.empty(part.shape, dtype=part.dtype) for part in parts]
        if not len(items):
            return tensors
        rows = np.arange(len(items), dtype=np.int64)
        nth: list[int] = items.wanted_hint.tolist()
        found = copies(items, Targets(rows, [tensors[n] for n in nth]), index, {})
        request = CopyRequest(self.folder, self.catalog, items, found, ReadSettings(), observer)
        read_copies(request)
        return tensors


def consolidate(
    source: SlabSource,
    folder: Folder,
    files: Mapping[str, Sequence[str]],
    metadata: Mapping[str, str],
    *,
    threads: int = 1,
    sync: bool = True,
    batch_bytes: int | None = None,
    report: Report = report_nothing,
) -> int:
    """Write the files; returns the bytes of all tensors.

    files: the names of the files to write into `folder`, and the tensors of each. metadata: the
    `__metadata__` of each. batch_bytes: the memory of each thread; None: BATCH_BYTES.
    report: called with the name of each tensor that is written, from any thread.

    Raises CheckpointCorruptError if the source's shards do not make a tensor whole.
    """

    limit = batch_bytes or BATCH_BYTES

    def job(name: str, fqns: Sequence[str]) -> Callable[[StopFlag], int]:
        file = SafetensorsToWrite(name, source.tensors(fqns), metadata)

        def write(stop: StopFlag) -> int:
            with folder.create(file.name) as out:
                write_safetensors(
                    out, file, source, stop, batch_bytes=limit, sync=sync, report=report
                )
                if sync:
                    out.sync()
            return sum(tensor.nbytes for tensor in file.tensors)

        return write

    return sum(run_all([job(*file) for file in files.items()], threads))


@dataclass(frozen=True, slots=True)
class SafetensorsToWrite:
    """A file to be."""

    name: str
    tensors: Sequence[StoredTensor]
    metadata: Mapping[str, str]


def write_safetensors(
    out: Out,
    file: SafetensorsToWrite,
    source: SlabSource,
    stop: StopFlag,
    *,
    batch_bytes: int,
    sync: bool = True,
    report: Report = report_nothing,
) -> None:
    """Write the header and all tensors. sync: whether the caller will sync the file."""
    out.write([encode(file.tensors, file.metadata)])
    remaining_bytes = {tensor.name: tensor.nbytes for tensor in file.tensors}
    for name in [name for name, nbytes in remaining_bytes.items() if not nbytes]:
        report(name)
    for batch in batch_slabs(file.tensors, batch_bytes):
        stop.check()
        parts = source.read(batch, Observer("load"))  # Kept: a view does not keep memory alive.
        out.write([memory_of(part) for part in parts])
        if sync:
            out.begin_sync()
        for slab in batch:
            remaining_bytes[slab.fqn] -= slab.nbytes
            if not remaining_bytes[slab.fqn]:
                report(slab.fqn)


def order_tensors(
    kinds: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
) -> list[StoredTensor]:
    """The tensors in the order of a file: wide elements first, so that all are aligned."""
    return place_tensors(sorted(kinds, key=lambda kind: -kind[1].itemsize))

"""The data files of a simulated save: their names and lengths, and where each entry is.

The files of a `FileSystemWriter` follow from the plan alone: an entry's length from dtype and
shape, the number of its checksums from its bytes, the file of each row from the rows' bytes. So a
rank's `WriteColumns` can be made without the data; only the checksums themselves are zeros.

Pure (no I/O).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pytest_dcp._engine.format.catalog import BLOCK_BYTES
from pytest_dcp._engine.format.entry import tensor_frame
from pytest_dcp._engine.format.write_results import WriteColumns
from pytest_dcp._engine.io.commit import data_name
from pytest_dcp._engine.io.write_files import balance_by_bytes
from pytest_dcp._engine.plan.boxes import Ints, row_bounds
from pytest_dcp._engine.plan.columns import BYTES, WriteItems

SAVE_ID = "0" * 32
"""In the names of a simulated save's files, where a save has an id of its own."""


@dataclass(frozen=True, slots=True)
class FileRules:
    """The writer's options that decide about files and metadata."""

    thread_count: int = 1
    single_file_per_rank: bool = True
    checkpoint_id: str | os.PathLike[str] = ""


@dataclass(frozen=True, slots=True, eq=False)
class EntrySizes:
    """Of each row of a table, in bytes."""

    head: Ints
    """Before the tensor's data; 0 for a value."""
    data: Ints
    """Of the tensor's data, or of a value's whole entry."""
    length: Ints
    sums: Ints
    """How many checksums."""


@dataclass(slots=True)
class FilePlanner:
    """Plans the files of one rank after the other; shares the results of lookalikes."""

    rules: FileRules
    _sizes: dict[int, tuple[Ints, EntrySizes]] = field(default_factory=dict)
    _whole: dict[int, WriteColumns] = field(default_factory=dict)
    """By the sizes that ranks share which write all their rows."""

    def plan_files(
        self, rank: int, chosen: WriteItems, value_bytes: Mapping[str, int]
    ) -> WriteColumns:
        """Where the rank's rows go."""
        origin = chosen.origin
        table, rows = (chosen, None) if origin is None else (origin.table, origin.rows)
        everything = rows is None or len(rows) == len(table)
        sizes = self._sizes_of(table, value_bytes)
        if rows is not None and not everything:
            parts = (sizes.head, sizes.data, sizes.length, sizes.sums)
            return _columns_of(rank, chosen, EntrySizes(*(one[rows] for one in parts)), self.rules)
        key = id(sizes)
        if key not in self._whole:
            self._whole[key] = _columns_of(rank, chosen, sizes, self.rules)
        whole = self._whole[key]
        return replace(whole, files=_file_names(rank, len(whole.files)))

    def _sizes_of(self, table: WriteItems, value_bytes: Mapping[str, int]) -> EntrySizes:
        """The sizes of a table's entries, made once for the tables that share their shapes."""
        key = id(table.shape)
        if key not in self._sizes:
            # The array is chosen, so that no other one gets its id.
            self._sizes[key] = table.shape, _entry_sizes(table, value_bytes)
        return self._sizes[key][1]


def _entry_sizes(table: WriteItems, value_bytes: Mapping[str, int]) -> EntrySizes:
    head, data, length = (np.zeros(len(table), dtype=np.int64) for _ in range(3))
    kinds, ndims, shapes = table.kind.tolist(), table.ndim.tolist(), table.shape.tolist()
    properties, property_of = table.properties, table.property_of.tolist()
    for row, (kind, ndim) in enumerate(zip(kinds, ndims, strict=True)):
        if kind == BYTES:
            data[row] = length[row] = value_bytes[table.fqns[row]]
            continue
        frame = tensor_frame(properties[property_of[row]].dtype, tuple(shapes[row][:ndim]))
        head[row], data[row], length[row] = len(frame.head), frame.data_nbytes, frame.length
    return EntrySizes(head, data, length, -(-data // BLOCK_BYTES))


def _file_names(rank: int, count: int) -> tuple[str, ...]:
    return tuple(data_name(f"__{rank}_", number, SAVE_ID[:12]) for number in range(count))


def _columns_of(rank: int, chosen: WriteItems, sizes: EntrySizes, rules: FileRules) -> WriteColumns:
    count = len(chosen)
    files = 1
    if not rules.single_file_per_rank:
        groups = [[row] for row in range(count)]
        files = count
    elif rules.thread_count > 1 and count > 1:
        groups = balance_by_bytes(chosen.size_bytes(), rules.thread_count)
        files = len(groups)
    else:
        groups = []
    start = np.zeros(count, dtype=np.int64)
    file = np.zeros(count, dtype=np.int32)
    if groups:
        for number, some in enumerate(groups):
            rows = np.array(some, dtype=np.int64)
            start[rows] = row_bounds(sizes.length[rows])[:-1]
            file[rows] = number
    else:
        start = row_bounds(sizes.length)[:-1]
    first_sum = row_bounds(sizes.sums)
    return WriteColumns(
        files=_file_names(rank, files),
        file=file,
        start=start,
        length=sizes.length,
        data_start=start + sizes.head,
        data_nbytes=sizes.data,
        first_sum=first_sum,
        sums=np.broadcast_to(np.zeros(1, dtype=np.uint32), (int(first_sum[-1]),)),
    )

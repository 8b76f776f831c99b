"""Data files in the safetensors format: plain tensors behind one header, not torch's entries.

`write_safetensors` corresponds to `io.write_files.write_files` for torch's files; the header itself
is made by `format.safetensors_header`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.distributed.checkpoint.planner import WriteItem

from pytest_dcp._engine.format.catalog import BLOCK_BYTES
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.safetensors_header import (
    SHARDING_KEY,
    encode,
    place_tensors,
    sharding_of,
    unique_names,
)
from pytest_dcp._engine.format.wrapper_entry import WrapperEntry
from pytest_dcp._engine.format.write_results import WriteColumns
from pytest_dcp._engine.io.block_sums import block_sums
from pytest_dcp._engine.io.tensor_memory import is_flat, memory_of
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.io.write_files import (
    File,
    Rows,
    Settings,
    WriteRequest,
    put_data,
    written_rows,
)
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp.errors import PlanError


def write_safetensors(
    request: WriteRequest,
    items: Sequence[WriteItem],
    metadata: Mapping[str, str] | None = None,
) -> WriteColumns:
    """Write the files; returns where every row went. Like `write_files`, but an entry is only the
    data.

    items: the contents of the rows. A value's bytes are stored as a row of U8. metadata: each
    file's `__metadata__`.

    Raises TypeError naming a tensor that the format cannot hold.
    """
    settings, jobs = request.settings, request.jobs
    if not settings.is_plain:
        raise ValueError("stream transforms do not go with safetensors files: drop one of the two")
    table = WriteItems.of(items)

    def job(number: int) -> Callable[[StopFlag], Rows]:
        def run(stop: StopFlag) -> Rows:
            name, rows = jobs[number].name, jobs[number].rows
            # The header comes first, so every row must be available; they are references.
            data = {row: request.source(row) for row in rows}
            with request.folder.create(name) as out:
                file = File(out, request.observer, stop, sync=settings.sync)
                file_rows = _put_file(file, data, table, metadata or {}, settings)
                file.flush()
                file.sync()
            return file_rows

        return run

    file_rows = run_all([job(number) for number in range(len(jobs))], settings.threads)
    return written_rows(file_rows, [job.name for job in jobs], settings)


def _put_file(
    file: File,
    data: Mapping[int, torch.Tensor | bytes],
    table: WriteItems,
    metadata: Mapping[str, str],
    settings: Settings,
) -> Rows:
    names = unique_names({row: table.fqns[row] for row in data})
    kinds = {row: _kind(names[row], value) for row, value in data.items()}
    # Wide elements first, so that every tensor's data is aligned for its dtype.
    order = sorted(data, key=lambda row: -kinds[row][1].itemsize)
    tensors = place_tensors(kinds[row] for row in order)
    metadata = {SHARDING_KEY: sharding_of(table, names), **metadata}
    file.put(encode(tensors, metadata))
    written = Rows()
    for row, tensor in zip(order, tensors, strict=True):
        start = file.position
        sums = _put(file, data[row], settings)
        written.add(row, start, tensor.nbytes, start, tensor.nbytes, sums)
    return written


def _kind(name: str, data: torch.Tensor | bytes) -> tuple[str, torch.dtype, tuple[int, ...]]:
    if type(data) is WrapperEntry:
        raise PlanError(
            f"{data.fqn!r} is a DTensor of a wrapper of other tensors, which a safetensors file "
            "cannot hold: save it in the usual format"
        )
    if isinstance(data, bytes):
        return name, torch.uint8, (len(data),)
    if data.layout != torch.strided:
        raise TypeError(f"{name!r} is {data.layout}: safetensors files hold dense tensors only")
    return name, data.dtype, tuple(data.shape)


def _put(file: File, data: torch.Tensor | bytes, settings: Settings) -> list[int]:
    """Write the data; its checksums."""
    if isinstance(data, bytes):
        file.put(data)
        return block_sums(data)
    if is_flat(data) and data.numel() * data.itemsize <= BLOCK_BYTES:
        memory = bytes(memory_of(data))
        file.put(memory, len(memory))
        return [crc32(memory)] if memory else []
    return put_data(file, data, settings)

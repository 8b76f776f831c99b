"""Writes the tensors of a conversion to a folder of safetensors files, in one process or several.

Each file is a job of its own. All have temporary names until one commit makes them the folder's
checkpoint, see `huggingface.file_names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from pytest_dcp._engine.background.worker import send_advance
from pytest_dcp._engine.conversion.converted_contents import ConvertedTensor, TensorsToConvert
from pytest_dcp._engine.conversion.worker_processes import opened_source, run_orders
from pytest_dcp._engine.format.safetensors_header import StoredTensor
from pytest_dcp._engine.huggingface.consolidate import (
    Report,
    SafetensorsToWrite,
    order_tensors,
    write_safetensors,
)
from pytest_dcp._engine.huggingface.consolidated_folder import ConsolidatedFolder, assign_files
from pytest_dcp._engine.huggingface.folder import next_number, remove_leftovers
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.tensor_batches import Slab
from pytest_dcp._engine.io.threads import StopFlag
from pytest_dcp._engine.storages.folder_metadata import new_id


class TensorsOfSource:
    """The target's tensors as slabs: see `consolidate.SlabSource`."""

    def __init__(self, contents: TensorsToConvert) -> None:
        self._contents = contents

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._contents.tensors)

    def tensors(self, fqns: Sequence[str]) -> list[StoredTensor]:
        """These tensors in the order of a file."""
        found = (self._contents.tensors[fqn] for fqn in fqns)
        return order_tensors((tensor.name, tensor.dtype, tensor.shape) for tensor in found)

    def read(self, parts: Sequence[Slab], observer: Observer) -> list[torch.Tensor]:
        """The parts' values, in their order; valid until the thread's next read."""
        return self._contents.read_slabs(parts)


@dataclass(frozen=True, slots=True)
class WriteSettings:
    """How the files of a folder are written."""

    metadata: Mapping[str, str]
    """Texts for the headers."""
    budget_bytes: int
    """Memory for tensors, of each thread; the processes share it."""
    threads: int
    """Files that are written at the same time, in one process."""
    processes: int


def write_folder(
    contents: TensorsToConvert,
    folder: Folder,
    numbers: Mapping[str, int],
    settings: WriteSettings,
    report: Report,
) -> int:
    """Write the files and their index; returns the bytes that other processes have read.

    numbers: of each tensor's file, from 1.
    """
    for above in folder.make():
        folder.disk.sync_folder(above)
    remove_leftovers(folder)
    output = ConsolidatedFolder(folder, assign_files(numbers, numbers), new_id()[:12], sync=True)
    bytes_read = 0
    try:
        if settings.processes > 1:
            bytes_read = _write_in_processes(contents, output, settings, report)
        else:
            output.write(
                TensorsOfSource(contents),
                output.files,
                number=next_number(folder),
                threads=settings.threads,
                batch_bytes=settings.budget_bytes,
                metadata=settings.metadata,
                report=report,
            )
        _commit(output, sum(tensor.nbytes for tensor in contents.tensors.values()))
    except BaseException:
        output.remove_unfinished()
        raise
    return bytes_read


@dataclass(frozen=True, slots=True)
class WriteSafetensorsFile:
    """Write one file of the folder, in another process; the bytes read from the source."""

    folder: Folder
    file: SafetensorsToWrite
    tensors: tuple[ConvertedTensor, ...]
    budget_bytes: int

    def run(self, line: Connection) -> int:
        """Carry it out; each tensor is one step of progress."""
        contents = TensorsToConvert(opened_source(), self.tensors)
        before = contents.checkpoint.bytes_read
        with self.folder.create(self.file.name) as out:
            write_safetensors(
                out,
                self.file,
                TensorsOfSource(contents),
                StopFlag(),
                batch_bytes=self.budget_bytes,
                report=lambda name: send_advance(line, 1),
            )
            out.sync()
        return contents.checkpoint.bytes_read - before


def _write_in_processes(
    contents: TensorsToConvert,
    output: ConsolidatedFolder,
    settings: WriteSettings,
    report: Report,
) -> int:
    source = TensorsOfSource(contents)
    metadata = output.name_save(next_number(output.folder), settings.metadata)
    orders = [
        WriteSafetensorsFile(
            output.folder,
            SafetensorsToWrite(name, source.tensors(fqns), metadata),
            tuple(contents.tensors[fqn] for fqn in fqns),
            max(1, settings.budget_bytes // settings.processes),
        )
        for name, fqns in output.files.items()
    ]
    return sum(run_orders(contents.checkpoint, orders, settings.processes, report))


def _commit(output: ConsolidatedFolder, nbytes: int) -> None:
    try:
        output.commit(nbytes)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno,
            "a file of this conversion is gone: does another save write to the same folder?",
            error.filename,
        ) from error

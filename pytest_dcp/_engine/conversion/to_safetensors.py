"""Any checkpoint -> a safetensors file, or a folder of them with Hugging Face's index.

A file gets its name, and a folder its index, when everything is written and synced; see
`huggingface.file_names` for the outcome of a crash in a folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pytest_dcp._engine.conversion.changes import Changes, Dtypes, Patterns
from pytest_dcp._engine.conversion.converted_contents import (
    ConversionReport,
    ConvertedContents,
    Source,
    open_source,
)
from pytest_dcp._engine.conversion.safetensors_folder import (
    TensorsOfSource,
    WriteSettings,
    write_folder,
)
from pytest_dcp._engine.conversion.target_paths import split_options, target_file, target_folder
from pytest_dcp._engine.conversion.whole_file import remove_if_new, write_whole_file
from pytest_dcp._engine.conversion.worker_processes import choose_processes
from pytest_dcp._engine.format.safetensors_header import METADATA_KEY, NAMES
from pytest_dcp._engine.huggingface.consolidate import (
    BATCH_BYTES,
    Report,
    SafetensorsToWrite,
    report_nothing,
    write_safetensors,
)
from pytest_dcp._engine.huggingface.file_layout import FORMAT
from pytest_dcp._engine.huggingface.file_names import SUFFIX
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.threads import StopFlag
from pytest_dcp._engine.plan.select import Rename
from pytest_dcp.errors import CheckpointMismatchError
from pytest_dcp.tracebacks import drop_inner_frames

PathLike = str | os.PathLike[str]
FILE_BYTES = 5_000_000_000
"""Hugging Face's limit for a file (`max_shard_size` of transformers)."""
SHOWN = 5
RESERVED = "DCP_"
"""Keys of the headers that say which save a file is of, and where its parts belong."""


@drop_inner_frames
def to_safetensors(
    source: Source,
    target: PathLike,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rename: Rename | None = None,
    dtype: Dtypes | None = None,
    skip_values: bool = False,
    max_file_bytes: int = FILE_BYTES,
    budget_bytes: int = BATCH_BYTES,
    thread_count: int = 1,
    processes: int | None = 1,
    metadata: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    report: Report = report_nothing,
) -> ConversionReport:
    """Convert a checkpoint to safetensors. No process group is used.

    source: a path or URL that `open_checkpoint` takes, or an open checkpoint.
    target: a file, if its name ends in .safetensors; otherwise a folder, for files and their index.
    include, exclude: names or patterns of the source. rename: from its names to the target's.
    dtype: for all tensors of floating point, or by pattern of the source's names.
    skip_values: leave out Python values, which the format cannot hold.
    max_file_bytes: of tensors in each file of a folder; a larger tensor has a file of its own.
    budget_bytes: memory for tensors, of each thread; several processes share it.
    thread_count: files of a folder that one process writes at the same time.
    processes: that write files of a folder, on Linux; None: several if the work is large.
    metadata: further texts for the files' headers; keys that begin with DCP_ are the engine's.
    storage_options: of the file systems of URLs, of source and target: keys, endpoints.
    report: called with the name of each tensor that is written, from any thread.

    A failure leaves no file, and a folder as it was. Raises CheckpointMismatchError for values,
    names and dtypes that the format lacks, and names that are not there; CheckpointCorruptError for
    a damaged source; OSError if the target cannot be written.
    """
    changes = Changes(include, exclude, rename, dtype)
    source_options, target_options = split_options(source, target, storage_options)
    is_file = os.fspath(target).endswith(SUFFIX)
    folder, name = (
        target_file(target, target_options)
        if is_file
        else (target_folder(target, target_options), "")
    )
    _check_counts(budget_bytes, max_file_bytes, thread_count)
    texts = {**FORMAT, **_check_metadata(metadata or {})}
    with open_source(source, changes, source_options) as contents:
        left_out = _refuse_values(contents, skip=skip_values)
        _check_dtypes(contents)
        _check_names(contents)
        numbers = _split(contents, max_file_bytes)
        nbytes = sum(tensor.nbytes for tensor in contents.tensors.values())
        jobs = 1 if is_file else max(numbers.values())
        count = choose_processes(processes, nbytes, jobs, contents.checkpoint.where, target)
        settings = WriteSettings(texts, budget_bytes, thread_count, count)
        bytes_read = 0
        if is_file:
            _write_file(contents, folder, name, settings, report)
        else:
            with remove_if_new(folder):
                bytes_read = write_folder(contents, folder, numbers, settings, report)
        return contents.report(values=0, left_out=left_out, bytes_read=bytes_read)


def _write_file(
    contents: ConvertedContents, folder: Folder, name: str, settings: WriteSettings, report: Report
) -> None:
    tensors = TensorsOfSource(contents)
    with write_whole_file(folder, name) as out:
        file = SafetensorsToWrite(name, tensors.tensors(tensors.names()), settings.metadata)
        write_safetensors(
            out, file, tensors, StopFlag(), batch_bytes=settings.budget_bytes, report=report
        )


def _split(contents: ConvertedContents, max_file_bytes: int) -> dict[str, int]:
    """The number of each tensor's file, in the source's order."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in contents.tensors.items():
        if filled and filled + tensor.nbytes > max_file_bytes:
            number, filled = number + 1, 0
        filled += tensor.nbytes
        numbers[name] = number
    return numbers


def _refuse_values(contents: ConvertedContents, *, skip: bool) -> list[str]:
    """The source's names of values, if they may be left out."""
    names = list(contents.values.values())
    if names and not skip:
        raise CheckpointMismatchError(
            f"safetensors files hold tensors only, and {len(names)} of the names are values, such "
            f"as {names[:SHOWN]!r}: exclude them, or leave out values "
            "(skip_values=True, --skip-values)",
            mismatched=tuple(names),
        )
    return names


def _check_dtypes(contents: ConvertedContents) -> None:
    without = [f"{t.name!r} ({t.dtype})" for t in contents.tensors.values() if t.dtype not in NAMES]
    if without:
        raise CheckpointMismatchError(
            f"safetensors files have no dtype for {', '.join(without[:SHOWN])}: exclude them, or "
            "give another dtype"
        )
    if not contents.tensors:
        raise CheckpointMismatchError("no tensor is left to convert")


def _check_names(contents: ConvertedContents) -> None:
    """The header of a file is JSON in UTF-8, where one key is taken."""
    without = [n for n in contents.tensors if n == METADATA_KEY or not _is_encodable(n)]
    if without:
        raise CheckpointMismatchError(
            f"safetensors files cannot hold tensors of the names {without[:SHOWN]!r}: exclude or "
            "rename them",
            mismatched=tuple(without),
        )


def _is_encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_metadata(metadata: Mapping[str, str]) -> Mapping[str, str]:
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata maps str to str, got {key!r}: {text!r}")
        if key.startswith(RESERVED) or not _is_encodable(key + text):
            raise ValueError(
                f"metadata {key!r}: {text!r} is not possible: keys that begin with {RESERVED} are "
                "the engine's, and all texts are UTF-8"
            )
    return metadata


def _check_counts(budget_bytes: int, max_file_bytes: int, thread_count: int) -> None:
    for name, value in (("budget_bytes", budget_bytes), ("max_file_bytes", max_file_bytes)):
        if value < 1:
            raise ValueError(f"{name} must be a positive number of bytes, got {value}")
    if thread_count < 1:
        raise ValueError(f"thread_count must be 1 or more, got {thread_count}")

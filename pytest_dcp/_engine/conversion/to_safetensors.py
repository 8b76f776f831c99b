"""Any checkpoint -> a safetensors file, or a folder of them with Hugging Face's index.

A file gets its name, and a folder its index, when everything is written and synced; see
`huggingface.file_names` for the outcome of a crash in a folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from pytest_dcp._engine.conversion.changes import Changes, Dtypes, Patterns
from pytest_dcp._engine.conversion.converted_contents import (
    ConversionReport,
    ConvertedContents,
    Source,
    open_source,
)
from pytest_dcp._engine.conversion.target_paths import target_file, target_folder
from pytest_dcp._engine.conversion.whole_file import remove_if_new, write_whole_file
from pytest_dcp._engine.format.safetensors_header import METADATA_KEY, NAMES, StoredTensor
from pytest_dcp._engine.huggingface.consolidate import (
    BATCH_BYTES,
    SafetensorsToWrite,
    order_tensors,
    write_safetensors,
)
from pytest_dcp._engine.huggingface.consolidated_folder import ConsolidatedFolder, assign_files
from pytest_dcp._engine.huggingface.file_layout import FORMAT
from pytest_dcp._engine.huggingface.file_names import SUFFIX
from pytest_dcp._engine.huggingface.folder import next_number, remove_leftovers
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.tensor_batches import Slab
from pytest_dcp._engine.io.threads import StopFlag
from pytest_dcp._engine.plan.select import Rename
from pytest_dcp._engine.storages.folder_metadata import new_id
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
    metadata: Mapping[str, str] | None = None,
) -> ConversionReport:
    """Convert a checkpoint to safetensors. No process group is used.

    source: a path or URL that `open_checkpoint` takes, or an open checkpoint.
    target: a file, if its name ends in .safetensors; otherwise a folder, for files and their index.
    include, exclude: names or patterns of the source. rename: from its names to the target's.
    dtype: for all tensors of floating point, or by pattern of the source's names.
    skip_values: leave out Python values, which the format cannot hold.
    max_file_bytes: of tensors in each file of a folder; a larger tensor has a file of its own.
    budget_bytes: memory for tensors, of each thread. thread_count: files written at the same time.
    metadata: further texts for the files' headers; keys that begin with DCP_ are the engine's.

    A failure leaves no file, and a folder as it was. Raises CheckpointMismatchError for values,
    names and dtypes that the format lacks, and names that are not there; CheckpointCorruptError for
    a damaged source; OSError if the target cannot be written.
    """
    changes = Changes(include, exclude, rename, dtype)
    is_file = os.fspath(target).endswith(SUFFIX)
    folder, name = target_file(target) if is_file else (target_folder(target), "")
    _check_counts(budget_bytes, max_file_bytes, thread_count)
    texts = {**FORMAT, **_check_metadata(metadata or {})}
    with open_source(source, changes) as contents:
        left_out = _refuse_values(contents, skip=skip_values)
        _check_dtypes(contents)
        _check_names(contents)
        tensors = _TensorsOfSource(contents)
        if is_file:
            _write_file(tensors, folder, name, texts, budget_bytes)
        else:
            with remove_if_new(folder):
                files = _split(contents, max_file_bytes)
                _write_folder(tensors, folder, files, texts, budget_bytes, thread_count)
        return contents.report(values=0, left_out=left_out)


class _TensorsOfSource:
    """The target's tensors as slabs: see `consolidate.SlabSource`."""

    def __init__(self, contents: ConvertedContents) -> None:
        self._contents = contents

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._contents.tensors)

    def tensors(self, fqns: Sequence[str]) -> list[StoredTensor]:
        found = (self._contents.tensors[fqn] for fqn in fqns)
        return order_tensors((tensor.name, tensor.dtype, tensor.shape) for tensor in found)

    def read(self, parts: Sequence[Slab], observer: Observer) -> list[torch.Tensor]:
        return self._contents.read_slabs(parts)


def _write_file(
    tensors: _TensorsOfSource,
    folder: Folder,
    name: str,
    metadata: Mapping[str, str],
    budget_bytes: int,
) -> None:
    with write_whole_file(folder, name) as out:
        file = SafetensorsToWrite(name, tensors.tensors(tensors.names()), metadata)
        write_safetensors(out, file, tensors, StopFlag(), batch_bytes=budget_bytes)


def _write_folder(
    tensors: _TensorsOfSource,
    folder: Folder,
    files: Mapping[str, int],
    metadata: Mapping[str, str],
    budget_bytes: int,
    thread_count: int,
) -> None:
    for above in folder.make():
        folder.disk.sync_folder(above)
    remove_leftovers(folder)
    output = ConsolidatedFolder(folder, assign_files(files, files), new_id()[:12], sync=True)
    try:
        nbytes = output.write(
            tensors,
            output.files,
            number=next_number(folder),
            threads=thread_count,
            batch_bytes=budget_bytes,
            metadata=metadata,
        )
        _commit(output, nbytes)
    except BaseException:
        output.remove_unfinished()
        raise


def _commit(output: ConsolidatedFolder, nbytes: int) -> None:
    try:
        output.commit(nbytes)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            error.errno,
            "a file of this conversion is gone: does another save write to the same folder?",
            error.filename,
        ) from error


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

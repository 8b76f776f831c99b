"""Every byte of an opened checkpoint checked; all problems are collected.

files      each data file that the index names is there
index      the page of each chunk's numbers, where the index is large; the pickle for torch
coverage   the shards of every tensor are all of it, and disjoint
contents   every shard is read, with the checksum of every block; every value is decoded; of a
           wrapper of other tensors, each of these is read
common     Megatron-Core's `common.pt` is read, where there is one
strays     files in the folder that the checkpoint does not name
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pytest_dcp._engine.format.shared_names import why_missing
from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint
from pytest_dcp._engine.lazy_reading.tensor_slabs import iterate_slabs
from pytest_dcp._engine.lazy_reading.wrapped_elements import iterate_elements
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    UntrustedPickleError,
)


@dataclass(frozen=True, slots=True)
class FoundProblem:
    """Something that is wrong with a checkpoint."""

    name: str | None
    """The tensor or value; None for a file."""
    text: str


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """The result of checking a checkpoint."""

    problems: tuple[FoundProblem, ...]
    names: int
    """Tensors and values that were read."""
    bytes_read: int
    unchecked: int
    """Names without checksums, as torch's and safetensors' files have none: they are only read."""
    strays: tuple[str, ...]
    """Files in the folder that the checkpoint does not name; not counted as a problem."""
    foreign: tuple[str, ...]
    """Values of classes that are not plain data: their bytes are checked, they are not decoded."""


def verify_checkpoint(
    checkpoint: OpenCheckpoint, report: Callable[[str], None] = lambda name: None
) -> VerificationReport:
    """Read and check everything. The checkpoint must have been opened with verify="full".

    report: called with each name before it is read.
    """
    problems = [
        FoundProblem(None, f"the data file {file!r} is missing{why_missing(file)}")
        for file in checkpoint.missing_files
    ]
    unchecked = 0
    try:
        problems += [FoundProblem(None, text) for text in checkpoint.find_coverage_problems()]
        unchecked = checkpoint.count_without_checksums()
    except CheckpointCorruptError as error:
        # Of a large index, whose names can be read all the same.
        problems.append(FoundProblem(None, str(error).splitlines()[0]))
    try:
        checkpoint.verify_index()
    except (CheckpointCorruptError, OSError) as error:
        problems.append(FoundProblem(None, str(error).splitlines()[0]))
    foreign = []
    for name in checkpoint:
        report(name)
        try:
            _read_all(checkpoint, name)
        except UntrustedPickleError:
            foreign.append(name)
        except (CheckpointError, OSError) as error:
            problems.append(FoundProblem(name, str(error).splitlines()[0]))
    try:
        checkpoint.common  # noqa: B018 - it is read
    except (CheckpointError, OSError) as error:
        problems.append(FoundProblem(None, str(error).splitlines()[0]))
    return VerificationReport(
        problems=tuple(problems),
        names=len(checkpoint),
        bytes_read=checkpoint.bytes_read,
        unchecked=unchecked,
        strays=checkpoint.find_stray_files(),
        foreign=tuple(foreign),
    )


def _read_all(checkpoint: OpenCheckpoint, name: str) -> None:
    lazy = checkpoint[name]
    try:
        if isinstance(lazy, LazyTensor):
            for index in iterate_slabs(lazy.shape, lazy.dtype.itemsize):
                lazy[index]
        else:
            lazy.value()
    except (CheckpointMismatchError, UntrustedPickleError):
        if not lazy.wrappers:
            raise
        for _ in iterate_elements(lazy):
            pass

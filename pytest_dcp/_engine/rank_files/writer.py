"""Writes one rank's state dict as one file of `torch.save`, atomically.

A save, on each rank:

1. The file is written under a temporary name, synced, and renamed to `checkpoint_{rank}.pt`; then
   the folder is synced.
2. The hook's `pre_commit`.
3. The barrier: every rank's file exists.
4. The hook's `post_commit`, which may publish the folder.

A crash in step 1 leaves the rank's earlier file, if any, and perhaps a temporary file, which the
rank's next save into the folder removes. After a later crash, some files may be of the earlier
save: only `post_commit` can rely on all of them. So give each save its own folder, and let
`post_commit` mark it as complete.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, cast

import torch

from pytest_dcp._engine.io.disk import Buffer, Out
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._torch_internals.rank_files import (
    Barrier,
    CheckpointWriterConfig,
    CheckpointWriterOfTorch,
    RankInfo,
    WriterHook,
)

logger = logging.getLogger("pytest_dcp.checkpoint")

DISK = LocalDisk()


def file_name(rank_info: RankInfo) -> str:
    """The name of the rank's file in a checkpoint's folder."""
    return f"checkpoint_{rank_info.global_rank}.pt"


class CheckpointWriter(CheckpointWriterOfTorch):
    """Writes state dicts of one rank.

    torch's class of this name is a base for the sake of `isinstance`; all methods are ours.
    """

    def __init__(
        self,
        config: CheckpointWriterConfig,
        rank_info: RankInfo,
        barrier: Barrier | None = None,
        commit_hook: WriterHook | None = None,
    ) -> None:
        """barrier: waits for all ranks' files; None: ranks do not wait for each other.

        commit_hook: called before and after the barrier.
        """
        self._config = config
        self._rank_info = rank_info
        self._barrier = barrier
        self._commit_hook = commit_hook

    def write(self, path: str, state_dict: dict[str, Any], **kwargs: Any) -> Future[None] | None:
        """Write the state dict to a file in the folder `path`; see the module's docstring.

        kwargs: for the hook.
        """
        write_whole_file(Path(path), file_name(self._rank_info), state_dict)
        if self._commit_hook is not None:
            self._commit_hook.pre_commit(path, **kwargs)
        if self._barrier is not None:
            self._barrier.execute_barrier()
        if self._commit_hook is not None:
            self._commit_hook.post_commit(path, **kwargs)
        return None

    def close(self) -> None:
        """Do nothing: no resource is kept between two writes."""


def write_whole_file(folder: Path, name: str, value: Any) -> None:
    """Replace a file by the value as `torch.save` writes it, durably and atomically.

    Raises OSError if it cannot be written; the earlier file then remains.
    """
    parents = DISK.make_folder(folder)
    _remove_leftovers(folder, name)
    temporary = f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        with DISK.create(folder, temporary) as file:
            torch.save(value, cast("IO[bytes]", _Stream(file)))
            file.sync()
        DISK.replace(folder, temporary, name)
    except BaseException:
        with contextlib.suppress(OSError):
            DISK.remove(folder, temporary)
        raise
    for synced in (folder, *parents):
        DISK.sync_folder(synced)


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files that killed writers of this rank left."""
    for found in DISK.names(folder):
        if found.startswith(f".{name}.") and found.endswith(".tmp"):
            logger.info("removing %s, which a killed writer left", folder / found)
            DISK.remove(folder, found)


class _Stream:
    """The part of a binary file that `torch.save` uses."""

    def __init__(self, file: Out) -> None:
        self._file = file

    def write(self, data: Buffer) -> int:
        """Write all of it; return the number of bytes."""
        view = memoryview(data).cast("B")
        self._file.write([view])
        return len(view)

    def flush(self) -> None:
        """Do nothing: each write goes to the system at once."""

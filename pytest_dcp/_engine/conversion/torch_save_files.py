"""Checkpoint folders <-> the one file of `torch.save`.

Neither direction holds the whole state in memory. The file is mapped: a load fills the tensors in
the file itself, and a save writes them from there. Other memory is needed only for the values, and
a few bytes for each tensor.

The file gets its name when it is complete and synced; a failure leaves no file of that name.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pytest_dcp._engine.conversion.mapped_archive import MappedArchive
from pytest_dcp._engine.conversion.target_paths import target_file
from pytest_dcp._engine.conversion.whole_file import (
    replace_at_end,
)
from pytest_dcp._engine.lazy_reading.torch_save_contents import read_torch_save
from pytest_dcp._engine.planners.empty_state_dict import _EmptyStateDictLoadPlanner
from pytest_dcp._engine.verbs.load import load
from pytest_dcp._engine.verbs.save import save
from pytest_dcp._engine.verbs.torch_arguments import without_single_process_warning
from pytest_dcp.tracebacks import drop_inner_frames

PathLike = str | os.PathLike[str]


@drop_inner_frames
def dcp_to_torch_save(
    dcp_checkpoint_dir: PathLike, torch_save_path: PathLike, *, weights_only: bool = True
) -> None:
    """Convert a checkpoint folder to one file that `torch.load` reads. No process group is used.

    The file has full tensors. They are loaded into the mapped file, so the whole state is never in
    memory. An existing file of this name is replaced when the new one is complete.

    weights_only: False allows values of any class, and loading them can run code: only for
        checkpoints whose writer you trust.

    Raises CheckpointException, as `load`, and OSError if the file cannot be written.
    """
    target = target_file(torch_save_path)
    with replace_at_end(target) as fd:
        planner = _FilePlanner(fd, weights_only=weights_only)
        with without_single_process_warning():
            load({}, checkpoint_id=dcp_checkpoint_dir, planner=planner, no_dist=True)
        planner.close_file()


@drop_inner_frames
def torch_save_to_dcp(
    torch_save_path: PathLike, dcp_checkpoint_dir: PathLike, *, weights_only: bool = True
) -> None:
    """Convert the file of `torch.save` to a checkpoint folder. No process group is used.

    The file is mapped, so the whole state is never in memory.

    weights_only: False allows values of any class, and loading them can run code: only for files
        whose writer you trust.

    Raises CheckpointCorruptError if the file is not from `torch.save`, or damaged;
    UntrustedPickleError for classes that `weights_only` does not allow; TypeError if it holds
    something other than a state dict.
    """
    state_dict = read_torch_save(torch_save_path, weights_only=weights_only)
    with without_single_process_warning():
        save(state_dict, checkpoint_id=dcp_checkpoint_dir, no_dist=True)


class _FilePlanner(_EmptyStateDictLoadPlanner):
    """Loads everything, without a template, into tensors that lie in a file of `torch.save`."""

    def __init__(self, fd: int, *, weights_only: bool) -> None:
        super().__init__(weights_only=weights_only)
        self._archive = MappedArchive(fd)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Assign every stored tensor a place in the file."""
        stored = metadata.state_dict_metadata if metadata is not None else {}
        self._archive.allocate(
            {
                fqn: one.size.numel() * one.properties.dtype.itemsize
                for fqn, one in stored.items()
                if isinstance(one, TensorStorageMetadata)
            }
        )
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def empty_tensor(self, fqn: str, stored: TensorStorageMetadata) -> torch.Tensor:
        """The tensor's place in the file."""
        return self._archive.tensor(fqn, stored.size, stored.properties.dtype)

    def close_file(self) -> None:
        """Write everything except the tensors' bytes, which completes the file."""
        self._archive.close(self.rebuilt())

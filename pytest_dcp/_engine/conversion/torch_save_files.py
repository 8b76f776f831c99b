"""Checkpoint folders <-> the one file of `torch.save`.

Neither direction holds the whole state in memory: a batch of tensors, the values, and a few bytes
for each tensor.

The file gets its name when it is complete and synced; a failure leaves no file of that name.
"""

from __future__ import annotations

import os

from pytest_dcp._engine.conversion.changes import Changes
from pytest_dcp._engine.conversion.converted_contents import ConvertedContents
from pytest_dcp._engine.conversion.target_paths import target_file, target_folder
from pytest_dcp._engine.conversion.to_dcp import save_contents
from pytest_dcp._engine.conversion.torch_save_writer import BUDGET_BYTES, TorchSaveWriter
from pytest_dcp._engine.conversion.whole_file import remove_if_new, write_whole_file
from pytest_dcp._engine.coordinate import OperationCall, team_of
from pytest_dcp._engine.huggingface.consolidate import report_nothing
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint, open_checkpoint
from pytest_dcp._engine.lazy_reading.torch_save_contents import TorchSaveContents
from pytest_dcp.tracebacks import drop_inner_frames

PathLike = str | os.PathLike[str]


@drop_inner_frames
def dcp_to_torch_save(
    dcp_checkpoint_dir: PathLike, torch_save_path: PathLike, *, weights_only: bool = True
) -> None:
    """Convert a checkpoint folder to one file that `torch.load` reads. No process group is used.

    The file has full tensors. They are read in batches, so the whole state is never in memory. An
    existing file of this name is replaced when the new one is complete.

    weights_only: False allows values of any class, and loading them can run code: only for
        checkpoints whose writer you trust.

    Raises CheckpointException, as `load`, and OSError if the file cannot be written.
    """
    folder, name = target_file(torch_save_path)
    team = team_of(None, OperationCall("load"), use_dist=False, coordinator_rank=0)
    with (
        team.wait_for_turn(),
        team.agree("plan", lambda: open_checkpoint(dcp_checkpoint_dir)) as checkpoint,
    ):

        def read_values() -> tuple[ConvertedContents, TorchSaveWriter]:
            contents = ConvertedContents(checkpoint, Changes(), weights_only=weights_only)
            return contents, TorchSaveWriter(contents)

        contents, writer = team.agree("plan", read_values)
        with write_whole_file(folder, name) as out:
            writer.write(
                out,
                lambda slabs: team.agree("read", lambda: contents.read_slabs(slabs)),
                BUDGET_BYTES,
                report_nothing,
            )


@drop_inner_frames
def torch_save_to_dcp(
    torch_save_path: PathLike, dcp_checkpoint_dir: PathLike, *, weights_only: bool = True
) -> None:
    """Convert the file of `torch.save` to a checkpoint folder. No process group is used.

    Tensors are read in batches, so the whole state is never in memory.

    weights_only: False allows values of any class, and loading them can run code: only for files
        whose writer you trust. If torch cannot make one without its tensors' elements, the whole
        file is loaded into memory.

    Raises CheckpointCorruptError if the file is not from `torch.save`, or damaged;
    UntrustedPickleError for classes that `weights_only` does not allow; TypeError if it holds
    something other than a state dict; CheckpointReplacedError if it is written to meanwhile.
    """
    stored = TorchSaveContents.of_path(torch_save_path, weights_only=weights_only)
    folder = target_folder(dcp_checkpoint_dir)
    with (
        OpenCheckpoint(os.fspath(torch_save_path), "torch_save", stored) as checkpoint,
        remove_if_new(folder),
    ):
        # Containers of any class were made already, if they are allowed.
        save_contents(
            ConvertedContents(checkpoint, Changes(), weights_only=False), dcp_checkpoint_dir
        )

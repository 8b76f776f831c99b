"""Checkpoint folders <-> the one file of `torch.save`.

Neither direction holds the whole state in memory. The file is mapped: a load fills the tensors in
the file itself, and a save writes them from there. Other memory is needed only for the values, and
a few bytes for each tensor.

The file gets its name when it is complete and synced; a failure leaves no file of that name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.entry import contiguous_stride
from pytest_dcp._engine.format.state_dict_archive import (
    TensorPlace,
    close_archive,
    pickle_state_dict,
    place_tensors,
)
from pytest_dcp._engine.lazy_reading.torch_save_contents import read_torch_save
from pytest_dcp._engine.planners.empty_state_dict import _EmptyStateDictLoadPlanner
from pytest_dcp._engine.verbs.load import load
from pytest_dcp._engine.verbs.save import save
from pytest_dcp._torch_internals.tensors import identity_of_storage
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
    target = Path(torch_save_path)
    with _replace_at_end(target) as fd:
        planner = _FilePlanner(fd, weights_only=weights_only)
        with _without_single_process_warning():
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
    with _without_single_process_warning():
        save(state_dict, checkpoint_id=dcp_checkpoint_dir, no_dist=True)


@contextlib.contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """Suppress the warning about a single process: a conversion always runs in one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _replace_at_end(target: Path) -> Iterator[int]:
    """The descriptor of a new file. At the end it gets the name; after a failure it is removed."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | operating_system.NEW_FILE, 0o666)
    try:
        try:
            yield fd
            operating_system.sync_file(fd)
        finally:
            os.close(fd)
        operating_system.replace_file(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if operating_system.can_open_folders():
        folder = operating_system.open_folder(target.parent)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _FilePlanner(_EmptyStateDictLoadPlanner):
    """Loads everything, without a template, into tensors that lie in a file of `torch.save`."""

    def __init__(self, fd: int, *, weights_only: bool) -> None:
        super().__init__(weights_only=weights_only)
        self._fd = fd
        self._places: dict[str, TensorPlace] = {}
        self._mapped: mmap.mmap | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Assign every stored tensor a place in the file."""
        stored = metadata.state_dict_metadata if metadata is not None else {}
        sizes = {
            fqn: one.size.numel() * one.properties.dtype.itemsize
            for fqn, one in stored.items()
            if isinstance(one, TensorStorageMetadata)
        }
        places, end = place_tensors(list(sizes.values()))
        self._places = dict(zip(sizes, places, strict=True))
        os.ftruncate(self._fd, 0)
        # Writing into a mapped file on a full disk would kill the process: allocate space first.
        # macOS and Windows cannot do that.
        operating_system.extend_file(self._fd, max(end, mmap.PAGESIZE))
        self._mapped = mmap.mmap(self._fd, max(end, mmap.PAGESIZE))
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def empty_tensor(self, fqn: str, stored: TensorStorageMetadata) -> torch.Tensor:
        """The tensor's place in the file."""
        place, dtype = self._places[fqn], stored.properties.dtype
        if not place.nbytes:
            return torch.empty(stored.size, dtype=dtype)
        assert self._mapped is not None
        raw = torch.frombuffer(
            self._mapped, dtype=torch.uint8, offset=place.offset, count=place.nbytes
        )
        tensor = torch.empty(0, dtype=dtype)
        return tensor.set_(raw.untyped_storage(), 0, stored.size, contiguous_stride(stored.size))

    def close_file(self) -> None:
        """Write everything except the tensors' bytes, which completes the file."""
        assert self._mapped is not None
        view = memoryview(self._mapped)
        placed = list(self._places.values())
        crcs = [crc32(view[one.offset : one.offset + one.nbytes]) for one in placed]
        keys = {
            identity_of_storage(tensor.untyped_storage()): self._places[fqn].key
            for fqn, tensor in self.state_dict.items()
            if fqn in self._places and isinstance(tensor, torch.Tensor)
        }
        pickled, others = pickle_state_dict(
            self.rebuilt(), lambda one: keys.get(identity_of_storage(one))
        )
        contents = {key: _bytes_of(storage) for key, storage in others.items()}
        end = 0
        for piece in close_archive(placed, crcs, pickled, contents):
            end = max(end, piece.offset + _write_all(self._fd, piece.content, piece.offset))
        os.ftruncate(self._fd, end)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    content: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return memoryview(content)


def _write_all(fd: int, content: bytes | memoryview, offset: int) -> int:
    """Write all of it at the offset; return the number of bytes."""
    remaining = memoryview(content)
    while remaining:
        written_bytes = operating_system.write_at(fd, remaining, offset)
        remaining, offset = remaining[written_bytes:], offset + written_bytes
    return len(content)

"""The peers of the engine, one function each: every peer saves and loads the same state.

A save takes a state and a folder that does not exist or may be replaced; a load fills the state's
memory in place. All are collective.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_states as states
import torch
from engine_cases import PACKAGE
from engine_ranks import World
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.tensor import DTensor, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.catalog import Catalog

MODE = 0o644
WHOLE_FILE = "whole.pt"

Read = tuple[str, int, memoryview]
"""A file, where to begin in it, and where the bytes go."""


def absent() -> list[str]:
    """The peers that are not installed."""
    return [name for name in (PACKAGE,) if importlib.util.find_spec(name) is None]


def save_ours(state: states.State, folder: Path, *, sync: bool, alone: bool = False) -> None:
    """Save with the engine."""
    writer = dcp.FileSystemWriter(folder, sync_files=sync)
    dcp.save(dict(state), storage_writer=writer, no_dist=alone)


def save_torch(state: states.State, folder: Path, *, sync: bool, alone: bool = False) -> None:
    """Save with torch's DCP."""
    writer = filesystem.FileSystemWriter(folder, sync_files=sync)
    state_dict_saver.save(dict(state), storage_writer=writer, no_dist=alone)


def load_ours(state: states.State, folder: Path, verify: Any = None) -> dcp.LoadReport:
    """Load with the engine."""
    return dcp.load(dict(state), checkpoint_id=folder, verify=verify)


def load_torch(state: states.State, folder: Path) -> None:
    """Load with torch's DCP."""
    state_dict_loader.load(dict(state), checkpoint_id=folder)


def package_manager() -> Any:
    """The package's manager: saves wait until the files are written, layouts stay as they are.

    Two features of 0.1.1 that fail here are left out: its resharder, whose ranks exchange data
    through `device="cuda"`, and its direct I/O, since ext4 refuses unaligned writes.
    """
    from torch_checkpointing import CheckpointManager  # type: ignore[import-not-found,unused-ignore] # optional
    from torch_checkpointing.config import SyncCheckpointSaverConfig  # type: ignore[import-not-found,unused-ignore] # optional
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig  # type: ignore[import-not-found,unused-ignore] # optional

    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(
        CheckpointManager.Config(save=SyncCheckpointSaverConfig(), storage_config=storage)
    )


def save_package(manager: Any, state: states.State, folder: Path) -> None:
    """Save with the package."""
    manager.save(str(folder), {"state": dict(state)})


def load_package(manager: Any, state: states.State, folder: Path) -> None:
    """Load with the package."""
    manager.load(str(folder), into={"state": dict(state)})


def save_whole(world: World, whole: states.State, folder: Path, *, sync: bool) -> None:
    """torch.save of the whole state on rank 0."""
    if world.rank:
        return
    folder.mkdir(exist_ok=True)
    with (folder / WHOLE_FILE).open("wb") as file:
        torch.save(whole, file)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def load_whole(world: World, whole: states.State, folder: Path) -> None:
    """torch.load(mmap=True) on rank 0, copied into memory that is there."""
    if world.rank:
        return
    for fqn, tensor in torch.load(folder / WHOLE_FILE, mmap=True).items():
        whole[fqn].copy_(tensor)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def raw_write(world: World, state: states.State, folder: Path, *, sync: bool, more: int) -> None:
    """write() of this rank's bytes to one file, a tensor at a time; of replicas, on rank 0 only.

    `more`: the size in bytes of one more file that rank 0 writes, as the metadata.
    """
    folder.mkdir(exist_ok=True)
    tensors = [
        states.local_of(tensor) for tensor in state.values() if world.rank == 0 or _sharded(tensor)
    ]
    _write_file(folder / f"{world.rank}.raw", [memory(tensor) for tensor in tensors], sync=sync)
    if world.rank == 0:
        _write_file(folder / "metadata.raw", [memoryview(bytes(more))], sync=sync)


def _sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) and isinstance(tensor.placements[0], Shard)


def _write_file(path: Path, views: list[memoryview], *, sync: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE)
    try:
        for view in views:
            offset = 0
            while offset < len(view):
                offset += os.write(descriptor, view[offset:])
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raw_reads(state: states.State, folder: Path) -> list[Read]:
    """Where in our checkpoint this rank's bytes lie; tensors are stored and wanted by rows."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    catalog = Catalog.of(metadata)
    index, places = catalog.index, catalog.places
    found: list[Read] = []
    for fqn, tensor in state.items():
        key = index.row_of[fqn]
        first, _ = states.corner_of(tensor)
        local = states.local_of(tensor)
        row_bytes = tensor.shape[1] * states.ITEM_BYTES
        for chunk in range(index.first[key], index.first[key + 1]):
            begin, rows = int(index.offset[chunk, 0]), int(index.shape[chunk, 0])
            low, high = max(first, begin), min(first + len(local), begin + rows)
            if low < high:
                name = places.files[places.file[chunk]]
                at = int(places.data_start[chunk]) + (low - begin) * row_bytes
                found.append((name, at, memory(local[low - first : high - first])))
    return sorted(found, key=lambda read: read[:2])


def raw_reader(reads: list[Read], folder: Path) -> Callable[[], None]:
    """pread of the bytes, one call for each tensor, file by file in the order of the file."""

    def read() -> None:
        descriptors: dict[str, int] = {}
        try:
            for name, at, view in reads:
                if name not in descriptors:
                    descriptors[name] = os.open(folder / name, os.O_RDONLY)
                offset = 0
                while offset < len(view):
                    count = os.preadv(descriptors[name], [view[offset:]], at + offset)
                    if not count:
                        raise RuntimeError(f"{folder / name} ends {len(view) - offset} bytes early")
                    offset += count
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    return read

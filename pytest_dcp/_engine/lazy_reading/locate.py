"""A path or a URL -> where the checkpoint lies, and its format.

The format is decided by the names in a folder and by the first bytes of a file, never by running
anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_dcp._engine.huggingface.file_names import INDEX_NAME, SUFFIX
from pytest_dcp._engine.io.commit import metadata_name
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.object_disk import type_of_entry
from pytest_dcp._engine.lazy_reading.megatron_common import COMMON
from pytest_dcp._engine.storages.local_filesystem import disk_of
from pytest_dcp._engine.storages.storage_options import check_storage_options, is_url
from pytest_dcp.errors import NotACheckpointError

PathLike = str | os.PathLike[str]
Format = Literal["dcp", "safetensors", "torch_save"]

SHOWN = 5
ZIP_SIGNATURE = b"PK\x03\x04"
OLD_PICKLE = b"\x80\x02"
"""The first bytes of a file that torch wrote before 1.6, and of any pickle of protocol 2."""
HEAD_BYTES = 9
"""A safetensors file has its header's length in 8 bytes, then the header, which begins with {."""
DATA_SUFFIX = ".distcp"
TORCH_SAVE_SUFFIXES = (".pt", ".pth")
METADATA = metadata_name()
MEGATRON_RUN = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint lies."""

    folder: Folder
    file: str | None
    """The name of the one file that is the checkpoint; None: the folder is."""
    format: Format


def locate_checkpoint(
    path: PathLike,
    *,
    rank: int | None,
    follow_links: bool | None,
    storage_options: Mapping[str, Any] | None,
) -> Location:
    """Where the checkpoint is, and its format.

    follow_links: None: only the files of safetensors checkpoints may be links to other folders.

    Raises FileNotFoundError if nothing is there, NotACheckpointError for anything else than a
    checkpoint, TypeError for a path that is none, ValueError for options that do not belong to it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a checkpoint is opened by its path or URL, got {type(path).__name__}")
    name = os.fspath(path)
    if not name:
        raise FileNotFoundError("no checkpoint: the path is empty")
    follows = follow_links is not False
    options = check_storage_options(storage_options, path)
    if is_url(path):
        folder, file = _locate_url(name, follows, options)
    else:
        folder, file = _locate_path(name, follows)
    if file is not None and file in (INDEX_NAME, metadata_name(rank)):
        file = None
    if file is not None and file.endswith(DATA_SUFFIX):
        raise NotACheckpointError(
            f"{name} is a data file of the checkpoint in its folder: open the folder"
        )
    if file is not None:
        return Location(folder, file, _format_of_file(folder, file))
    kind = _format_of_folder(folder, name, rank)
    if kind == "dcp" and follow_links is None and isinstance(folder.disk, LocalDisk):
        folder = Folder(LocalDisk(follow_links=False), folder.path)
    return Location(folder, None, kind)


def _locate_path(name: str, follow_links: bool) -> tuple[Folder, str | None]:
    path, disk = Path(name), LocalDisk(follow_links=follow_links)
    if path.is_dir():
        return Folder(disk, path), None
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint in {name}: there is no such file or folder")
    return Folder(disk, path.parent), path.name


def _locate_url(
    url: str, follow_links: bool, storage_options: dict[str, Any]
) -> tuple[Folder, str | None]:
    from pytest_dcp._engine.storages.fsspec import FileSystem, open_filesystem

    fs, path = open_filesystem(url, storage_options, follow_links=follow_links)
    if not isinstance(fs, FileSystem):
        return _locate_path(os.fspath(path), follow_links)
    if _is_file(fs.fs, fs.path_of[url]):
        above, _, name = url.rpartition("/")
        beside, parent = open_filesystem(above, storage_options, follow_links=follow_links)
        return Folder(disk_of(beside), parent), name
    return Folder(disk_of(fs), path), None


def _is_file(fs: Any, path: str) -> bool:
    """Whether a URL is of a file. Where only the files of a store may be asked about, a name that
    may not is taken for a folder's.
    """
    with contextlib.suppress(PermissionError):
        return type_of_entry(fs, path) == "file"
    return False


def _format_of_file(folder: Folder, name: str) -> Format:
    head = bytearray(HEAD_BYTES)
    with folder.open(name) as file:
        del head[file.read_into(0, memoryview(head)) :]
        size = file.size
    if head.startswith(ZIP_SIGNATURE):
        return "torch_save"
    length = int.from_bytes(head[:8], "little")
    if len(head) == HEAD_BYTES and head[8:] == b"{" and length + 8 <= size:
        return "safetensors"
    if name.endswith(SUFFIX):
        return "safetensors"  # Its reader says what is wrong with it.
    if head.startswith(OLD_PICKLE):
        raise NotACheckpointError(
            f"{name} is a bare pickle, as torch wrote before 1.6: load it with torch.load if you "
            "trust it, and save it again"
        )
    raise NotACheckpointError(
        f"{name} is no checkpoint: expected a file of torch.save or safetensors, got one that "
        f"begins with {bytes(head[:8])!r}"
    )


def _format_of_folder(folder: Folder, name: str, rank: int | None) -> Format:
    # Asked by name: the listing of an object store may be out of date.
    if folder.exists(metadata_name(rank)):
        return "dcp"
    names = folder.names()
    if rank is None and (any(n.endswith(SUFFIX) for n in names) or folder.exists(INDEX_NAME)):
        return "safetensors"
    raise NotACheckpointError(f"no checkpoint in {name}: {_describe_folder(folder, names, rank)}")


def _describe_folder(folder: Folder, names: Sequence[str], rank: int | None) -> str:
    """Why a folder with files of these names is no checkpoint."""
    own = sorted(name for name in names if name.startswith("__") and name.endswith(METADATA))
    if rank is not None:
        return f"it has no {metadata_name(rank)}, the metadata of rank {rank} alone"
    if own:
        return f"each rank saved on its own ({_show(own)}): open one with rank=0"
    if any(name.endswith(DATA_SUFFIX) for name in names):
        return f"it has data files but no {METADATA}: the save did not end, or the file was removed"
    if COMMON in names:
        return (
            f"it has Megatron-Core's {COMMON} but no {METADATA}: the save did not end, or it is of "
            "an older format (zarr), which is not read"
        )
    if MEGATRON_RUN in names:
        return "it is the folder of a run of Megatron: open one of its iter_* folders"
    if "metadata.pkl" in names:
        return "it was written by torch_checkpointing, whose metadata is a pickle: it is not read"
    if below := _list_folders(folder):
        return f"it has folders ({_show(below)}): open one of them"
    if not names:
        return "no files are there"
    if files := [name for name in sorted(names) if name.endswith(TORCH_SAVE_SUFFIXES)]:
        return f"it has files of torch.save ({_show(files)}): open one of them"
    return f"it has neither {METADATA} nor {SUFFIX} files, but {_show(sorted(names))}"


def _list_folders(folder: Folder) -> list[str]:
    """The names of a local folder's own folders, those of a run's steps perhaps."""
    if not isinstance(folder.disk, LocalDisk) or not Path(folder.path).is_dir():
        return []
    found = (path for path in Path(folder.path).iterdir() if path.is_dir())
    return sorted(path.name for path in found if not path.name.startswith("."))


def _show(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

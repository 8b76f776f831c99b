"""The file of `torch.save` as an open checkpoint: its elements are read when they are used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.lazy_reading.contents import BoxToRead, StoredShard, TensorFacts
from pytest_dcp._engine.lazy_reading.delayed_close import DelayedClose
from pytest_dcp._engine.lazy_reading.stored_wrappers import StoredWrapper
from pytest_dcp._engine.lazy_reading.torch_save_file import TorchSaveFile
from pytest_dcp._engine.plan.containers import describe
from pytest_dcp._engine.plan.nested import Path as KeyPath
from pytest_dcp._engine.plan.nested import as_saved, as_saved_path, flatten
from pytest_dcp._engine.plan.shards import PLAIN as PLAIN_TENSORS
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
)

PathLike = str | os.PathLike[str]


def _open_file(folder: Folder, name: str, *, verify: bool) -> TorchSaveFile:
    try:
        return TorchSaveFile(folder, name, verify=verify)
    except CheckpointCorruptError as error:
        raise error.at(file=str(Path(folder.path) / name)) from error


def _unpickle(file: TorchSaveFile, *, weights_only: bool) -> dict[Any, Any]:
    where = file.path
    try:
        state_dict = file.unpickle(weights_only=weights_only)
    except CheckpointCorruptError as error:
        raise error.at(file=where) from error
    if not isinstance(state_dict, dict):
        raise TypeError(
            f"expected a state dict in {where}, got {type(state_dict).__name__}: a checkpoint "
            "holds a dict of tensors and values"
        )
    return state_dict


class TorchSaveContents:
    """The state dict in a file that stays open."""

    missing_files: Sequence[str] = ()
    catalog: None = None
    """The file has no index."""

    def __init__(
        self, folder: Folder, name: str, *, weights_only: bool = True, verify: bool = True
    ) -> None:
        """weights_only: False allows values of any class, and reading them can run code.
        verify: whether checksums are checked.

        Raises TypeError for a file that holds something other than a state dict, ValueError for two
        values under one flat name, CheckpointCorruptError for a damaged one, and
        UntrustedPickleError for classes that `weights_only` does not allow.
        """
        self.bytes_read = self.bytes_needed = 0
        self._opened = _open_file(folder, name, verify=verify)
        self._file = name
        seen: list[tuple[KeyPath, Any]] = []
        try:
            state_dict = _unpickle(self._opened, weights_only=weights_only)
            self._flat, paths = flatten(state_dict, note=lambda *found: seen.append(found))
        except BaseException:
            self._opened.close()
            raise
        self._paths = as_saved(paths)
        self.containers = describe((as_saved_path(path), container) for path, container in seen)
        """The description of the saved containers; None: plain ones."""
        self._facts = {name: _facts_of(value) for name, value in self._flat.items()}
        self._closing = DelayedClose(self._file, self._close_files)

    @property
    def has_checksums(self) -> bool:
        """Whether the file was written with them: of each record, also the one with the values."""
        return self._opened.has_checksums

    @classmethod
    def of_path(cls, path: PathLike, *, weights_only: bool = True) -> TorchSaveContents:
        """The local file of this path. Raises as above."""
        file = Path(path)
        return cls(Folder(LocalDisk(follow_links=True), file.parent), file.name,
                   weights_only=weights_only)  # fmt: skip

    @property
    def names(self) -> Sequence[str]:
        """The flat names, in the file's order."""
        return tuple(self._facts)

    def has(self, name: str) -> bool:
        """Whether it has this name."""
        return name in self._facts

    def describe(self, name: str) -> TensorFacts | None:
        """The tensor of this name; None if it is a value."""
        return self._facts[name]

    def shards(self, name: str) -> tuple[StoredShard, ...]:
        """The tensor as one box."""
        facts = self._facts[name]
        if facts is None:
            return ()
        return (StoredShard((0,) * len(facts.shape), facts.shape, self._file, facts.nbytes),)

    def count_shards(self, name: str) -> int:
        """One, of a tensor."""
        return int(self._facts[name] is not None)

    def stored_nbytes(self, name: str) -> int:
        """Bytes of a tensor's elements; 0 for a value, which is in the file's one pickle."""
        facts = self.describe(name)
        return 0 if facts is None else facts.nbytes

    def read_boxes(self, boxes: Sequence[BoxToRead]) -> None:
        """Copy the parts from the file.

        Raises CheckpointReplacedError if it was written to since it was opened,
        CheckpointCorruptError for a record whose checksum is wrong, CheckpointMismatchError for a
        sparse tensor.
        """
        with self._closing.keep_open():
            self._read_boxes(boxes)

    def _read_boxes(self, boxes: Sequence[BoxToRead]) -> None:
        for box in boxes:
            part = self._flat[box.name].detach()
            if part.layout != torch.strided:
                raise CheckpointMismatchError(
                    f"{box.name!r} is sparse ({part.layout}), and has no plain elements to read: "
                    "load the file with torch.load",
                    mismatched=(box.name,),
                )
            for dim, (start, length) in enumerate(zip(box.offset, box.target.shape, strict=True)):
                part = part.narrow(dim, start, length)
            try:
                self.bytes_read += self._opened.copy_part(part, box.target)
            except CheckpointCorruptError as error:
                raise error.at(entry=box.name) from error
            self.bytes_needed += part.numel() * part.itemsize

    def read_value(self, name: str, *, weights_only: bool = True) -> Any:
        """The value of this name. It is as it was unpickled at the opening, whatever
        `weights_only` says now.
        """
        with self._closing.keep_open():
            return self._opened.fill_value(self._flat[name])

    def wrappers(self, name: str) -> tuple[StoredWrapper, ...]:
        """None: a file that holds one does not open."""
        return ()

    def read_common(self) -> dict[str, Any]:
        """Nothing: the checkpoint is one file."""
        return {}

    def file_names(self) -> Sequence[str]:
        """The file."""
        return (self._file,)

    def path_of(self, name: str) -> tuple[Any, ...]:
        """The keys from the root of the saved state dict to this value."""
        return self._paths[name]

    def identify(self) -> str:
        """The file's size and its times."""
        return self._opened.identify()

    def verify_index(self) -> None:
        """Does nothing: the file is its own index."""

    def find_stray_files(self) -> Sequence[str]:
        """None: the checkpoint is one file."""
        return ()

    def close(self) -> None:
        """Close the file. Reads raise after that."""
        self._closing.close()

    def _close_files(self) -> None:
        self._opened.close()
        self._flat = {}


def _facts_of(value: Any) -> TensorFacts | None:
    """Of a plain tensor; others, which only a trusted file has, are values."""
    if type(value) not in PLAIN_TENSORS or value.is_quantized:
        return None
    return TensorFacts(tuple(value.shape), value.dtype)

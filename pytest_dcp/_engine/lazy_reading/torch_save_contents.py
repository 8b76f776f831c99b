"""The file of `torch.save`, mapped: its tensors lie in the file, and their pages are read when they
are used."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pytest_dcp._engine.format.python_values import decode_value
from pytest_dcp._engine.lazy_reading.contents import BoxToRead, StoredShard, TensorFacts
from pytest_dcp._engine.lazy_reading.locate import ZIP_SIGNATURE
from pytest_dcp._engine.plan.containers import describe
from pytest_dcp._engine.plan.nested import Path as KeyPath
from pytest_dcp._engine.plan.nested import as_saved, as_saved_path, flatten
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

PathLike = str | os.PathLike[str]


def read_torch_save(path: PathLike, *, weights_only: bool = True) -> dict[str, Any]:
    """The state dict in a file of `torch.save`; its tensors lie in the file, which is mapped.

    Writes into them stay in this process.
    """
    with open(path, "rb") as file:
        signature = file.read(len(ZIP_SIGNATURE))
        if signature != ZIP_SIGNATURE:
            raise CheckpointCorruptError(
                f"expected the zip archive that torch.save writes, got a file that begins with "
                f"{signature!r}: a file written by torch before 1.6 must be loaded with torch.load "
                "and saved again",
                file=os.fspath(path),
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        state_dict = decode_value(memoryview(mapped), share=True)
    except CheckpointCorruptError as error:
        if weights_only or not isinstance(error, UntrustedPickleError):
            raise error.at(file=os.fspath(path)) from error
        # Not by `decode_value`, which would hold the whole file in memory.
        state_dict = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    if not isinstance(state_dict, dict):
        raise TypeError(
            f"expected a state dict in {os.fspath(path)}, got {type(state_dict).__name__}: a "
            "checkpoint holds a dict of tensors and values"
        )
    return state_dict


class TorchSaveContents:
    """A state dict in a mapped file."""

    missing_files: Sequence[str] = ()
    catalog: None = None
    """The file has no index."""

    def __init__(self, path: PathLike, *, weights_only: bool = True) -> None:
        self.bytes_read = self.bytes_needed = 0
        self.state_dict = read_torch_save(path, weights_only=weights_only)
        self._file = Path(path).name
        seen: list[tuple[KeyPath, Any]] = []
        self._flat, paths = flatten(self.state_dict, note=lambda *found: seen.append(found))
        self._paths = as_saved(paths)
        self.containers = describe((as_saved_path(path), container) for path, container in seen)
        """The description of the saved containers; None: plain ones."""
        self._facts = {name: _facts_of(value) for name, value in self._flat.items()}
        self._is_closed = False

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

    def stored_nbytes(self, name: str) -> int:
        """Bytes of a tensor's elements; 0 for a value, which is in the file's one pickle."""
        facts = self.describe(name)
        return 0 if facts is None else facts.nbytes

    def read_boxes(self, boxes: Sequence[BoxToRead]) -> None:
        """Copy the parts from the mapped file."""
        self._check_open()
        for box in boxes:
            part = self._flat[box.name].detach()
            for dim, (start, length) in enumerate(zip(box.offset, box.target.shape, strict=True)):
                part = part.narrow(dim, start, length)
            box.target.copy_(part)
            self.bytes_needed += part.numel() * part.itemsize
            self.bytes_read += part.numel() * part.itemsize

    def borrow_tensor(self, name: str) -> torch.Tensor | None:
        """The tensor in the mapped file."""
        self._check_open()
        tensor: torch.Tensor = self._flat[name].detach()
        return tensor

    def read_value(self, name: str) -> Any:
        """The value of this name."""
        self._check_open()
        return self._flat[name]

    def file_names(self) -> Sequence[str]:
        """The file."""
        return (self._file,)

    def path_of(self, name: str) -> tuple[Any, ...]:
        """The keys from the root of the saved state dict to this value."""
        return self._paths[name]

    def find_stray_files(self) -> Sequence[str]:
        """None: the checkpoint is one file."""
        return ()

    def close(self) -> None:
        """Drop the mapping. Reads raise after that."""
        self._is_closed = True
        self.state_dict = {}
        self._flat = {}

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"the checkpoint in {self._file} was closed")


def _facts_of(value: Any) -> TensorFacts | None:
    if not isinstance(value, torch.Tensor):
        return None
    return TensorFacts(tuple(value.shape), value.dtype)

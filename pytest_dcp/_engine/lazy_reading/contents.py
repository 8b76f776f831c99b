"""The operations of an open checkpoint of any format: names, facts, and bytes into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.lazy_reading.stored_wrappers import StoredWrapper


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A stored tensor, as the checkpoint describes it."""

    shape: tuple[int, ...]
    """Of the full tensor."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the full tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredShard:
    """One stored box of a tensor."""

    offset: tuple[int, ...]
    """In elements of the full tensor."""
    shape: tuple[int, ...]
    file: str | None
    """Relative to the checkpoint's folder; None: no file has it."""
    nbytes: int
    """Of its elements."""


@dataclass(frozen=True, slots=True, eq=False)
class BoxToRead:
    """A part of a stored tensor, and the memory for it."""

    name: str
    offset: tuple[int, ...]
    """In elements of the full tensor."""
    target: torch.Tensor
    """Of the part's shape; of any dtype, device and strides."""


class Contents(Protocol):
    """An open checkpoint of one format."""

    bytes_read: int
    """Since it was opened, without those of the index."""
    bytes_needed: int
    """Of the parts that were asked for."""

    @property
    def names(self) -> Sequence[str]:
        """The flat names, in the checkpoint's order."""

    def has(self, name: str) -> bool:
        """Whether it has this name."""

    def describe(self, name: str) -> TensorFacts | None:
        """The tensor of this name; None if it is a value."""

    def shards(self, name: str) -> tuple[StoredShard, ...]:
        """The stored boxes of a tensor."""

    def count_shards(self, name: str) -> int:
        """How many boxes a tensor is stored in, without making them."""

    def stored_nbytes(self, name: str) -> int:
        """Bytes that the tensor or value takes in the files, without their framing if known."""

    def read_boxes(self, boxes: Sequence[BoxToRead]) -> None:
        """Fill the targets. Raises CheckpointCorruptError naming file, entry and offset."""

    def read_value(self, name: str, *, weights_only: bool = True) -> Any:
        """The value of this name, which runs no code. Raises UntrustedPickleError for one of
        another class than plain values have, unless `weights_only` is False."""

    def wrappers(self, name: str) -> tuple[StoredWrapper, ...]:
        """The wrappers of other tensors that the tensor or value is stored as: one for each shard
        that is one."""

    def read_common(self) -> dict[str, Any]:
        """The values in Megatron-Core's `common.pt` beside the index; empty without the file."""

    def file_names(self) -> Sequence[str]:
        """The data files, relative to the checkpoint's folder."""

    def path_of(self, name: str) -> tuple[Any, ...]:
        """The keys from the root of the saved state dict to this value."""

    @property
    def containers(self) -> str | None:
        """The description of the saved containers, see `plan.containers`; None: plain ones."""

    @property
    def missing_files(self) -> Sequence[str]:
        """Data files that were not there at the opening."""

    def identify(self) -> str:
        """A text that differs for another save in the same place, as far as that is known."""

    @property
    def has_checksums(self) -> bool:
        """Whether all of a format without a catalog is covered by checksums."""

    @property
    def catalog(self) -> Catalog | None:
        """Its index and checksums; None for a format that has none."""

    def verify_index(self) -> None:
        """Check the bytes of its index that no read looks at. Raises CheckpointCorruptError naming
        the file."""

    def find_stray_files(self) -> Sequence[str]:
        """Files beside the checkpoint's that it does not name."""

    def close(self) -> None:
        """Close the files. Reads raise after that."""

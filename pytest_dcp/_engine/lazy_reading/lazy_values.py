"""Tensors and values of an opened checkpoint, which are read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from pytest_dcp._engine.lazy_reading.box_selection import select_box
from pytest_dcp._engine.lazy_reading.contents import BoxToRead, Contents, StoredShard, TensorFacts
from pytest_dcp._engine.lazy_reading.html import draw_tensor
from pytest_dcp._engine.lazy_reading.stored_wrappers import StoredPart, StoredWrapper
from pytest_dcp.errors import CheckpointCorruptError


class _Wrapped:
    """The inner tensors of a name that is stored as a wrapper of other tensors."""

    _contents: Contents
    name: str

    @property
    def wrappers(self) -> tuple[StoredWrapper, ...]:
        """The wrappers of other tensors, such as torchao's, that it is stored as: one for each
        shard that is one, and none for a plain tensor or value. The pickles of their entries are
        read.
        """
        return self._contents.wrappers(self.name)

    @property
    def parts(self) -> Mapping[str, StoredPart | StoredWrapper]:
        """The inner tensors of the wrapper that it is stored as, by attribute; empty for a plain
        tensor or value.

        Raises TypeError if several shards are wrappers: each of `wrappers` has its own parts.
        """
        found = self.wrappers
        if len(found) > 1:
            raise TypeError(
                f"{self.name!r} is stored as {len(found)} shards, each a wrapper with parts of its "
                f"own: see checkpoint[{self.name!r}].wrappers"
            )
        return found[0].parts if found else {}


class LazyTensor(_Wrapped):
    """A stored tensor. Its shape, dtype and shards are known; its elements are read when used.

    `tensor[2:5, :8]` reads that part alone; integers, slices and an ellipsis select as they do in
    torch. Each call reads from the files again.
    """

    def __init__(self, contents: Contents, name: str, facts: TensorFacts) -> None:
        self._contents = contents
        self._facts = facts
        self.name = name
        """The flat name."""

    @property
    def shape(self) -> torch.Size:
        """Of the full tensor."""
        return torch.Size(self._facts.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self._facts.dtype

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self._facts.shape)

    @property
    def nbytes(self) -> int:
        """Of the full tensor's elements."""
        return self._facts.nbytes

    @property
    def shards(self) -> tuple[StoredShard, ...]:
        """The boxes that it is stored in."""
        return self._contents.shards(self.name)

    @property
    def shard_count(self) -> int:
        """How many boxes it is stored in: `len(shards)` without making them."""
        return self._contents.count_shards(self.name)

    def tensor(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The full tensor. dtype, device: of the result; by default as stored, on the CPU.

        Raises CheckpointMismatchError for a wrapper of other tensors, which has `parts`, and
        CheckpointCorruptError naming file, entry and offset if a checksum differs.
        """
        return self._read((0,) * self.ndim, self._facts.shape, dtype, device)

    def numpy(self) -> NDArray[Any]:
        """The full tensor as an array. Raises TypeError for dtypes that NumPy does not have."""
        try:
            torch.empty(0, dtype=self.dtype).numpy()
        except TypeError as error:
            wider = torch.complex64 if self.dtype.is_complex else torch.float32
            raise TypeError(
                f"{self.name!r} is {self.dtype}, which NumPy does not have: "
                f"use tensor(dtype={wider}).numpy()"
            ) from error
        array: NDArray[Any] = self.tensor().numpy()
        return array

    def __getitem__(self, index: Any) -> torch.Tensor:
        box = select_box(self._facts.shape, index, self.name)
        return self._read(box.offset, box.shape, None, None)[box.inside]

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError(f"{self.name!r} has no dimensions, and so no length")
        return self._facts.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.numpy(), dtype=dtype)

    def __reduce__(self) -> NoReturn:
        raise unpicklable(self)

    def __repr__(self) -> str:
        count = self.shard_count
        stored = "1 shard" if count == 1 else f"{count} shards"
        return f"<{self.name!r}: {self.dtype} of {tuple(self.shape)}, {stored}>"

    def _repr_html_(self) -> str:
        shards = self.shards
        title = (
            f"{self.name}: {self.dtype} of {tuple(self.shape)}, {self.nbytes:,} bytes, "
            f"{len(shards)} shard{'' if len(shards) == 1 else 's'}"
        )
        return draw_tensor(title, self._facts.shape, shards)

    def table_row(self) -> tuple[str, ...]:
        """Name, dtype, shape, number of shards and bytes, for a table."""
        dtype = str(self.dtype).removeprefix("torch.")
        shape, shards = str(list(self.shape)), str(self.shard_count)
        return self.name, dtype, shape, shards, f"{self.nbytes:,}"

    def _read(
        self,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> torch.Tensor:
        target = allocate_target(self.name, shape, dtype or self.dtype, device)
        self._contents.read_boxes([BoxToRead(self.name, offset, target)])
        return target


def allocate_target(
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Memory for a part of a stored tensor. Raises CheckpointCorruptError if there is not enough:
    a damaged index can name any size."""
    if device is not None:
        torch.empty(0, device=device)  # A wrong device is no fault of the checkpoint.
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        raise CheckpointCorruptError(
            f"there is no memory for a tensor of {tuple(shape)} of {dtype}", entry=name
        ) from error


def unpicklable(value: object) -> TypeError:
    """The error of an attempt to pickle a checkpoint or a part of it: its files are open here."""
    return TypeError(
        f"a {type(value).__name__} has open files, and cannot be pickled: pass the path, and open "
        "it where it is read"
    )


class LazyValue(_Wrapped):
    """A stored Python value, which is decoded when it is asked for, without running code."""

    def __init__(self, contents: Contents, name: str) -> None:
        self._contents = contents
        self.name = name
        """The flat name."""

    @property
    def nbytes(self) -> int:
        """That it takes in its file; 0 if it shares a pickle with others."""
        return self._contents.stored_nbytes(self.name)

    def value(self) -> Any:
        """The value.

        Raises UntrustedPickleError for one of a class that is not plain data; a wrapper of other
        tensors has `parts`.
        """
        return self._contents.read_value(self.name)

    def table_row(self) -> tuple[str, ...]:
        """As a tensor's."""
        return self.name, "value", "", "", f"{self.nbytes:,}"

    def __reduce__(self) -> NoReturn:
        raise unpicklable(self)

    def __repr__(self) -> str:
        return f"<{self.name!r}: a value of {self.nbytes} bytes>"


Lazy = LazyTensor | LazyValue

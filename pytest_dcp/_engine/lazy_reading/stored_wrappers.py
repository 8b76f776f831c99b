"""Wrappers of other tensors in an opened checkpoint: their inner tensors, without their classes.

A wrapper subclass, such as torchao's quantised weights, is stored as torch pickles it: the name of
its class, its attributes, and its inner tensors. Neither the class nor an object that it carries is
made here. Plain attributes and inner tensors are all that a reader gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from pytest_dcp._engine.format.entry import records_of
from pytest_dcp._engine.format.opaque_values import make_tensor
from pytest_dcp._engine.unpickle import TensorPickle, UnknownGlobalError
from pytest_dcp._engine.unpickle.opaque_tensors import (
    OpaquePickle,
    OpaqueWrapper,
    QuantisedPickle,
    read_opaque_pickle,
)
from pytest_dcp.errors import CheckpointCorruptError

Entry = bytes | memoryview
ReadEntry = Callable[[], Entry]
"""Reads the whole entry of a wrapper, with its checksums where it has some."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredPart:
    """An inner tensor of a wrapper: its elements are read when they are used."""

    name: str
    """The wrapper's, a dot, and the attribute."""
    _pickle: TensorPickle | QuantisedPickle
    _read: ReadEntry

    @property
    def shape(self) -> torch.Size:
        """Of this part."""
        return torch.Size(self._description.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return self._description.dtype

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """The part. The wrapper's whole entry is read.

        Raises CheckpointCorruptError for a damaged entry.
        """
        records = records_of(self._read())
        try:
            return make_tensor(self._pickle, lambda key: records(f"data/{key}"))
        except CheckpointCorruptError as error:
            raise error.at(entry=self.name) from error

    @property
    def _description(self) -> TensorPickle:
        pickled = self._pickle
        return pickled if isinstance(pickled, TensorPickle) else pickled.data

    def __reduce__(self) -> NoReturn:
        raise TypeError("a StoredPart has an open file, and cannot be pickled")

    def __repr__(self) -> str:
        return f"<{self.name!r}: {self.dtype} of {tuple(self.shape)}>"


@dataclass(frozen=True, slots=True, eq=False)
class StoredWrapper:
    """A wrapper of other tensors, which is a stored box of a tensor, or a value."""

    name: str
    """The flat name; of one within another, the outer one's, a dot, and the attribute."""
    kind: str
    """Its class, by module and name; it is not imported."""
    dtype: torch.dtype
    """That the wrapper shows; its parts have theirs."""
    shape: tuple[int, ...]
    """That the wrapper shows."""
    offset: tuple[int, ...]
    """In elements of the full tensor."""
    parts: Mapping[str, StoredPart | StoredWrapper]
    """Its inner tensors, by attribute."""
    attributes: Mapping[str, Any]
    """Its other attributes: plain values, and a placeholder for an object of any other class."""

    def walk_parts(self) -> Iterator[StoredPart]:
        """The inner tensors, at any depth."""
        for part in self.parts.values():
            if isinstance(part, StoredWrapper):
                yield from part.walk_parts()
            else:
                yield part

    def __reduce__(self) -> NoReturn:
        raise TypeError("a StoredWrapper has an open file, and cannot be pickled")

    def __repr__(self) -> str:
        return f"<{self.name!r}: a {self.kind} of {', '.join(self.parts)}>"


def describe_wrapper(
    name: str, stored: OpaqueWrapper, offset: tuple[int, ...], read: ReadEntry
) -> StoredWrapper:
    """The wrapper that an entry's pickle describes. read: reads that entry."""
    parts: dict[str, StoredPart | StoredWrapper] = {}
    for attribute, inner in stored.inner().items():
        below = f"{name}.{attribute}"
        if isinstance(inner, OpaqueWrapper):
            parts[attribute] = describe_wrapper(below, inner, (0,) * len(inner.shape), read)
        else:
            parts[attribute] = StoredPart(below, inner, read)
    others = {key: value for key, value in stored.state.items() if key not in parts}
    return StoredWrapper(name, stored.kind, stored.dtype, stored.shape, offset, parts, others)


def find_wrapper(entry: Entry) -> OpaqueWrapper | None:
    """The wrapper that the entry of a value holds; None for any other value.

    Raises CheckpointCorruptError for a damaged entry.
    """
    try:
        found: OpaquePickle = read_opaque_pickle(records_of(entry)("data.pkl"))
    except UnknownGlobalError:
        return None
    return found if isinstance(found, OpaqueWrapper) and found.inner() else None


def wrapper_text(name: str, kind: str) -> str:
    """The reason why a wrapper cannot be read as one tensor, with the way to read it."""
    return (
        f"{name!r} is stored as a {kind}, a wrapper of other tensors, which has no plain elements: "
        f"checkpoint[{name!r}].parts has these tensors, and `load` fills a tensor of its class"
    )

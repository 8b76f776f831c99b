"""An index that leaves its names packed until all of them are wanted.

A checkpoint of 100,000 names is opened to read one of them: to make the strings and the dict of all
would take longer than everything else. A few names are searched for in their block, at some GB/s;
then the dict is made. Pure (no I/O).

>>> import numpy as np
>>> from pytest_dcp._engine.plan.packed_names import pack_names
>>> none = np.zeros((2, 0), np.int64)
>>> index = pack_index(
...     PackedNames(pack_names(["w", "b"])), property_of=np.zeros(2, np.int32), properties=(),
...     ndim=np.zeros(2, np.int16), size=none, first=np.arange(3), offset=none, shape=none)
>>> len(index), index.find_row("b"), index.find_row("c"), "fqns" in vars(index)
(2, 1, None, False)
>>> index.fqns
('w', 'b')
"""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property
from typing import Any

from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.packed_names import TWICE, Fqns, PackedNames
from pytest_dcp.errors import CheckpointCorruptError

SEARCHES = 8
"""Of different names; the dict takes about as long as some ten of them."""


class PackedIndex(Index):
    """An index whose attributes `fqns` and `row_of` are made when they are used.

    That raises CheckpointCorruptError if a name is there twice or is no UTF-8, as does finding it.
    """

    packed: PackedNames | None = None
    """None in a copy, which has its names."""
    source_file: str | None = None
    """Where they come from, for errors."""

    def __len__(self) -> int:
        return len(self.ndim)

    def __getattr__(self, name: str) -> Any:
        if self.packed is None or name != "fqns":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            fqns = self.packed.unpack()
        except ValueError as error:
            raise CheckpointCorruptError(
                f"expected names, got {error}", file=self.source_file
            ) from None
        rows = {fqn: row for row, fqn in enumerate(fqns)}
        if len(rows) != len(fqns):
            twice = next(fqn for row, fqn in enumerate(fqns) if rows[fqn] != row)
            raise CheckpointCorruptError(TWICE, file=self.source_file, entry=twice)
        self.__dict__.update(fqns=fqns, row_of=rows)
        return fqns

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, tuple(getattr(self, f.name) for f in fields(Index))

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each key."""
        fqns = self.fqns
        rows: dict[str, int] | None = self.__dict__.get("row_of")
        return {fqn: row for row, fqn in enumerate(fqns)} if rows is None else rows

    def find_row(self, fqn: str) -> int | None:
        if "fqns" in self.__dict__ or self.packed is None:
            return self.row_of.get(fqn)
        found: dict[str, int | None] = self.__dict__.setdefault("found_rows", {})
        if fqn not in found:
            if len(found) >= SEARCHES:
                return self.row_of.get(fqn)
            try:
                found[fqn] = self.packed.find(fqn)
            except ValueError as error:
                text = str(error)
                raise CheckpointCorruptError(text, file=self.source_file, entry=fqn) from None
        return found[fqn]

    def names_at(self, rows: Ints) -> Fqns:
        if "fqns" in self.__dict__ or self.packed is None or len(rows) > SEARCHES:
            return super().names_at(rows)
        try:
            return tuple(map(self.packed.__getitem__, rows.tolist()))
        except ValueError as error:
            raise CheckpointCorruptError(
                f"expected a name, got {error}", file=self.source_file
            ) from None


def pack_index(packed: PackedNames, **columns: Any) -> PackedIndex:
    """The index of these names. columns: all other fields of an `Index`."""
    index = PackedIndex.__new__(PackedIndex)
    index.__dict__.update(columns, packed=packed)
    return index

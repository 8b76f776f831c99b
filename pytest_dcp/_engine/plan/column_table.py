"""Which fields of a table are its columns: one list for selection, the wire and the manifest.

A table is a dataclass with an array for each fact about its rows (see `columns`). Its columns are
the fields annotated as `Ints` or `NDArray`, in the order of the class. Code that copies, sends or
stores a table asks for them, so that a new column is one line, and nothing can leave it out. Pure
(no I/O).

>>> from dataclasses import dataclass, field
>>> import numpy as np
>>> @dataclass(frozen=True, eq=False)
... class Chunks(ColumnTable):
...     fqns: Fqns
...     start: Ints
...     kind: NDArray[np.int8]
...     limit: int = 8
...     source: object = field(default=None, metadata=AT_HOME)
>>> Chunks.column_names()
('start', 'kind')

A rank sends the other fields too, except names, which are packed on their own, and fields that mean
something only in its own process:

>>> list(Chunks(("w",), np.array([0]), np.array([1], np.int8), source=open).sent_fields())
['start', 'kind', 'limit']
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

AT_HOME: Mapping[str, bool] = {"at_home": True}
"""`metadata` of a field that refers to an object of this process: it is not sent."""

ARRAYS = ("Ints", "NDArray")
"""How the annotation of a column begins."""


class ColumnTable:
    """The base of tables, which are dataclasses."""

    __slots__ = ()

    @classmethod
    def column_names(cls) -> tuple[str, ...]:
        """The array fields."""
        table: Any = cls
        return tuple(f.name for f in fields(table) if str(f.type).startswith(ARRAYS))

    def sent_fields(self) -> dict[str, Any]:
        """Every field to send, by name, but the names."""
        table: Any = self
        field_names = (f.name for f in fields(table) if f.type != "Fqns" and f.metadata != AT_HOME)
        return {name: getattr(self, name) for name in field_names}

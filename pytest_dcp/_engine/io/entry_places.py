"""Where the data of entries begins, if the catalog does not say: entries written by torch.

This takes one small read per entry: if the bytes are the ones that our own writer puts before the
data, the data follows. Otherwise the entry's directory is parsed.

Two ranks have saved halves of a 2x2 tensor `w`, one with this engine's bytes, one with
`torch.save`; the catalog knows only where the entries are:

>>> import torch
>>> from pathlib import Path
>>> from torch.distributed.checkpoint.metadata import TensorProperties
>>> from pytest_dcp._engine.format.catalog import EntryPlaces
>>> from pytest_dcp._engine.io.local_disk import LocalDisk
>>> from pytest_dcp._engine.plan.boxes import pad_rows
>>> from pytest_dcp._engine.plan.index import Index
>>> halves = torch.arange(4.0).reshape(2, 2).split(1)
>>> frame = tensor_frame(torch.float32, (1, 2))
>>> _ = Path("ours").write_bytes(frame.head + halves[0].numpy().tobytes() + frame.tail(0))
>>> torch.save(halves[1].clone(), "theirs")
>>> index = Index(
...     fqns=("w",), property_of=np.array([0]), properties=(TensorProperties(torch.float32),),
...     ndim=np.array([2]), size=pad_rows([(2, 2)], 2, 1), first=np.array([0, 2]),
...     offset=pad_rows([(0, 0), (1, 0)], 2, 0), shape=pad_rows([(1, 2), (1, 2)], 2, 1))
>>> places = replace(
...     EntryPlaces.nowhere(2), files=("ours", "theirs"), file=np.array([0, 1]),
...     start=np.array([0, 0]),
...     length=np.array([Path(name).stat().st_size for name in ("ours", "theirs")]))
>>> both = np.array([0, 1])
>>> found = resolve_entry_places(Folder(LocalDisk(), Path()), Catalog(index, places), both)
>>> for name, start in zip(places.files, found.catalog.places.data_start.tolist()):
...     print(np.frombuffer(Path(name).read_bytes()[start : start + 8], np.float32))
[0. 1.]
[2. 3.]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.entry import tensor_frame
from pytest_dcp._engine.format.entry_locator import locate, locate_wrapper
from pytest_dcp._engine.format.shared_names import missing_data_file
from pytest_dcp._engine.io.disk import In
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import size_of
from pytest_dcp._engine.plan.opaque import STORED_DTYPES
from pytest_dcp._engine.unpickle import UnknownGlobalError
from pytest_dcp._engine.unpickle.opaque_tensors import OpaqueWrapper
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
)


@dataclass(slots=True)
class ResolvedCatalog:
    """A catalog whose wanted entries all say where their data is."""

    catalog: Catalog
    odd_strides: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Bytes between neighbours, of the chunks that are not stored row-major."""
    wrapped: dict[int, OpaqueWrapper] = field(default_factory=dict)
    """Descriptions of chunks stored as wrappers of other tensors; their data is the whole entry."""


def resolve_entry_places(
    folder: Folder, catalog: Catalog, entries: Ints, values: frozenset[int] = frozenset()
) -> ResolvedCatalog:
    """The catalog with the places of these chunks filled in; byte values are their whole entry.

    values: chunks that are read as byte values whatever the catalog says of them.
    """
    places = catalog.places
    lost = np.unique(entries[(places.data_start[entries] < 0) & (places.file[entries] >= 0)])
    if not len(lost):
        return ResolvedCatalog(catalog)
    found = ResolvedCatalog(catalog)
    data_start, data_nbytes = places.data_start.copy(), places.data_nbytes.copy()
    order = lost[np.lexsort((places.start[lost], places.file[lost]))]
    for number in np.unique(places.file[order]).tolist():
        name = places.files[number]
        try:
            with folder.open(name) as file:
                for row in order[places.file[order] == number].tolist():
                    data_start[row], data_nbytes[row] = _find(
                        file, catalog, row, found, whole=row in values
                    )
        except FileNotFoundError as error:
            raise missing_data_file(name) from error
    found.catalog = replace(
        catalog, places=replace(places, data_start=data_start, data_nbytes=data_nbytes)
    )
    return found


@dataclass(frozen=True, slots=True, eq=False)
class LocatedEntries:
    """Places of entries that another rank has found: a part of a `ResolvedCatalog`, to be sent."""

    entry: Ints
    data_start: Ints
    data_nbytes: Ints
    odd_strides: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, found: ResolvedCatalog, entries: Ints) -> LocatedEntries:
        """The places of these entries; wrappers of other tensors are left to each rank."""
        entries = np.array([e for e in entries.tolist() if e not in found.wrapped], dtype=np.int64)
        places, own = found.catalog.places, set(entries.tolist())
        odd = {entry: stride for entry, stride in found.odd_strides.items() if entry in own}
        return cls(entries, places.data_start[entries], places.data_nbytes[entries], odd)


def unlocated_tensors(catalog: Catalog, entries: Ints) -> Ints:
    """Those of these tensors whose entries must be parsed before their data can be read."""
    places, index = catalog.places, catalog.index
    entries = np.unique(entries)
    lost = (places.data_start[entries] < 0) & (places.file[entries] >= 0)
    lost &= index.ndim[index.key_of[entries]] >= 0
    return entries[lost & ~np.isin(entries, list(places.transforms))]


def apply_located(catalog: Catalog, some: Sequence[LocatedEntries]) -> ResolvedCatalog:
    """The catalog with these places filled in."""
    places = catalog.places
    data_start, data_nbytes = places.data_start.copy(), places.data_nbytes.copy()
    odd_strides: dict[int, tuple[int, ...]] = {}
    for located in some:
        data_start[located.entry] = located.data_start
        data_nbytes[located.entry] = located.data_nbytes
        odd_strides |= located.odd_strides
    places = replace(places, data_start=data_start, data_nbytes=data_nbytes)
    return ResolvedCatalog(replace(catalog, places=places), odd_strides)


def _find(
    file: In, catalog: Catalog, row: int, found: ResolvedCatalog, *, whole: bool
) -> tuple[int, int]:
    """Where the data of an entry begins, and its bytes."""
    index, places = catalog.index, catalog.places
    start, length = int(places.start[row]), int(places.length[row])
    key = int(index.key_of[row])
    name = places.files[places.file[row]]
    if start < 0 or start + length > file.size:
        raise CheckpointCorruptError(
            f"the entry of {length} bytes leaves the file, which has {file.size}",
            file=name, entry=index.fqns[key], offset=start,
        )  # fmt: skip
    if whole or index.ndim[key] < 0 or row in places.transforms:
        return start, length
    dtype = index.properties[index.property_of[key]].dtype
    shape = tuple(size_of(index.shape[row], int(index.ndim[key])))
    if dtype not in STORED_DTYPES:
        raise CheckpointMismatchError(
            f"{index.fqns[key]!r} is stored as {dtype}, whose elements mean nothing without their "
            "scales: load it into a tensor of this dtype",
            mismatched=(index.fqns[key],),
        )
    frame = tensor_frame(dtype, shape)
    if length == frame.length and _bytes(file, start, len(frame.head)) == frame.head:
        return start + len(frame.head), frame.data_nbytes
    return _parse_entry(file, row, found, dtype, shape)


def _parse_entry(
    file: In, row: int, found: ResolvedCatalog, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[int, int]:
    """Where the data is in an entry that was not written by this engine: from its directory.

    Notes strides that are not row-major, and wrappers of other tensors, in `found`.
    """
    index, places = found.catalog.index, found.catalog.places
    start, length = int(places.start[row]), int(places.length[row])
    name, fqn = places.files[places.file[row]], index.fqns[index.key_of[row]]
    try:
        record = locate(_reader(file, start), length)
    except UnknownGlobalError as error:
        wrapper = locate_wrapper(_reader(file, start), length)
        if wrapper is not None and (wrapper.dtype, wrapper.shape) == (dtype, shape):
            found.wrapped[row] = wrapper
            return start, length
        raise error.at(file=name, entry=fqn, offset=start) from error
    except CheckpointCorruptError as error:
        raise error.at(file=name, entry=fqn, offset=start) from error
    if record.dtype != dtype or record.shape != shape:
        raise CheckpointCorruptError(
            f"the entry holds {record.dtype} of shape {record.shape}, "
            f"the metadata says {dtype} of shape {shape}",
            file=name, entry=fqn, offset=start,
        )  # fmt: skip
    width = dtype.itemsize
    found.odd_strides[row] = tuple(step * width for step in record.stride)
    skipped = record.storage_offset * width
    return start + record.data_offset + skipped, record.data_nbytes - skipped


def _reader(file: In, start: int) -> Callable[[int, int], bytes]:
    return lambda offset, nbytes: _bytes(file, start + offset, nbytes)


def _bytes(file: In, offset: int, nbytes: int) -> bytes:
    view = memoryview(bytearray(nbytes))
    return bytes(view[: file.read_into(offset, view)])

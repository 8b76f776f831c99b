"""Checks of an untrusted catalog, before its numbers are used. Pure (no I/O).

Enters: an index and places whose arrays have the shapes and dtypes that their classes say.
Leaves: nothing, or `CheckpointCorruptError` naming the key. Rules inside: no arithmetic may wrap
around to a value that passes; each check is one pass over a column, and single rows are looked at
only to name the bad one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.shared_names import own_name
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import UNKNOWN
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.packed_names import TWICE
from pytest_dcp.errors import CheckpointCorruptError

MAX_DIMS = 64
"""Dimensions of a tensor: torch allows no more (c10, at::dim_bitset_size)."""
MAX_TENSOR_BYTES = 1 << 62
"""Bytes of one tensor, counting empty dimensions as 1 as torch's strides do. Every number derived
from sizes then fits int64."""
MAX_BLOCK_BYTES = 1 << 31
"""Bytes of data under one sum: multiplied by the number of sums they still fit int64."""
MAX_PATH_BYTES = 4096
"""PATH_MAX of Linux."""
_NO_PARTS = frozenset({"", ".", ".."})
_SLAB = 1 << 15
_MAX_INT64 = np.iinfo(np.int64).max
_FAR = (1 << 62) - 1
"""The sum of two numbers up to this fits int64."""

Mask = NDArray[np.bool_]


def checked_path(name: str) -> str:
    """The name of a data file, after checking that it stays inside the checkpoint's folder.

    It is relative and in plain form: no "", "." or ".." between its slashes, no NUL, not too long.

    Raises:
        CheckpointCorruptError: any other name.
    """
    whole = "\0" not in name and len(name.encode("utf-8", "surrogatepass")) < MAX_PATH_BYTES
    if not whole or not _NO_PARTS.isdisjoint(name.split("/")):
        raise CheckpointCorruptError(
            "expected the name of a file inside the checkpoint's folder, got "
            f"{name if len(name) < 200 else name[:200] + '...'!r}: do not load this checkpoint"
        )
    return name


def check_catalog(catalog: Catalog) -> None:
    """Check that the catalog satisfies every rule that `Index` and `EntryPlaces` state.

    A chunk without elements may lie outside its tensor: planners describe ranks that hold nothing
    this way.

    Raises:
        CheckpointCorruptError: the first rule that does not hold, with the key's name as `entry`.
    """
    check_names(catalog.index)
    check_keys(catalog.index)
    check_files(catalog.places)
    places = catalog.places
    check_groups(places.first_sum, len(places.sums), "sums")
    chunks = len(places.file)
    if any(not 0 <= row < chunks or places.file[row] < 0 for row in places.transforms):
        raise CheckpointCorruptError("expected transforms of chunks with a file, got others")
    check_chunks(catalog)


def check_chunks(catalog: Catalog) -> None:
    """Check the rules about single chunks. The keys, files and groups of sums were checked before.

    Raises CheckpointCorruptError naming the chunk.
    """
    index, places = catalog.index, catalog.places
    least = int(index.ndim.min(initial=MAX_DIMS))
    for start in range(0, len(places.file), _SLAB):
        slab = _Slab(index, slice(start, start + _SLAB), least)
        if _is_ordinary(slab, places):
            continue
        nbytes = _check_boxes(slab)
        _check_entries(slab, places)
        _check_data(slab, places, nbytes)
        _check_sums(slab, places)


@dataclass(frozen=True, slots=True)
class _Slab:
    """Chunks per pass: few enough that intermediate results stay in caches."""

    index: Index
    rows: slice
    least_ndim: int
    """The fewest dimensions of any key: dimensions from there on may be padding."""

    @property
    def keys(self) -> Ints:
        return self.index.key_of[self.rows]

    def refuse(self, odd: Mask, expected: str) -> None:
        """Raise if any chunk is odd."""
        if not odd.any():
            return
        row = self.rows.start + int(odd.argmax())
        key = int(self.index.key_of[row])
        at = row - int(self.index.first[key])
        raise CheckpointCorruptError(
            f"expected {expected}, got others in chunk {at}", entry=self.index.fqns[key]
        )


def _is_ordinary(slab: _Slab, places: EntryPlaces) -> bool:
    """Whether the chunks are of the ordinary form: inside their tensor, in a file, with data.

    If so, they satisfy every rule; otherwise the rules are checked one by one, in twice as many
    passes. Read as unsigned, negative numbers are larger than any limit here.
    """
    index, rows, keys = slab.index, slab.rows, slab.keys
    offset, shape, size = index.offset[rows], index.shape[rows], index.size.take(keys, axis=0)
    inside = _as_unsigned(shape) <= _as_unsigned(size)
    inside &= _as_unsigned(offset) <= _as_unsigned(size - shape)
    if not shape[:, max(slab.least_ndim, 0) :].all():
        return False  # in a padded dimension, whose size is 1, only 0 and 1 are right
    expected = index.itemsize.take(keys)
    for side in shape.T:
        expected *= side
    start, length, nbytes = (
        column[rows] for column in (places.start, places.length, places.data_nbytes)
    )
    lead = places.data_start[rows] - start
    counts = np.diff(places.first_sum[rows.start : rows.stop + 1])
    unused = counts * places.block_bytes - nbytes  # of the last block
    unlike = nbytes != expected
    if slab.least_ndim < 0:
        unlike &= index.ndim.take(keys) >= 0  # a value has no shape
    return bool(
        inside.all()
        and _as_unsigned(places.file[rows], np.uint32).max() < len(places.files)
        and max(_as_unsigned(column).max() for column in (start, length, lead, nbytes)) <= _FAR
        and not unlike.any()
        and (lead + nbytes <= length).all()
        and _as_unsigned(unused).max() < places.block_bytes
    )


def _as_unsigned(column: NDArray[Any], kind: type = np.uint64) -> NDArray[Any]:
    """The same bits, without a sign."""
    return column.view(kind)


def check_names(index: Index) -> None:
    """Check that no two keys have one name. Raises CheckpointCorruptError naming it."""
    if len(index.row_of) != len(index):
        twice = next(fqn for row, fqn in enumerate(index.fqns) if index.row_of[fqn] != row)
        raise CheckpointCorruptError(TWICE, entry=twice)


def check_keys(index: Index) -> None:
    """Check the rules about keys, but for their names, and that each has its group of chunks.

    Raises CheckpointCorruptError naming the key.
    """
    rank = index.size.shape[1]
    if rank > MAX_DIMS:
        raise CheckpointCorruptError(f"expected at most {MAX_DIMS} dimensions, got {rank}")
    ndim, property_count = index.ndim, len(index.properties)
    tensor = ndim >= 0
    _refuse_keys(index, (ndim < UNKNOWN) | (ndim > rank), f"-1 to {rank} dimensions")
    proper = np.where(tensor, index.property_of >= 0, index.property_of == UNKNOWN)
    _refuse_keys(
        index,
        ~proper | (index.property_of >= property_count),
        f"one of {property_count} properties",
    )
    nbytes = index.itemsize.astype(np.float64)
    for dim, side in enumerate(index.size.T):
        # By columns: numpy takes several times as long to reduce short rows.
        _refuse_keys(index, side < 0, "sizes of 0 or more")
        _refuse_keys(index, (ndim <= dim) & (side != 1), "sizes padded with 1")
        nbytes *= np.maximum(side, 1)
    _refuse_keys(index, nbytes > MAX_TENSOR_BYTES, f"a tensor of at most {MAX_TENSOR_BYTES} bytes")
    check_groups(index.first, len(index.offset), "chunks")
    odd = (index.ndim < 0) & (np.diff(index.first) != 1)
    _refuse_keys(index, odd, "one chunk for a byte value")


def _refuse_keys(index: Index, odd: Mask | np.bool_, expected: str) -> None:
    if odd.any():
        raise CheckpointCorruptError(
            f"expected {expected}, got others", entry=index.fqns[int(odd.argmax())]
        )


def check_groups(first: Ints, total: int, what: str) -> None:
    """Check that group i is first[i] to first[i + 1] - 1, and that the groups cover 0 to total - 1
    in order."""
    if first[0] != 0 or first[-1] != total or (first[1:] < first[:-1]).any():
        raise CheckpointCorruptError(
            f"expected the first {what} of each group to rise from 0 to {total}, got other numbers"
        )


def check_files(places: EntryPlaces) -> None:
    """Check the names of the data files and the size of blocks.

    Raises CheckpointCorruptError naming the file.
    """
    for name in places.files:
        if own_name(name) is None:
            checked_path(name)
    if not 0 < places.block_bytes <= MAX_BLOCK_BYTES:
        raise CheckpointCorruptError(
            f"expected blocks of 1 to {MAX_BLOCK_BYTES} bytes, got {places.block_bytes}"
        )


def _check_boxes(slab: _Slab) -> Ints:
    """Bytes of each chunk's data."""
    index, keys = slab.index, slab.keys
    nbytes = index.itemsize.take(keys)
    outside = np.zeros(len(keys), dtype=np.bool_)
    for dim in range(index.size.shape[1]):
        offset, shape = index.offset[slab.rows, dim], index.shape[slab.rows, dim]
        slab.refuse((offset | shape) < 0, "offsets and shapes of 0 or more")
        if dim >= slab.least_ndim:
            padding = (index.ndim <= dim).take(keys)
            odd = padding & ((offset != 0) | (shape != 1))
            slab.refuse(odd, "offsets padded with 0 and shapes with 1")
        outside |= shape > index.size[:, dim].take(keys) - offset
        nbytes *= shape
    if outside.any():
        filled = (index.shape[slab.rows] > 0).all(axis=1)
        slab.refuse(outside & filled, "chunks inside their tensor")
    return nbytes


def _check_entries(slab: _Slab, places: EntryPlaces) -> None:
    file, start, length = (
        column[slab.rows] for column in (places.file, places.start, places.length)
    )
    file_count = len(places.files)
    least = file.min()
    if least < UNKNOWN or file.max() >= file_count:
        slab.refuse((file >= file_count) | (file < UNKNOWN), f"one of {file_count} files")
    if least >= 0:
        slab.refuse((start | length) < 0, "an entry of 0 or more bytes at 0 or more")
        slab.refuse(length > _MAX_INT64 - start, "an entry that ends below 2**63")
        return
    placed = file >= 0
    data = places.data_start[slab.rows], places.data_nbytes[slab.rows]
    stated = np.logical_or.reduce([column != UNKNOWN for column in (start, length, *data)])
    slab.refuse(~placed & stated, "no place for a chunk without a file")
    slab.refuse(placed & ((start | length) < 0), "an entry of 0 or more bytes at 0 or more")
    far = placed & (length > _MAX_INT64 - np.maximum(start, 0))
    slab.refuse(far, "an entry that ends below 2**63")


def _check_data(slab: _Slab, places: EntryPlaces, expected: Ints) -> None:
    start, nbytes = places.data_start[slab.rows], places.data_nbytes[slab.rows]
    lead = start - places.start[slab.rows]  # wraps around only where `start` is refused below
    outside = ((lead | nbytes) < 0) | (nbytes > places.length[slab.rows] - lead)
    unlike = nbytes != expected
    if not outside.any() and not unlike.any():
        return
    has_data = start >= 0
    slab.refuse(
        ~has_data & ((start != UNKNOWN) | (nbytes != UNKNOWN)),
        "the data's start and length both -1 or neither",
    )
    slab.refuse(has_data & outside, "data inside its entry")
    tensors = has_data & (slab.index.ndim.take(slab.keys) >= 0)
    for row in places.transforms:
        if slab.rows.start <= row < slab.rows.stop:
            # A transformed entry is stored, and summed, as one stream.
            tensors[row - slab.rows.start] = False
    slab.refuse(tensors & unlike, "data of the chunk's shape and dtype")


def _check_sums(slab: _Slab, places: EntryPlaces) -> None:
    """A chunk has no sums, or one for each block of its data; empty data may have one."""
    rows = slice(slab.rows.start, slab.rows.stop + 1)
    counts = np.diff(places.first_sum[rows])
    nbytes, block_bytes = places.data_nbytes[slab.rows], places.block_bytes
    unused = counts * block_bytes - nbytes  # of the last block; negative: blocks are missing
    if unused.min() < 0 or unused.max() >= block_bytes:
        empty = (nbytes == 0) & (counts == 1)
        odd = ((unused < 0) | (unused >= block_bytes)) & ~empty
        slab.refuse((counts != 0) & odd, "a sum for each block of data")

"""Where a rank's items went, as columns that look like a list of torch's `WriteResult`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine.format.block_hashes import DIGEST_BYTES
from pytest_dcp._engine.format.catalog import EntryPlaces, index_key
from pytest_dcp._engine.plan.boxes import Ints, row_bounds, spans
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.lazy_containers import LazyList
from pytest_dcp._torch_internals.checkpoint_classes import _StorageInfo
from pytest_dcp.errors import PlanError


def no_digests() -> NDArray[np.uint8]:
    """The hashes of a save without hashes."""
    return np.zeros((0, DIGEST_BYTES), dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class WriteColumns:
    """Rows in the plan's order; the columns are those of `Places`."""

    files: tuple[str, ...]
    file: NDArray[np.int32]
    start: Ints
    length: Ints
    data_start: Ints
    data_nbytes: Ints
    first_sum: Ints
    sums: NDArray[np.uint32]
    transforms: tuple[str, ...] = ()
    """Descriptors, the same for every row."""
    own_transforms: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The descriptors of the rows that have different ones."""
    digests: NDArray[np.uint8] = field(default_factory=no_digests)
    """(rows, DIGEST_BYTES) strong hashes, see `block_hashes`; no rows if the save has none."""

    def descriptors(self, row: int) -> tuple[str, ...]:
        """Transforms that a reader must undo for the row's entry, in that order."""
        return self.own_transforms.get(row, self.transforms)


class WriteResults(LazyList[WriteResult]):
    """A rank's written items, which look like a list of torch's objects."""

    __slots__ = ("items", "written")

    def __init__(self, items: Sequence[WriteItem], written: WriteColumns) -> None:
        super().__init__()
        self.items = items
        self.written = written

    def lazy_len(self) -> int:
        return len(self.items)

    def make_item(self, at: int) -> WriteResult:
        written = self.written
        info = _StorageInfo(
            relative_path=written.files[written.file[at]],
            offset=int(written.start[at]),
            length=int(written.length[at]),
            transform_descriptors=list(written.descriptors(at)) or None,
        )
        return WriteResult(self.key(at), int(written.length[at]), info)

    def key(self, row: int) -> MetadataIndex:
        """The key of an item."""
        return self.items.key(row) if isinstance(self.items, WriteItems) else self.items[row].index

    def is_untouched(self) -> bool:
        """Whether the list and the objects in it are unchanged."""
        return len(self) == len(self.items) and all(
            item == self.make_item(at) for at, item in self.made_items()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.is_untouched():
            return WriteResults, (self.items, self.written)
        return super().__reduce__()


def join_results(parts: Sequence[WriteResults]) -> WriteResults:
    """The results of some files as those of one save, whose transforms are the same."""
    some = [part.written for part in parts]

    def joined(columns: Sequence[Any], dtype: Any) -> Any:
        return np.concatenate([*columns, np.zeros(0, dtype=dtype)])

    ends = np.cumsum([0, *(len(written.files) for written in some)])
    counts = joined([np.diff(written.first_sum) for written in some], np.int64)
    files = [np.where(w.file < 0, -1, w.file + end) for w, end in zip(some, ends, strict=False)]
    firsts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    own = {
        first + row: of
        for first, w in zip(firsts, some, strict=False)
        for row, of in w.own_transforms.items()
    }
    written = WriteColumns(
        files=tuple(name for w in some for name in w.files),
        file=joined(files, np.int32).astype(np.int32),
        start=joined([w.start for w in some], np.int64),
        length=joined([w.length for w in some], np.int64),
        data_start=joined([w.data_start for w in some], np.int64),
        data_nbytes=joined([w.data_nbytes for w in some], np.int64),
        first_sum=row_bounds(counts),
        sums=joined([w.sums for w in some], np.uint32),
        transforms=some[0].transforms if some else (),
        own_transforms=own,
    )
    return WriteResults([item for part in parts for item in part.items], written)


def places_of(index: Index, results: Iterable[Sequence[WriteResult]]) -> EntryPlaces:
    """The places of an index's chunks, from what every rank wrote.

    Raises PlanError if an item was written that the index does not have, or was written twice.
    """
    places = EntryPlaces.nowhere(len(index.offset))
    counts = np.zeros(len(index.offset), dtype=np.int64)
    files: dict[str, int] = {}
    transforms: dict[int, tuple[str, ...]] = {}
    file = places.file.copy()
    start, length = places.start.copy(), places.length.copy()
    data_start, data_nbytes = places.data_start.copy(), places.data_nbytes.copy()
    lookup: dict[MetadataIndex, int] = {}
    parts: list[tuple[Ints, NDArray[np.uint32]]] = []
    for part in chain.from_iterable(map(_columns_of, results)):
        written = part.written
        rows = _chunk_rows(index, part, lookup)
        _check_written_once(index, rows, file)
        numbers = [files.setdefault(name, len(files)) for name in written.files]
        file[rows] = np.array([*numbers, -1], dtype=np.int32)[written.file]
        start[rows], length[rows] = written.start, written.length
        data_start[rows], data_nbytes[rows] = written.data_start, written.data_nbytes
        counts[rows] = np.diff(written.first_sum)
        if written.transforms:
            transforms |= dict.fromkeys(rows.tolist(), written.transforms)
        transforms |= {int(rows[at]): of for at, of in written.own_transforms.items() if of}
        parts.append((rows, written.sums))
    first_sum = row_bounds(counts)
    return EntryPlaces(
        files=tuple(files),
        file=file,
        start=start,
        length=length,
        data_start=data_start,
        data_nbytes=data_nbytes,
        first_sum=first_sum,
        sums=_sums_in_order(first_sum, counts, parts),
        transforms=transforms,
    )


def _check_written_once(index: Index, rows: Ints, file: NDArray[np.int32]) -> None:
    """Raise PlanError if one of these chunks comes twice, or has been found in a file before."""
    found, times = np.unique(rows, return_counts=True)
    again = found[(times > 1) | (file[found] >= 0)]
    if len(again):
        twice = index_key(index, int(again[0]))
        raise PlanError(f"{twice} was written twice: the global plan has it on two ranks")


def _sums_in_order(
    first_sum: Ints, counts: Ints, parts: Sequence[tuple[Ints, NDArray[np.uint32]]]
) -> NDArray[np.uint32]:
    """The sums of all parts, in the order of the index's chunks.

    first_sum, counts: of each chunk. parts: chunks' rows, and their sums one after another.
    """
    sums = np.zeros(first_sum[-1], dtype=np.uint32)
    for rows, some_sums in parts:
        sums[np.repeat(first_sum[rows], counts[rows]) + spans(counts[rows])] = some_sums
    return sums


def whole_places_of(index: Index, results: Sequence[Sequence[WriteResult]]) -> EntryPlaces:
    """Like `places_of`; also raises PlanError if no rank wrote some chunk of the index."""
    places = places_of(index, results)
    unwritten = np.flatnonzero(places.file < 0)
    if len(unwritten):
        raise PlanError(
            f"{len(unwritten)} item(s) of the plan were written by no rank, the first is "
            f"{index_key(index, int(unwritten[0]))}: write_data must return a result for each"
        )
    return places


def places_and_more(
    index: Index, results: Sequence[Sequence[WriteResult]]
) -> tuple[EntryPlaces, dict[MetadataIndex, Any]]:
    """Like `whole_places_of`; also the places of written items that the index lacks, by key."""
    try:
        return whole_places_of(index, results), {}
    except PlanError:
        index_keys = {index_key(index, row) for row in range(len(index.offset))}
        every = [result for some in results for result in some]
        more = {one.index: one.storage_data for one in every if one.index not in index_keys}
        if not more:
            raise
    planned = [[one for one in some if one.index in index_keys] for some in results]
    return whole_places_of(index, planned), more


def digests_of(index: Index, results: Iterable[Sequence[WriteResult]]) -> NDArray[np.uint8]:
    """(chunks, DIGEST_BYTES) the strong hashes of an index's chunks; zeros: it has none."""
    table = np.zeros((len(index.offset), DIGEST_BYTES), dtype=np.uint8)
    lookup: dict[MetadataIndex, int] = {}
    for part in results:
        if isinstance(part, WriteResults) and len(part.written.digests) and part.is_untouched():
            table[_chunk_rows(index, part, lookup)] = part.written.digests
    return table


def files_of_results(results: Iterable[Sequence[WriteResult]]) -> set[str]:
    """The data files that hold the written items."""
    parts = chain.from_iterable(map(_columns_of, results))
    return {name for part in parts for name in part.written.files}


def _chunk_rows(index: Index, part: WriteResults, lookup: dict[MetadataIndex, int]) -> Ints:
    """The index's rows of the written items; by their hints where those are right."""
    items = part.items
    if isinstance(items, WriteItems) and len(index.offset):
        key = np.array([index.row_of.get(fqn, -1) for fqn in items.fqns], dtype=np.int64)
        rows = index.first[key] + np.maximum(items.hint, 0)
        width = min(items.offset.shape[1], index.offset.shape[1])
        fits = (key >= 0) & (rows < index.first[key + 1])
        safe = np.where(fits, rows, 0)
        fits &= (index.offset[safe, :width] == items.offset[:, :width]).all(axis=1)
        if fits.all():
            return rows
    if not lookup:
        lookup.update({index_key(index, row): row for row in range(len(index.offset))})
    keys = [part.key(row) for row in range(len(part))]
    strangers = [key for key in keys if key not in lookup]
    if strangers:
        raise PlanError(f"written, but not in the metadata of the global plan: {strangers[:5]}")
    return np.array([lookup[key] for key in keys], dtype=np.int64)


def _columns_of(results: Sequence[WriteResult]) -> list[WriteResults]:
    """The results as columns, grouped by the transforms of their entries."""
    if isinstance(results, WriteResults) and results.is_untouched():
        return [results]
    alike: dict[tuple[str, ...], list[WriteResult]] = {}
    for result in results:
        descriptors = getattr(result.storage_data, "transform_descriptors", None) or ()
        alike.setdefault(tuple(descriptors), []).append(result)
    return [_of_objects(some, descriptors) for descriptors, some in alike.items()]


def _of_objects(results: Sequence[WriteResult], descriptors: tuple[str, ...]) -> WriteResults:
    """Columns of the results that another storage's code returned with `_StorageInfo` places."""
    infos: list[_StorageInfo] = [result.storage_data for result in results]
    files: dict[str, int] = {}
    none = np.full(len(infos), -1, dtype=np.int64)
    written = WriteColumns(
        file=np.array(
            [files.setdefault(i.relative_path, len(files)) for i in infos], dtype=np.int32
        ),
        files=tuple(files),
        start=np.array([info.offset for info in infos], dtype=np.int64),
        length=np.array([info.length for info in infos], dtype=np.int64),
        data_start=none,
        data_nbytes=none,
        first_sum=np.zeros(len(infos) + 1, dtype=np.int64),
        sums=np.zeros(0, dtype=np.uint32),
        transforms=descriptors,
    )
    # Only the keys of these items are asked for.
    keys = [WriteItem(result.index, WriteItemType.BYTE_IO) for result in results]
    return WriteResults(keys, written)

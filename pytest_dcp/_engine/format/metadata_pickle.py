"""A catalog as the pickle of torch's `Metadata`, written opcode by opcode. Pure (no I/O).

Enters: a catalog. Leaves: bytes of protocol 4 that any unpickler turns into the object
that torch's own writer pickles, down to the instances' `__dict__`.

How: the stock pickler writes the fields of `Metadata` once. As `state_dict_metadata` it gets a
tuple of `_Words` instead: every class, key, name and property that is needed more than once, so
that the pickler's own memo gives the number of each. The dict of fields stays open, the real
mappings overwrite its values, and one BUILD ends it. Every chunk and every entry is a record:
opcodes of a fixed length for a given number of dimensions, so that one numpy operation writes a
column of numbers into all records.

For the opcodes see CPython's Lib/pickletools.py. Besides the opcodes in torch's files, only
LONG_BINGET, GLOBAL, and BININT and LONG1 for numbers of a fixed width are used.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.further_fields import PlainPickler
from pytest_dcp._engine.format.planner_paths import PathTable
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.containers import DescribedPaths
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.nested import TEXT
from pytest_dcp._torch_internals.checkpoint_classes import _StorageInfo

MARK_OF_OURS = b"pytest_dcp: a manifest follows STOP"
"""Is within the first `MARK_WITHIN` bytes: distinguishes a truncated file of ours from one of
torch.
"""
MARK_WITHIN = 256
_PROTOCOL = 4
_NEW = pickle.EMPTY_TUPLE + pickle.NEWOBJ
_OPEN = pickle.EMPTY_DICT + pickle.MARK
_CLOSE = pickle.SETITEMS + pickle.BUILD
_TUPLES = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_BATCH = 1000
"""Pairs that an unpickler keeps on its stack at a time, as with the stock pickler."""
_BLOCK_BYTES = 1 << 18
"""Bytes of records that are filled at a time: they stay in the core's cache meanwhile."""
_CLASSES = (
    *(TensorStorageMetadata, BytesStorageMetadata, TensorProperties, ChunkStorageMetadata),
    *(MetadataIndex, _StorageInfo, torch.Size),
)
_KEYS = (
    *("state_dict_metadata", "storage_data", "properties", "size", "chunks", "offsets", "sizes"),
    *("fqn", "index", "offset", "relative_path", "length", "transform_descriptors"),
)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """An opcode whose number differs from record to record."""

    opcode: bytes
    dtype: str
    values: NDArray[Any]


_Part = bytes | _Numbers
_Piece = bytes | memoryview


def pickle_metadata(catalog: Catalog) -> bytes:
    """The pickle of `catalog.metadata()` as torch's writer would have written it."""
    words = _Words(catalog)
    pieces: list[_Piece] = [words.head, words("state_dict_metadata"), pickle.EMPTY_DICT]
    pieces += _keys(words, catalog.index)
    pieces += [words("storage_data"), words.beside]
    pieces += _entries(words, catalog.index, catalog.places)
    pieces.append(_CLOSE + pickle.STOP)
    return b"".join(pieces)


def pickled_length(catalog: Catalog) -> int:
    """The bytes of `pickle_metadata`, without making them: those of a large job take gigabytes."""
    index, places, words = catalog.index, catalog.places, _Words(catalog)
    keys, kinds = len(index), index.ndim.astype(np.int64) + 1
    # As in `_keys`: two opcodes between batches, one MARK and one SETITEMS around all.
    around = 2 + 2 * ((keys - 1) // _BATCH) if keys else 0
    around += int((kinds > 0).sum()) * len(pickle.APPENDS + _CLOSE)
    heads = _record_bytes(kinds, lambda kind, rows: _key(words, index, kind - 1, rows))
    chunk_kinds = kinds[index.key_of]
    chunks = _record_bytes(chunk_kinds, lambda kind, rows: _chunk(words, index, kind - 1, rows))
    how, parts, left_out = _entry_kinds(words, index, places)
    runs = sum(1 for start, _ in _runs(how) if how[start] != left_out)
    fixed = [words.head, words("state_dict_metadata"), pickle.EMPTY_DICT]
    fixed += [words("storage_data"), words.beside, _CLOSE + pickle.STOP]
    return sum(map(len, fixed)) + around + heads + chunks + 2 * runs + _record_bytes(how, parts)


def _record_bytes(kinds: Ints, parts: Callable[[int, Rows], Sequence[_Part]]) -> int:
    """The bytes of the records of all rows."""
    counts = np.bincount(kinds)
    total = 0
    for kind in np.flatnonzero(counts).tolist():
        found = np.flatnonzero(kinds == kind)
        low, high = int(found[0]), int(found[-1]) + 1
        # Most rows are of one kind and adjacent: a slice copies none of their columns.
        rows: Rows = slice(low, high) if high - low == len(found) else found
        total += len(found) * sum(map(_part_bytes, parts(kind, rows)))
    return total


def _part_bytes(part: _Part) -> int:
    if isinstance(part, _Numbers):
        return len(part.opcode) + np.dtype(part.dtype).itemsize
    return len(part)


class _Words:
    """The stock pickler's output, and the opcode that fetches each of its words."""

    def __init__(self, catalog: Catalog) -> None:
        index, places = catalog.index, catalog.places
        states = [p.__reduce_ex__(_PROTOCOL)[2] for p in index.properties]
        transforms = sorted({text for some in places.transforms.values() for text in some})
        beside = dict(catalog.beside)
        fields = {
            "state_dict_metadata": (
                *(MARK_OF_OURS.decode(), _CLASSES, _KEYS),
                *(index.fqns, places.files, states, transforms),
            ),
            "planner_data": _plain(catalog.planner_data),
            "storage_data": beside or None,
            "storage_meta": catalog.storage_meta,
            "version": catalog.version,
            **catalog.further,
        }
        buffer = BytesIO()
        pickler = PlainPickler(buffer, _PROTOCOL)
        pickler.dump(fields)
        self._memo = pickler.memo.copy()
        self._word_numbers = {word: self.number(word) for word in (*_CLASSES, *_KEYS, *transforms)}
        self.head = _head(buffer.getvalue())
        number = self.number(beside).to_bytes(4, "little") if beside else b""
        self.beside = pickle.LONG_BINGET + number if beside else pickle.EMPTY_DICT
        """The opcodes of the dict that the places are put into."""
        self.states = self.numbers(states)
        self.fqns = self.numbers(index.fqns)
        self.files = self.numbers(places.files)

    def number(self, word: object) -> int:
        """The word's index in the memo, which is keyed by identity."""
        return self._memo[id(word)][0]

    def numbers(self, words: Iterable[object]) -> NDArray[np.uint32]:
        memo = self._memo
        return np.array([memo[id(word)][0] for word in words], dtype=np.uint32)

    def __call__(self, word: object) -> bytes:
        """The opcode that fetches a class, a key or a transform."""
        number = self._word_numbers[word]
        if number < 1 << 8:
            return pickle.BINGET + number.to_bytes(1, "little")
        return pickle.LONG_BINGET + number.to_bytes(4, "little")

    def new(self, kind: type) -> bytes:
        """An instance of the class, and its fields, opened."""
        return self(kind) + _NEW + _OPEN


def _head(fields: bytes) -> bytes:
    """A `Metadata` and its fields, opened. MARK replaces STOP, so that frame lengths stay right."""
    kind = f"{Metadata.__module__}\n{Metadata.__qualname__}\n".encode()
    start = len(pickle.PROTO) + 1
    return b"".join(
        [fields[:start], pickle.GLOBAL, kind, _NEW, fields[start : -len(pickle.STOP)], pickle.MARK]
    )


def _plain(planner_data: Any) -> Any:
    """The planner's data; paths as plain dict and ints, replacing any stand-ins."""
    if isinstance(planner_data, DescribedPaths):
        planner_data = dict(planner_data)
    if isinstance(planner_data, PathTable):
        return dict(planner_data)
    if type(planner_data) is not dict:
        return planner_data
    return {
        key: path if type(path) is tuple and TEXT.issuperset(map(type, path)) else _plain_path(path)
        for key, path in planner_data.items()
    }


def _plain_path(path: Any) -> Any:
    if type(path) is not tuple:
        return path
    return tuple(
        int(part) if isinstance(part, int) and type(part) is not bool else part for part in path
    )


def _keys(words: _Words, index: Index) -> list[_Piece]:
    """The items of `state_dict_metadata`."""
    kinds = index.ndim.astype(np.int64) + 1
    heads = _Shelf(kinds, lambda kind, rows: _key(words, index, kind - 1, rows))
    chunks = _Shelf(kinds[index.key_of], lambda kind, rows: _chunk(words, index, kind - 1, rows))
    first = index.first.tolist()
    pieces: list[_Piece] = []
    for row, kind in enumerate(kinds.tolist()):
        if row % _BATCH == 0:
            pieces.append(pickle.SETITEMS + pickle.MARK if row else pickle.MARK)
        pieces.append(heads.records(row, row + 1))
        if kind:
            pieces.append(chunks.records(first[row], first[row + 1]))
            pieces.append(pickle.APPENDS + _CLOSE)
    if first[1:]:
        pieces.append(pickle.SETITEMS)
    return pieces


def _entries(words: _Words, index: Index, places: EntryPlaces) -> Iterator[_Piece]:
    """The items of `storage_data`; chunks without a file are left out."""
    kinds, parts, left_out = _entry_kinds(words, index, places)
    shelf = _Shelf(kinds, parts)
    for start, stop in _runs(kinds):
        if kinds[start] != left_out:
            yield pickle.MARK
            yield shelf.records(start, stop)
            yield pickle.SETITEMS


def _entry_kinds(
    words: _Words, index: Index, places: EntryPlaces
) -> tuple[Ints, Callable[[int, Rows], list[_Part]], int]:
    """The kind of each chunk's record, the parts of a kind, and the kind that has no record."""
    descriptors = ((), *sorted(set(places.transforms.values())))
    number = {some: i for i, some in enumerate(descriptors)}
    how = np.zeros(len(places.file), dtype=np.int64)
    how[list(places.transforms)] = [number[some] for some in places.transforms.values()]
    ndims = index.size.shape[1] + 2
    kinds = how * ndims + index.ndim[index.key_of] + 1
    left_out = len(descriptors) * ndims
    kinds[places.file < 0] = left_out

    def parts(kind: int, rows: Rows) -> list[_Part]:
        if kind == left_out:
            return []
        some, ndim = divmod(kind, ndims)
        key = _entry_key(words, index, ndim - 1, rows)
        return key + _entry(words, places, descriptors[some], rows)

    return kinds, parts, left_out


Rows = Ints | slice


def _key(words: _Words, index: Index, ndim: int, rows: Rows) -> list[_Part]:
    """An item of `state_dict_metadata` up to its chunks."""
    name = _Numbers(pickle.LONG_BINGET, "<u4", words.fqns[rows])
    if ndim < 0:
        return [name, words(BytesStorageMetadata) + _NEW]
    state = _Numbers(pickle.LONG_BINGET, "<u4", words.states[index.property_of[rows]])
    properties = words("properties") + words(TensorProperties) + _NEW
    return [
        *(name, words.new(TensorStorageMetadata), properties, state),
        *(pickle.BUILD, words("size"), *_size(words, index.size[rows], ndim)),
        *(words("chunks"), pickle.EMPTY_LIST, pickle.MARK),
    ]


def _chunk(words: _Words, index: Index, ndim: int, rows: Rows) -> list[_Part]:
    if ndim < 0:
        return []
    return [
        *(words.new(ChunkStorageMetadata), words("offsets")),
        *_size(words, index.offset[rows], ndim),
        words("sizes"),
        *_size(words, index.shape[rows], ndim),
        _CLOSE,
    ]


def _entry_key(words: _Words, index: Index, ndim: int, rows: Rows) -> list[_Part]:
    """A byte value's key has neither offset nor hint, as torch's planner makes it."""
    key_of = index.key_of[rows]
    name = _Numbers(pickle.LONG_BINGET, "<u4", words.fqns[key_of])
    head: list[_Part] = [words.new(MetadataIndex), words("fqn"), name, words("index")]
    if ndim < 0:
        return [*head, pickle.NONE, _CLOSE]
    hint = np.arange(len(index.key_of))[rows] - index.first[key_of]
    return [
        *(*head, _ints(hint), words("offset")),
        *(*_size(words, index.offset[rows], ndim), _CLOSE),
    ]


def _entry(
    words: _Words, places: EntryPlaces, descriptors: Sequence[str], rows: Rows
) -> list[_Part]:
    file = _Numbers(pickle.LONG_BINGET, "<u4", words.files[places.file[rows]])
    parts: list[_Part] = [
        *(words.new(_StorageInfo), words("relative_path"), file),
        *(words("offset"), _ints(places.start[rows])),
        *(words("length"), _ints(places.length[rows])),
    ]
    if descriptors:
        texts = b"".join(map(words, descriptors))
        parts.append(words("transform_descriptors") + pickle.EMPTY_LIST)
        parts.append(pickle.MARK + texts + pickle.APPENDS)
    return [*parts, _CLOSE]


def _size(words: _Words, table: Ints, ndim: int) -> list[_Part]:
    """torch.Size of the row's first `ndim` numbers, as torch pickles it: a call with a tuple."""
    numbers = [_ints(table[:, dim]) for dim in range(ndim)]
    mark, end = (b"", _TUPLES[ndim]) if ndim < len(_TUPLES) else (pickle.MARK, pickle.TUPLE)
    return [words(torch.Size) + mark, *numbers, end + pickle.TUPLE1 + pickle.REDUCE]


def _ints(values: Ints) -> _Numbers:
    """4 bytes per number if all fit, else 8."""
    if not values.size or (values.max() < 1 << 31 and values.min() >= -(1 << 31)):
        return _Numbers(pickle.BININT, "<i4", values)
    return _Numbers(pickle.LONG1 + b"\x08", "<i8", values)


class _Shelf:
    """Records of every row. Each kind of row is filled in one go, and its rows are adjacent."""

    def __init__(self, kinds: Ints, parts: Callable[[int, Rows], Sequence[_Part]]) -> None:
        at = np.arange(len(kinds))
        self._tables: dict[int, memoryview] = {}
        self._widths: dict[int, int] = {}
        counts = np.bincount(kinds)
        for kind in np.flatnonzero(counts).tolist():
            count = int(counts[kind])
            rows: Rows = slice(None) if count == len(kinds) else np.flatnonzero(kinds == kind)
            at[rows] = np.arange(count)
            table = _repeat_parts(parts(kind, rows), count)
            self._tables[kind], self._widths[kind] = table.reshape(-1).data, table.shape[1]
        # Read row by row, for which lists are faster than arrays.
        self._kinds: list[int] = kinds.tolist()
        self._at: list[int] = at.tolist()

    def records(self, start: int, stop: int) -> memoryview:
        """The records of rows start to stop - 1, which must be of one kind."""
        if start == stop:
            return memoryview(b"")
        kind = self._kinds[start]
        width = self._widths[kind]
        at = self._at[start] * width
        return self._tables[kind][at : at + (stop - start) * width]


def _repeat_parts(parts: Sequence[_Part], count: int) -> NDArray[np.uint8]:
    """(count, length) the parts `count` times, with the numbers of each."""
    template, fields = b"", []
    for part in parts:
        if isinstance(part, _Numbers):
            fields.append((len(template) + len(part.opcode), part))
            part = part.opcode + bytes(np.dtype(part.dtype).itemsize)
        template += part
    length = len(template)
    table = np.empty((count, length), dtype=np.uint8)
    step = max(_BLOCK_BYTES // max(length, 1), 1)
    for start in range(0, count if length else 0, step):
        block = table[start : start + step]
        block[:] = np.frombuffer(template, dtype=np.uint8)
        for at, part in fields:
            column = np.ndarray(len(block), part.dtype, block.data, at, (length,))
            column[:] = part.values[start : start + step]
    return table


def _runs(kinds: Ints) -> list[tuple[int, int]]:
    """Start and stop of the stretches of one kind, none longer than a batch."""
    if not len(kinds):
        return []
    cut = np.flatnonzero(np.diff(kinds, prepend=kinds[0] - 1))
    bounds = np.union1d(cut, np.arange(0, len(kinds), _BATCH)).tolist()
    return list(pairwise([*bounds, len(kinds)]))

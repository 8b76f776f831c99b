"""The manifest: a catalog as columns; only attributes of frameworks are pickled. Pure (no I/O).

Enters and leaves: a catalog and its bytes. The bytes, all numbers little-endian:

    magic (8), length of the header (8), the header in JSON, then the columns of `COLUMNS` in that
    order, each at the next multiple of 8, then, if the header says so, further attributes of the
    Metadata (see `further_fields`), and nothing after them.

The header holds counts and small data (see `manifest_header`). It has no offsets: the counts
determine where each column lies, so no header can claim another place. The default planner's paths
are columns too (see `planner_paths`).

`decode` trusts nothing: it compares every count with the size of the buffer before it uses it, and
checks every rule of the catalog. The arrays it returns are read-only views of the buffer.

The columns, of n keys, c chunks and tensors of at most k dimensions:

    fqns           bytes     the keys, joined as `pack_names` does
    property_of    n i4      positions in the header's properties; -1: a byte value
    ndim           n i2      dimensions; -1: a byte value
    size           n*k i8    the full tensors, padded with 1
    first          n+1 i8    the chunks of key i are the rows first[i] to first[i + 1] - 1
    offset, shape  c*k i8    each chunk's box, padded with 0 and 1
    files          bytes     the data files' names, joined as the keys
    file           c i4      positions in files; -1: not stored
    start, length  c i8      the chunk's entry in its file
    data_start, data_nbytes  c i8    the tensor's elements in that file; -1: parse the entry
    first_sum      c+1 i8    the sums of chunk i are first_sum[i] to first_sum[i + 1] - 1
    sums           u4        CRC-32 of the data up to the end of each block of block_bytes
    transform_of   c i4      positions in the header's transforms, or absent where none has any
    path_forms     n i4, and paths, bytes: see `planner_paths`; absent where no path is kept

Assumes that the caller has checked the bytes against damage (`metadata_file` has a checksum), so
that an error here means that the file was made wrong, by malice or by a bug. Guarantees that
decoding takes no more memory than a small multiple of the buffer, and that `encode` of the same
catalog gives the same bytes.

Two ranks have saved halves of a 4x2 tensor `w`, each in its own file:

>>> import torch
>>> from torch.distributed.checkpoint.metadata import TensorProperties
>>> from pytest_dcp._engine.plan.boxes import pad_rows
>>> index = Index(
...     fqns=("w",), property_of=np.array([0]), properties=(TensorProperties(torch.float32),),
...     ndim=np.array([2]), size=pad_rows([(4, 2)], 2, 1), first=np.array([0, 2]),
...     offset=pad_rows([(0, 0), (2, 0)], 2, 0), shape=pad_rows([(2, 2), (2, 2)], 2, 1))
>>> places = replace(
...     EntryPlaces.nowhere(2), files=("__0_0.distcp", "__1_0.distcp"), file=np.array([0, 1]),
...     start=np.array([0, 0]), length=np.array([900, 900]))
>>> data = encode(Catalog(index, places))

The magic, the header's length, and the header:

>>> magic, length = HEAD.unpack_from(data)
>>> magic, json.loads(data[16 : 16 + length])["counts"]["chunks"]
(b'\\x89DCPcat\\n', 2)

The first column, the names, begins at the next multiple of 8:

>>> start = 16 + length + -length % 8
>>> data[start : start + 8]
b'w\\x00\\x00\\x00\\x00\\x00\\x00\\x00'

The way back needs no pickle, since the manifest holds everything:

>>> again = decode(memoryview(data), whole=lambda: 1 / 0)
>>> again.index.offset.tolist(), again.places.files
([[0, 0], [2, 0]], ('__0_0.distcp', '__1_0.distcp'))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.catalog_checks import (
    check_catalog,
    check_chunks,
    check_files,
    check_groups,
    check_keys,
    check_names,
)
from pytest_dcp._engine.format.further_fields import decode_further, encode_further
from pytest_dcp._engine.format.manifest_header import (
    IN_PICKLE,
    decode_extras,
    encode_extras,
    name_properties,
    number_transforms,
    read_properties,
    read_transforms,
)
from pytest_dcp._engine.format.manifest_layout import (
    CHUNK_COLUMNS,
    COLUMNS,
    HEAD,
    Columns,
    check_counts,
    locate_columns,
    view_columns,
)
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit, estimate_json_bytes
from pytest_dcp._engine.plan.column_table import ColumnTable
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.packed_index import PackedIndex, pack_index
from pytest_dcp._engine.plan.packed_names import Fqns, PackedNames, pack_names, unpack_names
from pytest_dcp.errors import CheckpointCorruptError

MAGIC = b"\x89DCPcat\n"
"""Like PNG's: it is not text, and any conversion of line ends damages it."""
MAX_HEADER_BYTES = 1 << 24
"""The header's JSON takes about 20 times its length in memory."""


def encode(catalog: Catalog) -> bytes:
    """The manifest of the catalog. Raises ValueError if its header would be too long."""
    return b"".join(encode_pieces(catalog))


def encoded_length(catalog: Catalog) -> int:
    """The bytes of `encode`, one column at a time: a manifest of a large job has gigabytes."""
    return sum(len(piece) for piece in encode_pieces(catalog))


def encode_pieces(catalog: Catalog) -> Iterator[bytes | memoryview]:
    """The manifest, one column after the other."""
    index, places = catalog.index, catalog.places
    header: dict[str, Any] = {"block_bytes": places.block_bytes}
    header["properties"] = [name_properties(p) for p in index.properties]
    columns: dict[str, Any] = {
        "fqns": pack_names(index.fqns),
        "files": pack_names(places.files),
        **{name: getattr(index, name) for name in Index.column_names()},
        **{name: getattr(places, name) for name in EntryPlaces.column_names()},
    }
    header["transforms"], columns["transform_of"] = number_transforms(places)
    header["said"], columns["path_forms"], columns["paths"] = encode_extras(catalog)
    more = catalog.further or catalog.beside
    further = encode_further(catalog.further, catalog.beside) if more else b""
    if further:
        header["further_bytes"] = len(further)
    header["counts"] = _counts(columns)
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"expected a manifest's header of at most {MAX_HEADER_BYTES} bytes, got {len(text)}: "
            "transforms, properties or the modules of storage_meta are too many"
        )
    yield HEAD.pack(MAGIC, len(text))
    yield from _pad(text)
    yield from _encode_columns(columns)
    yield from _pad(further)


def decode(
    buffer: memoryview, whole: Callable[[], Metadata], limit: MemoryLimit = DEFAULT_LIMIT
) -> Catalog:
    """The catalog of a manifest, its arrays read-only views of `buffer`.

    `whole` reads the metadata from the pickle; it is called only if the manifest could not hold the
    planner's or the storage's data.

    Raises:
        CheckpointCorruptError: the bytes are not a manifest, or the catalog breaks a rule; `offset`
            counts from the buffer's start.
    """
    header, start = _header(buffer, limit)
    counts = check_counts(header, len(buffer))
    spans, end = locate_columns(start, counts, len(buffer))
    further = _further(header, buffer, end)
    catalog = _catalog(header, view_columns(buffer, spans, counts), whole, further)
    check_catalog(catalog)
    return catalog


@dataclass(frozen=True, slots=True)
class OpenedManifest:
    """A manifest of which the columns of chunks have not been read yet."""

    catalog: Catalog
    """All but these columns is read and checked. They are views of the buffer, as it will be."""
    spans: Mapping[str, tuple[int, int]]
    """Where each column begins and ends in the buffer."""
    counts: Mapping[str, int]
    """Of the header."""


def open_keys(
    buffer: memoryview, fill_range: Callable[[int, int], None], limit: MemoryLimit = DEFAULT_LIMIT
) -> OpenedManifest | None:
    """The keys and the files of a manifest, without its chunks; None if it must be read whole.

    That is so if chunks have transforms, or if not all of its data is in columns. fill_range: reads
    and checks the buffer's bytes from one offset to another.

    Raises CheckpointCorruptError as `decode` does.
    """
    fill_range(0, min(HEAD.size, len(buffer)))
    fill_range(0, _header_end(buffer))
    header, start = _header(buffer, limit)
    counts = check_counts(header, len(buffer))
    spans, end = locate_columns(start, counts, len(buffer))
    if counts["transformed"] or _further(header, buffer, end) or _is_in_pickle(header):
        return None
    for name, (at, stop) in spans.items():
        if name not in CHUNK_COLUMNS:
            fill_range(at, stop)
    columns = view_columns(buffer, spans, counts)
    # Names and paths are made, and checked, when they are used: with many keys it would take longer
    # than all else here.
    catalog = _catalog(header, columns, _refuse_pickle, later=True)
    if not isinstance(catalog.index, PackedIndex):
        check_names(catalog.index)
    check_keys(catalog.index)
    check_files(catalog.places)
    return OpenedManifest(catalog, spans, counts)


def decode_chunks(buffer: memoryview, opened: OpenedManifest) -> Catalog:
    """The catalog of a manifest whose keys have been opened; the buffer has all of its bytes.

    Raises CheckpointCorruptError if a chunk breaks a rule.
    """
    columns = view_columns(buffer, opened.spans, opened.counts)
    catalog = opened.catalog
    catalog = replace(
        catalog,
        index=_with_chunks(catalog.index, columns),
        places=_with_chunks(catalog.places, columns),
    )
    check_groups(catalog.places.first_sum, len(catalog.places.sums), "sums")
    check_chunks(catalog)
    return catalog


Table = TypeVar("Table", bound=ColumnTable)


def _with_chunks(table: Table, columns: Columns) -> Table:
    # Not dataclasses.replace, which would make all names.
    whole = type(table).__new__(type(table))
    chunks = {name: columns[name] for name in CHUNK_COLUMNS.intersection(table.column_names())}
    whole.__dict__.update(vars(table) | chunks)
    return whole


# ---- writing


def _counts(columns: Mapping[str, Any]) -> dict[str, int]:
    return {
        "keys": len(columns["ndim"]),
        "chunks": len(columns["file"]),
        "rank": columns["size"].shape[1],
        "sums": len(columns["sums"]),
        "transformed": len(columns["transform_of"]),
        "pathed": len(columns["path_forms"]),
        "fqn_bytes": len(columns["fqns"]),
        "file_bytes": len(columns["files"]),
        "path_bytes": len(columns["paths"]),
    }


def _encode_columns(columns: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    for name, dtype, _, _ in COLUMNS:
        column = columns[name]
        if not isinstance(column, bytes):
            column = np.ascontiguousarray(column, dtype).reshape(-1).view(np.uint8).data
        yield from _pad(column)


def _pad(piece: bytes | memoryview) -> tuple[bytes | memoryview, bytes]:
    return piece, bytes(-len(piece) % 8)


# ---- reading


def _header_end(buffer: memoryview) -> int:
    """Where the header's text ends; it begins after the magic and its length."""
    if len(buffer) < HEAD.size:
        raise CheckpointCorruptError(f"expected a manifest, got {len(buffer)} bytes", offset=0)
    magic, length = HEAD.unpack_from(buffer)
    if magic != MAGIC:
        raise CheckpointCorruptError(f"expected a manifest's {MAGIC!r}, got {magic!r}", offset=0)
    end: int = HEAD.size + length
    if end > len(buffer) or length > MAX_HEADER_BYTES:
        raise CheckpointCorruptError(
            f"expected a header within {min(len(buffer), MAX_HEADER_BYTES)} bytes, got {length}",
            offset=8,
        )
    return end


def _header(buffer: memoryview, limit: MemoryLimit) -> tuple[dict[str, Any], int]:
    """The header and where the columns start."""
    end = _header_end(buffer)
    text = bytes(buffer[HEAD.size : end])
    limit.check("a header", estimate_json_bytes(text), len(text))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"expected a header in JSON, got {error!r:.200}", offset=HEAD.size
        ) from None
    if not isinstance(header, dict):
        raise CheckpointCorruptError("expected a header with names", offset=HEAD.size)
    return header, end + -end % 8


def _further(header: Mapping[str, Any], buffer: memoryview, start: int) -> memoryview:
    """The pickle of further attributes, which is all that follows the columns."""
    nbytes = header.get("further_bytes", 0)
    if type(nbytes) is not int or not 0 <= nbytes <= len(buffer):
        raise CheckpointCorruptError(f"expected a number of bytes, got {nbytes!r:.80}", offset=8)
    end = start + nbytes + -nbytes % 8
    if end != len(buffer):
        raise CheckpointCorruptError(
            f"expected a manifest of {end} bytes, got {len(buffer)}", offset=start
        )
    return buffer[start : start + nbytes]


def _is_in_pickle(header: Mapping[str, Any]) -> bool:
    extras = header.get("said")
    return not isinstance(extras, dict) or any(value == [IN_PICKLE] for value in extras.values())


def _refuse_pickle() -> NoReturn:
    raise ValueError("a part is in the pickle")


def _catalog(
    header: Mapping[str, Any],
    columns: Columns,
    whole: Callable[[], Metadata],
    further: memoryview | None = None,
    *,
    later: bool = False,
) -> Catalog:
    try:
        catalog = _make_catalog(header, columns, whole, later=later)
        if further:
            attributes, beside = decode_further(further)
            catalog = replace(catalog, further=attributes, beside=beside)
    except CheckpointCorruptError:
        raise
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointCorruptError(f"expected a manifest, got {error!r:.200}") from None
    return catalog


def _make_catalog(
    header: Mapping[str, Any],
    columns: Columns,
    whole: Callable[[], Metadata],
    *,
    later: bool,
) -> Catalog:
    block = columns["fqns"].tobytes()
    later = later and PackedNames.can_search(block)
    fqns: Fqns | PackedNames = PackedNames(block) if later else unpack_names(block)
    files = unpack_names(columns["files"].tobytes())
    if len(fqns) != len(columns["ndim"]):
        raise ValueError(f"{len(fqns)} names for {len(columns['ndim'])} keys")
    if type(header["block_bytes"]) is not int:
        raise TypeError(f"blocks of {header['block_bytes']!r:.80} bytes")
    facts: dict[str, Any] = {name: columns[name] for name in Index.column_names()}
    facts["properties"] = tuple(read_properties(fields) for fields in header["properties"])
    index = pack_index(fqns, **facts) if isinstance(fqns, PackedNames) else Index(fqns, **facts)
    places = EntryPlaces(
        files=files,
        block_bytes=header["block_bytes"],
        transforms=read_transforms(header["transforms"], columns["transform_of"]),
        **{name: columns[name] for name in EntryPlaces.column_names()},
    )
    extras = decode_extras(header["said"], fqns, columns, whole, check_paths=not later)
    return Catalog(index, places, **extras)

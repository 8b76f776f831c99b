"""The manifest: a catalog as columns; only attributes of frameworks are pickled. Pure (no I/O).

Enters and leaves: a catalog and its bytes. The bytes, all numbers little-endian:

    magic (8), length of the header (8), the header in JSON, then the columns of `_COLUMNS` in that
    order, each at the next multiple of 8, then, if the header says so, further attributes of the
    Metadata (see `further_fields`), and nothing after them.

The header holds counts and small data (see `manifest_header`). It has no offsets: the counts
determine where each column lies, so no header can claim another place. The default planner's paths
are columns too (see `planner_paths`).

`decode` trusts nothing: it compares every count with the size of the buffer before it uses it, and
checks every rule of the catalog. The arrays it returns are read-only views of the buffer.

The columns, of n keys, c chunks and tensors of at most k dimensions:

    fqns           bytes     the keys, joined as `packed_names.pack_names` does
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

>>> magic, length = _HEAD.unpack_from(data)
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
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import Metadata

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.catalog_checks import (
    MAX_DIMS,
    check_catalog,
    check_files,
    check_keys,
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
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit, estimate_json_bytes
from pytest_dcp._engine.plan import packed_names
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError

MAGIC = b"\x89DCPcat\n"
"""Like PNG's: it is not text, and any conversion of line ends damages it."""
MAX_HEADER_BYTES = 1 << 24
"""The header's JSON takes about 20 times its length in memory."""
_HEAD = struct.Struct("<8sQ")
_COLUMNS = (
    # name, dtype, rows, columns (None: one-dimensional); counts are the header's
    ("fqns", "<u1", "fqn_bytes", None),
    ("property_of", "<i4", "keys", None),
    ("ndim", "<i2", "keys", None),
    ("size", "<i8", "keys", "rank"),
    ("first", "<i8", "key_ends", None),
    ("offset", "<i8", "chunks", "rank"),
    ("shape", "<i8", "chunks", "rank"),
    ("files", "<u1", "file_bytes", None),
    ("file", "<i4", "chunks", None),
    ("start", "<i8", "chunks", None),
    ("length", "<i8", "chunks", None),
    ("data_start", "<i8", "chunks", None),
    ("data_nbytes", "<i8", "chunks", None),
    ("first_sum", "<i8", "chunk_ends", None),
    ("sums", "<u4", "sums", None),
    ("transform_of", "<i4", "transformed", None),
    ("path_forms", "<i4", "pathed", None),
    ("paths", "<u1", "path_bytes", None),
)
_COUNTS = (
    *("keys", "chunks", "rank", "sums", "transformed", "pathed"),
    *("fqn_bytes", "file_bytes", "path_bytes"),
)
CHUNK_COLUMNS = frozenset(
    name for name, _, rows, _ in _COLUMNS if rows in ("chunks", "chunk_ends", "sums")
)
"""Those that take most of the manifest of a large job."""
Columns = Mapping[str, NDArray[Any]]


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
        "fqns": packed_names.pack_names(index.fqns),
        "files": packed_names.pack_names(places.files),
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
    yield _HEAD.pack(MAGIC, len(text))
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
    counts = _checked_counts(header, len(buffer))
    spans, end = _locate_columns(start, counts, len(buffer))
    further = _further(header, buffer, end)
    catalog = _catalog(header, _view_columns(buffer, spans, counts), whole, further)
    check_catalog(catalog)
    return catalog


@dataclass(frozen=True, slots=True)
class OpenedManifest:
    """A manifest of which the columns of chunks have not been read yet."""

    catalog: Catalog
    """All but these columns is read and checked. They are views of the buffer, as it will be."""
    spans: Mapping[str, tuple[int, int]]
    """Where each column begins and ends in the buffer."""


def open_keys(
    buffer: memoryview, fill_range: Callable[[int, int], None], limit: MemoryLimit = DEFAULT_LIMIT
) -> OpenedManifest | None:
    """The keys and the files of a manifest, without its chunks; None if it must be read whole.

    That is so if chunks have transforms, or if not all of its data is in columns. fill_range: reads
    and checks the buffer's bytes from one offset to another.

    Raises CheckpointCorruptError as `decode` does.
    """
    fill_range(0, min(_HEAD.size, len(buffer)))
    fill_range(0, _header_end(buffer))
    header, start = _header(buffer, limit)
    counts = _checked_counts(header, len(buffer))
    spans, end = _locate_columns(start, counts, len(buffer))
    if counts["transformed"] or _further(header, buffer, end) or _is_in_pickle(header):
        return None
    for name, (at, stop) in spans.items():
        if name not in CHUNK_COLUMNS:
            fill_range(at, stop)
    columns = _view_columns(buffer, spans, counts)
    # Each path is checked when it is made: to check all would take longer than all else here.
    catalog = _catalog(header, columns, _refuse_pickle, check_paths=False)
    check_keys(catalog.index)
    check_files(catalog.places)
    return OpenedManifest(catalog, spans)


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
    for name, dtype, _, _ in _COLUMNS:
        column = columns[name]
        if not isinstance(column, bytes):
            column = np.ascontiguousarray(column, dtype).reshape(-1).view(np.uint8).data
        yield from _pad(column)


def _pad(piece: bytes | memoryview) -> tuple[bytes | memoryview, bytes]:
    return piece, bytes(-len(piece) % 8)


# ---- reading


def _header_end(buffer: memoryview) -> int:
    """Where the header's text ends; it begins after the magic and its length."""
    if len(buffer) < _HEAD.size:
        raise CheckpointCorruptError(f"expected a manifest, got {len(buffer)} bytes", offset=0)
    magic, length = _HEAD.unpack_from(buffer)
    if magic != MAGIC:
        raise CheckpointCorruptError(f"expected a manifest's {MAGIC!r}, got {magic!r}", offset=0)
    end: int = _HEAD.size + length
    if end > len(buffer) or length > MAX_HEADER_BYTES:
        raise CheckpointCorruptError(
            f"expected a header within {min(len(buffer), MAX_HEADER_BYTES)} bytes, got {length}",
            offset=8,
        )
    return end


def _header(buffer: memoryview, limit: MemoryLimit) -> tuple[dict[str, Any], int]:
    """The header and where the columns start."""
    end = _header_end(buffer)
    text = bytes(buffer[_HEAD.size : end])
    limit.check("a header", estimate_json_bytes(text), len(text))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"expected a header in JSON, got {error!r:.200}", offset=_HEAD.size
        ) from None
    if not isinstance(header, dict):
        raise CheckpointCorruptError("expected a header with names", offset=_HEAD.size)
    return header, end + -end % 8


def _checked_counts(header: Mapping[str, Any], most: int) -> dict[str, int]:
    """The header's counts, and the counts that follow from them."""
    counts = header.get("counts")
    if not isinstance(counts, dict) or counts.keys() != set(_COUNTS):
        raise CheckpointCorruptError(f"expected the counts {', '.join(_COUNTS)}", offset=_HEAD.size)
    for name, count in counts.items():
        limit = MAX_DIMS if name == "rank" else most
        if type(count) is not int or not 0 <= count <= limit:
            raise CheckpointCorruptError(
                f"expected 0 to {limit} as count of {name}, got {count!r:.80}", offset=_HEAD.size
            )
    keys, chunks = counts["keys"], counts["chunks"]
    if counts["transformed"] not in (0, chunks) or counts["pathed"] not in (0, keys):
        raise CheckpointCorruptError("expected a row for each chunk and key", offset=_HEAD.size)
    return {**counts, "key_ends": keys + 1, "chunk_ends": chunks + 1}


def _locate_columns(
    start: int, counts: Mapping[str, int], most: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each column begins and ends, as follows from the counts, and where the last one's
    padding ends."""
    spans: dict[str, tuple[int, int]] = {}
    at = start
    for name, kind, rows, width in _COLUMNS:
        shape = (counts[rows],) if width is None else (counts[rows], counts[width])
        end = at + prod(shape) * np.dtype(kind).itemsize
        if end > most:
            raise CheckpointCorruptError(
                f"expected column {name} of {shape} within {most} bytes, got it up to {end}",
                offset=at,
            )
        spans[name] = at, end
        at = end + -end % 8
    return spans, at


def _view_columns(
    buffer: memoryview, spans: Mapping[str, tuple[int, int]], counts: Mapping[str, int]
) -> Columns:
    """The columns as read-only views of the buffer."""
    found: dict[str, NDArray[Any]] = {}
    for name, kind, rows, width in _COLUMNS:
        start, end = spans[name]
        column = np.frombuffer(buffer[start:end], kind)
        if width is not None:
            column = column.reshape(counts[rows], counts[width])
        column.flags.writeable = False
        found[name] = column
    return found


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
    check_paths: bool = True,
) -> Catalog:
    try:
        catalog = _make_catalog(header, columns, whole, check_paths=check_paths)
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
    check_paths: bool,
) -> Catalog:
    fqns = packed_names.unpack_names(columns["fqns"].tobytes())
    files = packed_names.unpack_names(columns["files"].tobytes())
    if len(fqns) != len(columns["ndim"]):
        raise ValueError(f"{len(fqns)} names for {len(columns['ndim'])} keys")
    if type(header["block_bytes"]) is not int:
        raise TypeError(f"blocks of {header['block_bytes']!r:.80} bytes")
    index = Index(
        fqns=fqns,
        properties=tuple(read_properties(fields) for fields in header["properties"]),
        **{name: columns[name] for name in Index.column_names()},
    )
    places = EntryPlaces(
        files=files,
        block_bytes=header["block_bytes"],
        transforms=read_transforms(header["transforms"], columns["transform_of"]),
        **{name: columns[name] for name in EntryPlaces.column_names()},
    )
    extras = decode_extras(header["said"], fqns, columns, whole, check_paths=check_paths)
    return Catalog(index, places, **extras)

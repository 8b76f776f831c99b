"""Which columns a manifest has, and where they lie in its bytes. Pure (no I/O).

`manifest_columns` says what each of them means. Their places follow from the header's counts alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog_checks import MAX_DIMS
from pytest_dcp.errors import CheckpointCorruptError

HEAD = struct.Struct("<8sQ")
"""The manifest's magic, and the length of its header."""
COLUMNS = (
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
COUNTS = (
    *("keys", "chunks", "rank", "sums", "transformed", "pathed"),
    *("fqn_bytes", "file_bytes", "path_bytes"),
)
CHUNK_COLUMNS = frozenset(
    name for name, _, rows, _ in COLUMNS if rows in ("chunks", "chunk_ends", "sums")
)
"""They take most of the manifest of a large job."""
Columns = Mapping[str, NDArray[Any]]


def check_counts(header: Mapping[str, Any], most: int) -> dict[str, int]:
    """The header's counts, and the counts that follow from them."""
    counts = header.get("counts")
    if not isinstance(counts, dict) or counts.keys() != set(COUNTS):
        raise CheckpointCorruptError(f"expected the counts {', '.join(COUNTS)}", offset=HEAD.size)
    for name, count in counts.items():
        limit = MAX_DIMS if name == "rank" else most
        if type(count) is not int or not 0 <= count <= limit:
            raise CheckpointCorruptError(
                f"expected 0 to {limit} as count of {name}, got {count!r:.80}", offset=HEAD.size
            )
    keys, chunks = counts["keys"], counts["chunks"]
    if counts["transformed"] not in (0, chunks) or counts["pathed"] not in (0, keys):
        raise CheckpointCorruptError("expected a row for each chunk and key", offset=HEAD.size)
    return {**counts, "key_ends": keys + 1, "chunk_ends": chunks + 1}


def locate_columns(
    start: int, counts: Mapping[str, int], most: int
) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each column begins and ends, as follows from the counts, and where the last one's
    padding ends."""
    spans: dict[str, tuple[int, int]] = {}
    at = start
    for name, kind, rows, width in COLUMNS:
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


def view_columns(
    buffer: memoryview, spans: Mapping[str, tuple[int, int]], counts: Mapping[str, int]
) -> Columns:
    """The columns as read-only views of the buffer."""
    found: dict[str, NDArray[Any]] = {}
    for name, kind, rows, width in COLUMNS:
        start, end = spans[name]
        column = np.frombuffer(buffer[start:end], kind)
        if width is not None:
            column = column.reshape(counts[rows], counts[width])
        column.flags.writeable = False
        found[name] = column
    return found

"""Pure (no I/O): a value <-> the segments of bytes that carry it between ranks.

A value enters and its parcel leaves, as plain data (see `wire`). Nothing is copied on the way out,
and what is unpacked shares the memory of the segments that it came from.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from pytest_dcp._engine.coordinate import wire
from pytest_dcp._engine.coordinate.wire import Parcel, Segment

__all__ = ["Parcel", "Segment", "pack", "unpack", "bundle", "unbundle"]


def pack(value: object, *, pickles: bool = False) -> list[Segment]:
    """The parcel of a value; it aliases the value's memory until it is sent.

    pickles: whether objects that are no plain data may be pickled. Raises TypeError for others.
    """
    return wire.encode(value, pickles=pickles)


def unpack(parcel: Parcel, *, pickles: bool = False) -> Any:
    """The value of a parcel; its arrays lie in the parcel's segments.

    pickles: whether pickles are opened. Raises ValueError for what `pack` does not make.
    """
    return wire.decode(parcel, pickles=pickles)


def bundle(parcels: Sequence[Parcel]) -> list[Segment]:
    """One parcel of many, unopened: their sizes in segments, then all segments in order."""
    sizes = struct.pack(f"<{len(parcels)}I", *map(len, parcels))
    return [sizes, *(segment for parcel in parcels for segment in parcel)]


def unbundle(segments: Parcel) -> list[Parcel]:
    """The parcels of a bundle, in order."""
    sizes = struct.unpack(f"<{len(segments[0]) // 4}I", segments[0])
    parcels, at = [], 1
    for size in sizes:
        parcels.append(segments[at : at + size])
        at += size
    return parcels

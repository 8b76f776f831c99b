"""Pure (no I/O): a value <-> the segments of bytes that carry it between ranks.

A value enters and its parcel leaves: one pickle (protocol 5), then the buffers that the pickle
refers to (numpy arrays, mostly) as they lie in memory. Nothing is copied on the way out, and what
is unpacked shares the memory of the segments that it came from. Parcels are unpacked only from
links whose two ends have shown each other the group's secrets.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from typing import Any

Segment = bytes | bytearray | memoryview
Parcel = Sequence[Segment]


def pack(value: object) -> list[Segment]:
    """The parcel of a value: its pickle and its buffers.

    The buffers alias the value's memory: leave it unchanged until the parcel is sent.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return [head, *(buffer.raw() for buffer in buffers)]


def unpack(parcel: Parcel) -> Any:
    """The value of a parcel; its arrays lie in the parcel's segments."""
    return pickle.loads(parcel[0], buffers=parcel[1:])


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

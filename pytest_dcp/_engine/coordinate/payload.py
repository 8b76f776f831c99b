"""Pure (no I/O): a value <-> the segments of bytes that carry it between ranks.

A value is packed into a payload of plain data (see `wire`). Packing copies nothing, and an unpacked
value shares the memory of its segments.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from pytest_dcp._engine.coordinate import wire
from pytest_dcp._engine.coordinate.wire import Payload, Segment

__all__ = ["Payload", "Segment", "pack", "unpack", "bundle", "unbundle"]


def pack(value: object, *, pickles: bool = False) -> list[Segment]:
    """The payload of a value; it aliases the value's memory until it is sent.

    pickles: whether to pickle objects that are not plain data; else they raise TypeError.
    """
    return wire.encode(value, pickles=pickles)


def unpack(payload: Payload, *, pickles: bool = False) -> Any:
    """The value of a payload; its arrays lie in the payload's segments.

    pickles: whether pickles are opened. Raises ValueError for bytes that `pack` does not make.
    """
    return wire.decode(payload, pickles=pickles)


def bundle(payloads: Sequence[Payload]) -> list[Segment]:
    """Join payloads, unopened, into one: their sizes in segments, then all segments in order."""
    sizes = struct.pack(f"<{len(payloads)}I", *map(len, payloads))
    return [sizes, *(segment for payload in payloads for segment in payload)]


def unbundle(segments: Payload) -> list[Payload]:
    """The payloads of a bundle, in order."""
    sizes = struct.unpack(f"<{len(segments[0]) // 4}I", segments[0])
    payloads, at = [], 1
    for size in sizes:
        payloads.append(segments[at : at + size])
        at += size
    return payloads

"""Payloads: the segments of bytes that one frame carries. Pure (no I/O).

`wire` makes the payload of a value, and reads it. Segments are never copied: they alias the value's
memory until they are sent, and a received value shares theirs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

Segment = bytes | bytearray | memoryview
Payload = Sequence[Segment]


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

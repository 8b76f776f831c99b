"""Pure (no I/O): the frames that ranks exchange, and the reader that cuts them from a stream.

A frame is a fixed header, a table of its segments' lengths, a name, and the segments, each at a
multiple of 16 bytes so that arrays in them are aligned. The reader provides memory for the next
bytes, and never allocates more than its limit.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

from pytest_dcp._engine.coordinate.authentication import SEAL_BYTES, Seal
from pytest_dcp._engine.coordinate.payload import Segment

MAGIC = b"DCP1"
HEADER = struct.Struct("<4sBBHIIQ")
"""Magic, kind, mode, bytes of the name, step number, segments, bytes after the header."""
ALIGNMENT = 16
FEW_SEGMENTS = 4
"""Limit for the first frame of a peer that has not yet proved that it knows the secret."""
MAX_ALERT_BYTES = 64 * 1024
MAX_BODY_BYTES = 1 << 32
"""Twenty times the metadata of a million chunks: a longer length is garbage."""
SMALL_BYTES = 1 << 17
"""Limit for a frame of a few words."""
BUCKET_BYTES = 1 << 25
"""Limit for a bucket of bytes: several times the largest."""
CAUSE_BYTES = 1 << 28
"""Limit for a rank's failure: the failure of a whole operation holds the failures of its ranks."""
FIRST_BYTES = 1 << 22
"""Bytes reserved for a frame's body before any of it has arrived; then twice the received size."""


class FrameKind(IntEnum):
    """The kind of message in a frame."""

    HELLO = 1
    """First frame of a peer: who it is."""
    WELCOME = 2
    """First frame of the coordinator: proves that it is the coordinator."""
    VALUE = 3
    """A peer's local work is done; carries the value."""
    FAILED = 4
    """A peer's local work raised; carries the cause."""
    ABORTED = 5
    """A peer gave up its local work because of another's failure."""
    RESULT = 6
    """The step's result for this peer."""
    VERDICT = 7
    """The step failed; carries every rank's cause."""
    ALERT = 8
    """A rank failed: local work is in vain."""
    PING = 9
    """The sender is alive."""
    BYE = 10
    """The sender leaves the operation; the connection may serve its next one."""
    HANG_UP = 11
    """The sender closes the connection, and lives."""
    BYTES = 12
    """A bucket of a checkpoint's bytes, for a rank that wants them: see byte_exchange."""


class Mode(IntEnum):
    """How a step combines the values of the ranks."""

    NONE = 0
    REDUCE_SCATTER = 1
    ALL_REDUCE = 2
    ALL_GATHER = 3
    AGREE = 4
    BROADCAST = 5
    BARRIER = 6


LIMITS = {
    **dict.fromkeys((FrameKind.VALUE, FrameKind.RESULT, FrameKind.VERDICT), MAX_BODY_BYTES),
    **dict.fromkeys((FrameKind.FAILED, FrameKind.ABORTED), CAUSE_BYTES),
    FrameKind.BYTES: BUCKET_BYTES,
}
"""Bytes after the header, by kind, where that is more than SMALL_BYTES."""


class FrameError(ValueError):
    """The stream does not consist of frames, or a frame is longer than allowed."""


@dataclass(frozen=True, slots=True)
class Head:
    """Identifies a step of an operation."""

    number: int
    """From 1; 0 is before the first."""
    mode: Mode
    name: str

    def __str__(self) -> str:
        return f"{self.name!r} ({self.mode.name.lower()}, number {self.number})"


START = Head(0, Mode.NONE, "start")
"""Before the first step."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message between the coordinator and a peer."""

    kind: FrameKind
    head: Head = START
    segments: Sequence[Segment] = field(default=())


def encode(frame: Frame) -> list[Segment]:
    """The bytes of a frame, as pieces to be written one after another."""
    name = frame.head.name.encode("utf-8", "replace")[:0xFFFF]
    sizes = [memoryview(segment).nbytes for segment in frame.segments]
    front = struct.pack(f"<{len(sizes)}Q", *sizes) + name
    front += bytes(-len(front) % ALIGNMENT)
    pieces: list[Segment] = []
    for segment, size in zip(frame.segments, sizes, strict=True):
        pieces.append(segment)
        if size % ALIGNMENT:
            pieces.append(bytes(-size % ALIGNMENT))
    length = len(front) + sum(size + -size % ALIGNMENT for size in sizes)
    head = frame.head
    header = HEADER.pack(MAGIC, frame.kind, head.mode, len(name), head.number, len(sizes), length)
    return [header + front, *pieces]


def encode_alert(text: str) -> list[Segment]:
    """The segments of an ALERT."""
    return [text.encode("utf-8", "replace")]


def alert_text(segments: Sequence[Segment]) -> str:
    """The text of an ALERT, from its segments."""
    text = bytes(segments[0]) if segments else b""
    return text[:MAX_ALERT_BYTES].decode("utf-8", "replace")


def decode(data: bytes) -> Frame:
    """The one frame of these bytes. Raises FrameError for anything else."""
    reader, view = FrameReader(len(data)), memoryview(data)
    while view:
        space = reader.space()
        count = min(len(space), len(view))
        space[:count] = view[:count]
        view = view[count:]
        if (frame := reader.take_bytes(count)) is not None and not view:
            return frame
    raise FrameError(f"expected one frame, got {len(data)} bytes that are none")


@lru_cache(maxsize=16)
def _head(number: int, mode: int, name: bytes) -> Head:
    """The head with these fields; cached, since thousands of peers send the same. May raise
    ValueError."""
    return Head(number, Mode(mode), name.decode("utf-8", "replace"))


class FrameReader:
    """Cuts frames from a stream: fill `space()`, then call `take_bytes` with the count."""

    def __init__(self, limit_bytes: int = MAX_BODY_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.only: FrameKind | None = None
        """The only kind of frame that is accepted; None: any."""
        self.seal: Seal | None = None
        """Makes the seals that the frames must carry behind their bodies."""
        self.spare: bytearray | None = None
        """Memory of an earlier body for the next one, instead of fresh pages; taken once."""
        self._header: bytearray = bytearray(HEADER.size)
        self._body: bytearray | memoryview | None = None
        self._length = 0
        """Length of the whole body; its memory grows as it arrives."""
        self._at = 0

    def space(self) -> memoryview:
        """Memory for the next bytes of the stream; never empty."""
        return memoryview(self._body if self._body is not None else self._header)[self._at :]

    def take_bytes(self, count: int) -> Frame | None:
        """The frame that the last `count` bytes completed, if any.

        Raises FrameError if the stream does not consist of frames.
        """
        self._at += count
        if self._body is None:
            if self._at < HEADER.size:
                return None
            self._length = self._body_length()
            self._body, self._at = self._new_body(), 0
        if self._at < len(self._body):
            return None
        if self._at < self._length:
            larger = bytearray(min(self._length, 2 * self._at))
            larger[: self._at] = self._body
            self._body = larger
            return None
        body, self._body, self._at = memoryview(self._body), None, 0
        if self.seal is not None:
            received_seal, body = bytes(body[-SEAL_BYTES:]), body[:-SEAL_BYTES]
            if not hmac.compare_digest(received_seal, self.seal.next((self._header, body))):
                raise FrameError("a frame without the seal that a rank of the group gives it")
        return self._cut(body)

    def _new_body(self) -> bytearray | memoryview:
        """Memory for the body, or for its first part if it is long."""
        spare, self.spare = self.spare, None
        if spare is not None and len(spare) >= self._length:
            return memoryview(spare)[: self._length]
        return bytearray(min(self._length, FIRST_BYTES))

    def _body_length(self) -> int:
        magic, kind, _, _, _, count, length = HEADER.unpack(self._header)
        if magic != MAGIC:
            raise FrameError(f"expected a frame ({MAGIC!r}), got {bytes(self._header)!r}")
        if self.only is not None and (kind != self.only or count > FEW_SEGMENTS):
            raise FrameError(f"expected a {self.only.name}, got kind {kind} with {count} segments")
        limit = min(self.limit_bytes, LIMITS.get(kind, SMALL_BYTES))
        if length > limit:
            raise FrameError(f"a frame of {length} bytes; at most {limit} are allowed")
        return int(length) + (SEAL_BYTES if self.seal is not None else 0)

    def _cut(self, body: memoryview) -> Frame:
        _, kind, mode, name_bytes, number, count, _ = HEADER.unpack(self._header)
        table_bytes = 8 * count
        if table_bytes + name_bytes > len(body):
            raise FrameError(f"a table of {count} segments in a body of {len(body)} bytes")
        sizes = struct.unpack_from(f"<{count}Q", body)
        at = table_bytes + name_bytes
        name = bytes(body[table_bytes:at])
        segments: list[Segment] = []
        for size in sizes:
            at += -at % ALIGNMENT
            segments.append(body[at : at + size])
            at += size
        if at > len(body):
            raise FrameError(f"segments of {sum(sizes)} bytes in a body of {len(body)} bytes")
        try:
            return Frame(FrameKind(kind), _head(number, mode, name), segments)
        except ValueError as error:
            raise FrameError(f"a frame of unknown kind {kind} or mode {mode}") from error

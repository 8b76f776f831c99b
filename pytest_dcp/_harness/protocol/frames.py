"""Frames on a stream socket: the codec of every connection of the harness. Sans-I/O.

Enters: message values, dataclasses. Leaves: frames, and back. A frame is two big-endian u32
lengths, a JSON array, and raw bytes:

    u32 json_bytes | u32 payload_bytes | json | payload

The JSON names the message's class and its fields, except fields with their default; only `payload`
is binary, and only its receiver unpickles it. A frame that does not decode, or whose fields are not
of the types that the class names, is a `WireError`. Bytes that cannot begin a frame are refused
before the rest arrives.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Greeting:
...     rank: int
...     text: str = "hello"
...     payload: bytes = b""
>>> codec = MessageCodec([Greeting])
>>> frame = codec.encode(Greeting(3, payload=b"raw"), 1000)
>>> frame[8:]
b'["Greeting", {"rank": 3}]raw'
>>> decoder = FrameDecoder(codec, 1000)
>>> decoder.feed(frame[:10]), decoder.feed(frame[10:])
([], [Greeting(rank=3, text='hello', payload=b'raw')])
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Generic, TypeVar, get_type_hints

from pytest_dcp._harness.protocol.typed_json import Read, reader_for
from pytest_dcp.errors import DcpError

M = TypeVar("M")

HEADER = struct.Struct(">II")
OPENING = b'["'
"""The beginning of every frame's JSON."""
PLAIN_DEPTH = 50
"""pytest's reports nest to about 10."""
SHOWN_BYTES = 80
"""Bytes shown in an error about something that is not a message."""
_ENCODER = json.JSONEncoder(default=repr)


class WireError(DcpError):
    """Bytes that are not one of our messages."""


class MessageCodec(Generic[M]):
    """The messages of one kind of connection."""

    def __init__(self, classes: Iterable[type[Any]]) -> None:
        # Looked up once: a test in a world of four costs two dozen frames.
        self._classes = {cls.__name__: cls for cls in classes}
        self._defaults = {
            cls: [(f.name, f.default) for f in fields(cls)] for cls in self._classes.values()
        }
        self._readers: dict[type[Any], dict[str, Read]] = {
            cls: {
                name: reader_for(annotation)
                for name, annotation in get_type_hints(cls).items()
                if name != "payload"
            }
            for cls in self._classes.values()
        }

    def encode(self, message: M, most_bytes: int) -> bytes:
        """The message as one frame. Raises `WireError` if it is longer."""
        cls = type(message)
        body: dict[str, Any] = {
            name: value
            for name, default in self._defaults[cls]
            if (value := getattr(message, name)) is not default
        }
        payload: bytes = body.pop("payload", b"")
        try:
            text = _ENCODER.encode([cls.__name__, body]).encode("ascii")
        except (TypeError, ValueError, RecursionError):  # a test's own values: odd keys, a cycle
            text = json.dumps([cls.__name__, _plain(body)]).encode("ascii")
        nbytes = len(text) + len(payload)
        if nbytes > most_bytes:
            raise WireError(f"a {cls.__name__} of {nbytes} bytes is longer than {most_bytes}")
        return HEADER.pack(len(text), len(payload)) + text + payload

    def build(self, text: bytes, payload: bytes) -> M:
        """The message of a frame's two parts. Raises `WireError`."""
        try:
            name, body = json.loads(text.decode())
            cls = self._classes[name]
            readers = self._readers[cls]
            values = {key: readers[key](value) for key, value in body.items()}
            message: M = cls(**values, payload=payload) if payload else cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise WireError(f"not a message: {text[:SHOWN_BYTES]!r}: {exc!s:.200}") from exc
        return message


def _plain(value: Any, depth: int = 0) -> Any:
    """The value in a form that JSON can carry; other values, and too deeply nested ones, as their
    repr.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if depth < PLAIN_DEPTH:
        if isinstance(value, dict):
            return {
                key if isinstance(key, str) else repr(key): _plain(part, depth + 1)
                for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            return [_plain(part, depth + 1) for part in value]
    try:
        return repr(value)
    except Exception as exc:  # noqa: BLE001 - user code: any exception only becomes text here
        return f"<{type(value).__name__} whose repr raised {type(exc).__name__}>"


class FrameDecoder(Generic[M]):
    """Bytes as they arrive -> whole messages; one per stream."""

    def __init__(self, codec: MessageCodec[M], most_bytes: int) -> None:
        """most_bytes: a longer frame comes from a broken peer and is refused."""
        self.most_bytes = most_bytes
        self.buffer = bytearray()
        self._codec = codec

    def feed(self, data: bytes) -> list[M]:
        """The messages completed by `data`. Raises `WireError` on anything else."""
        self.buffer += data
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def _take(self) -> M | None:
        if len(self.buffer) < HEADER.size:
            return None
        text_bytes, payload_bytes = HEADER.unpack_from(self.buffer)
        if text_bytes + payload_bytes > self.most_bytes:
            raise WireError(f"a frame claims {text_bytes + payload_bytes} bytes")
        opening = self.buffer[HEADER.size : HEADER.size + len(OPENING)]
        if text_bytes < len(OPENING) or not OPENING.startswith(opening):
            raise WireError(f"not the beginning of a message: {bytes(self.buffer[:SHOWN_BYTES])!r}")
        end = HEADER.size + text_bytes + payload_bytes
        if len(self.buffer) < end:
            return None
        text = bytes(self.buffer[HEADER.size : HEADER.size + text_bytes])
        payload = bytes(self.buffer[HEADER.size + text_bytes : end])
        del self.buffer[:end]
        return self._codec.build(text, payload)

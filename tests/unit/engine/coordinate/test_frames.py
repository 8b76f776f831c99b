"""Frames and payloads arrive as sent, however the stream is cut."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.coordinate.frame import (
    FIRST_BYTES,
    HEADER,
    LIMITS,
    MAGIC,
    MAX_BODY_BYTES,
    SMALL_BYTES,
    Frame,
    FrameError,
    FrameKind,
    FrameReader,
    Head,
    Mode,
    encode,
)
from pytest_dcp._engine.coordinate.payload import bundle, unbundle
from pytest_dcp._engine.coordinate.wire import pack, unpack

heads = st.builds(
    Head, st.integers(0, 2**32 - 1), st.sampled_from(Mode), st.text(max_size=20).filter(str.isascii)
)
frames = st.builds(
    Frame, st.sampled_from(FrameKind), heads, st.lists(st.binary(max_size=70), max_size=5)
)


def read(stream: bytes, cuts: list[int]) -> list[Frame]:
    """The frames of a stream that comes in pieces of these sizes, again and again."""
    reader, found, at, turn = FrameReader(), [], 0, 0
    while at < len(stream):
        space = reader.space()
        size = min(cuts[turn % len(cuts)], len(space), len(stream) - at)
        space[:size] = stream[at : at + size]
        frame = reader.take_bytes(size)
        found += [frame] if frame is not None else []
        at, turn = at + size, turn + 1
    return found


def plain(frame: Frame) -> tuple[FrameKind, Head, list[bytes]]:
    return frame.kind, frame.head, [bytes(segment) for segment in frame.segments]


@given(st.lists(frames, max_size=4), st.lists(st.integers(1, 90), min_size=1))
def test_frames_survive_any_cutting_of_the_stream(sent: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(bytes(piece) for frame in sent for piece in encode(frame))
    assert [plain(frame) for frame in read(stream, cuts)] == [plain(frame) for frame in sent]


@given(st.binary(min_size=HEADER.size, max_size=200))
def test_garbage_is_refused_and_never_read_as_a_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        read(data, [len(data)])


@given(
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=120),
)
def test_a_frame_that_lies_about_its_parts_is_refused_or_read(
    kind: int, mode: int, name_bytes: int, segments: int, body: bytes
) -> None:
    header = HEADER.pack(MAGIC, kind, mode, name_bytes, 1, segments, len(body))
    try:
        found = read(header + body, [1000])
    except FrameError:
        return
    assert all(len(bytes(s)) <= len(body) for frame in found for s in frame.segments)


def test_a_body_above_the_limit_is_refused_before_memory_is_taken() -> None:
    reader = FrameReader(limit_bytes=1000)
    reader.space()[:] = HEADER.pack(MAGIC, 1, 0, 0, 0, 0, 2**39)
    with pytest.raises(FrameError, match="at most 1000"):
        reader.take_bytes(HEADER.size)


@pytest.mark.parametrize("kind", FrameKind)
def test_each_kind_of_frame_has_its_limit(kind: FrameKind) -> None:
    limit = LIMITS.get(kind, SMALL_BYTES)
    reader = FrameReader()
    reader.space()[:] = HEADER.pack(MAGIC, kind, 0, 0, 0, 0, limit + 1)
    with pytest.raises(FrameError, match=f"at most {limit}"):
        reader.take_bytes(HEADER.size)


def test_memory_for_a_frame_is_taken_as_its_bytes_come() -> None:
    reader = FrameReader()
    reader.space()[:] = HEADER.pack(MAGIC, FrameKind.VALUE, 0, 0, 1, 0, MAX_BODY_BYTES)
    assert reader.take_bytes(HEADER.size) is None
    taken = 0
    for _ in range(4):
        room = len(reader.space())
        assert taken + room <= max(FIRST_BYTES, 2 * taken)
        taken += room
        assert reader.take_bytes(room) is None


@pytest.mark.parametrize("size", [FIRST_BYTES - 48, FIRST_BYTES, 5 * FIRST_BYTES + 7])
def test_a_long_frame_arrives(size: int) -> None:
    data = np.arange(size, dtype=np.uint8).tobytes()
    (frame,) = read(b"".join(encode(Frame(FrameKind.VALUE, segments=[data, b"end"]))), [1 << 20])
    assert [bytes(segment) for segment in frame.segments] == [data, b"end"]


def test_segments_longer_than_the_body_are_refused() -> None:
    body = struct.pack("<Q", 2**60) + bytes(8)
    with pytest.raises(FrameError, match="segments of"):
        read(HEADER.pack(MAGIC, FrameKind.VALUE, 0, 0, 1, 1, len(body)) + body, [1000])


def columns(size: int) -> dict[str, Any]:
    return {
        "ints": np.arange(size),
        "names": [f"layer.{i}" for i in range(5)],
        "strided": np.arange(2 * size)[::2],
        "fortran": np.asfortranarray(np.ones((3, size))),
    }


@given(st.integers(0, 50))
def test_payloads_hold_columns_with_their_arrays_beside_the_pickle(size: int) -> None:
    value = columns(size)
    payload = pack(value)
    assert len(payload) >= 3
    copy = unpack([bytearray(segment) for segment in payload])
    assert copy.keys() == value.keys()
    for key in value:
        assert np.array_equal(copy[key], value[key])


def test_an_array_is_neither_copied_out_nor_in() -> None:
    array = np.arange(1000)
    payload = pack(array)
    assert np.shares_memory(np.frombuffer(payload[1], np.int64), array)
    assert len(payload[0]) < 300
    received = bytearray(payload[1])
    copy = unpack([payload[0], memoryview(received)])
    received[:8] = struct.pack("<q", 77)
    assert copy[0] == 77


@given(st.lists(st.lists(st.binary(max_size=9), max_size=4), max_size=5))
def test_bundles_keep_payloads_apart(payloads: list[list[bytes]]) -> None:
    assert [list(payload) for payload in unbundle(bundle(payloads))] == payloads

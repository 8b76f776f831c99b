"""How ranks prove that they belong to a group, and the seals of their frames."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.coordinate.authentication import (
    SEAL_BYTES,
    SHARED_KEY,
    WINDOW,
    GroupKey,
    Nonces,
    Seal,
    SeenNonces,
    new_nonce,
    open_word,
    seal_word,
    shared_key,
)
from pytest_dcp._engine.coordinate.connection import MOST_PINGS, MOST_WAITING, Connection
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, Head, Mode, encode

KEY = {SHARED_KEY: "k" * 32}
OTHER = {SHARED_KEY: "K" * 32}
HEAD = Head(3, Mode.AGREE, "write")
FRAMES = [Frame(FrameKind.VALUE, HEAD, [b"one"]), Frame(FrameKind.VALUE, HEAD, [b"two", b""])]


def test_a_key_is_of_the_secret_and_of_the_shared_key() -> None:
    keys = [GroupKey.of(secret, environ) for secret in ("s", "t") for environ in ({}, KEY, OTHER)]
    assert len({key.key for key in keys}) == len({key.check() for key in keys}) == len(keys)
    assert [key.seals_frames for key in keys] == [False, True, True] * 2
    assert GroupKey.of("s", KEY) == GroupKey.of("s", KEY)
    assert KEY[SHARED_KEY] not in repr(keys)


def test_each_proof_proves_one_thing_only() -> None:
    key, nonce = GroupKey.of("s", KEY), new_nonce()
    shown = [key.proof(b"hello"), key.welcome(nonce), bytes.fromhex(key.check())]
    assert len(set(shown)) == len(shown)
    assert key.is_proof(shown[0], b"hello")
    assert not any(key.is_proof(one, b"other") for one in [*shown, b"", b"x" * 32])


def test_a_short_key_is_refused_in_words() -> None:
    assert shared_key({}) == shared_key({SHARED_KEY: ""}) == b""
    with pytest.raises(ValueError, match="DCP_SHARED_KEY must have at least 16 characters, got 3"):
        shared_key({SHARED_KEY: "abc"})


def test_nonces_are_taken_once_in_any_order() -> None:
    seen, one, two = SeenNonces(), Nonces(), Nonces()
    nonces = [one.next() for _ in range(5)] + [two.next() for _ in range(5)]
    for nonce in [*nonces[3:], *nonces[:3]]:
        assert seen.take(nonce)
    assert not any(seen.take(nonce) for nonce in nonces)
    assert not seen.take("")
    assert not seen.take("z" * 48)


@given(st.lists(st.integers(1, 3 * WINDOW), max_size=50))
def test_no_nonce_is_ever_taken_twice(counts: list[int]) -> None:
    seen, taken, newest = SeenNonces(), set(), 0
    for count in counts:
        took = seen.take(f"p{count:016x}")
        assert took == (count not in taken and count > newest - WINDOW)
        taken |= {count} if took else set()
        newest = max(newest, count)


def test_a_fork_uses_none_of_its_parents_nonces() -> None:
    inside, outside = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(outside, new_nonce().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(inside, 100)[:32] != new_nonce().encode()[:32]
    os.close(inside)
    os.close(outside)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Connection]]:
    """A bare end that may send anything, and a sealed line to it."""
    here, there = socket.socketpair()
    line = Connection(there)
    line.seal(outgoing=Seal(b"down"), incoming=Seal(b"up"))
    yield here, line
    line.close()
    here.close()


def sealed(frames: list[Frame], seal: Seal) -> list[bytes]:
    """The bytes of each frame, with its seal."""
    joined = [b"".join(map(bytes, encode(frame))) for frame in frames]
    return [data + seal.next([data]) for data in joined]


def test_sealed_frames_arrive(ends: tuple[socket.socket, Connection]) -> None:
    here, line = ends
    here.sendall(b"".join(sealed(FRAMES, Seal(b"up"))))
    line.receive()
    assert [[bytes(s) for s in frame.segments] for frame in line.frames] == [
        [b"one"],
        [b"two", b""],
    ]
    assert line.end_reason is None
    line.queue(FRAMES[0])
    line.flush()
    assert here.recv(1000) == sealed(FRAMES[:1], Seal(b"down"))[0]


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


ONE, TWO = sealed(FRAMES, Seal(b"up"))
ATTACKS = {
    "another's key": sealed(FRAMES, Seal(b"")),
    "the other direction's": sealed(FRAMES, Seal(b"down")),
    "no seals": [b"".join(map(bytes, encode(frame))) for frame in FRAMES],
    "repeated": [ONE, ONE],
    "swapped": [TWO, ONE],
    "one left out": [TWO],
    "another step": [changed(ONE, 8)],
    "another kind": [changed(ONE, 4)],
    "another value": [changed(ONE, len(ONE) - SEAL_BYTES - 16)],
    "another seal": [changed(ONE, len(ONE) - 1)],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_frame_that_no_rank_of_the_group_sent_ends_the_connection(
    ends: tuple[socket.socket, Connection], attack: str
) -> None:
    here, line = ends
    here.sendall(b"".join(ATTACKS[attack]) + bytes(SEAL_BYTES))
    line.receive()
    assert len(line.frames) == (1 if attack == "repeated" else 0)
    assert line.is_garbled
    assert "sent garbage: a frame" in (line.end_reason or "")


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([Frame(FrameKind.PING)] * (MOST_PINGS + 1), "pings without end"),
        ([FRAMES[0]] * (MOST_WAITING + 1), "more than a step has"),
    ],
)
def test_a_rank_that_sends_without_end_is_heard_no_longer(frames: list[Frame], text: str) -> None:
    here, there = socket.socketpair()
    line = Connection(there)
    with here, contextlib.closing(line):
        for frame in frames:
            here.sendall(b"".join(map(bytes, encode(frame))))
            line.receive()
        assert line.is_garbled
        assert line.end_reason == f"it sent garbage: {text}"
        assert len(line.frames) <= MOST_WAITING


def test_words_in_the_store_carry_a_seal_where_there_is_a_key() -> None:
    assert seal_word({}, "k", b"word") == b"word"
    assert open_word({}, "k", b"word") == b"word"
    data = seal_word(KEY, "k", b"word")
    assert open_word(KEY, "k", data) == b"word"
    for environ, key, said in (
        *((KEY, "other key", data), (OTHER, "k", data), (KEY, "k", data + b"x")),
        *((KEY, "k", b"word"), (KEY, "k", b""), (KEY, "k", data[:SEAL_BYTES])),
    ):
        with pytest.raises(ValueError, match="seal of a rank"):
            open_word(environ, key, said)

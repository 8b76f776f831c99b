"""Pure (no I/O): how a peer and a coordinator show each other that they belong to one group.

Theory of operation. The coordinator's address in the group's store holds a secret, which is never
sent over a connection. If DCP_SHARED_KEY is set in every rank's environment, the group's key is
derived from both, so reading the store is not enough; otherwise from the secret alone.

    HELLO    peer: its identity, its operation, a number that it has never used (the nonce), and an
             HMAC of all three. An impostor at the address learns nothing that lets it pose as a
             rank.
    WELCOME  coordinator: an HMAC of the nonce, which only the coordinator can make.

The coordinator remembers the nonces, and refuses a HELLO that was recorded and is sent again. With
a shared key every further frame, in either direction, carries a seal: an HMAC with a key of this
connection and direction, over the frame's number and its bytes. So a frame that was altered,
removed, inserted, repeated or swapped ends the connection.

Every HMAC is HMAC-SHA256. Nothing is encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate.payload import Segment

SHARED_KEY = "DCP_SHARED_KEY"
SHORTEST_KEY = 16
"""Characters: an attacker could guess a shorter one from a recorded HELLO."""
SEAL_BYTES = 32
WINDOW = 1024
"""How far a nonce may be behind the newest of its peer: connections overtake each other."""
COUNTER_DIGITS = 16


def shared_key(environ: Mapping[str, str]) -> bytes:
    """The key that the user gave to all ranks; empty without one.

    Raises ValueError if it is too short.
    """
    text = environ.get(SHARED_KEY, "")
    if text and len(text) < SHORTEST_KEY:
        raise ValueError(
            f"{SHARED_KEY} must have at least {SHORTEST_KEY} characters, got {len(text)}: set it "
            "to one random value on every rank, for instance of `openssl rand -hex 32`"
        )
    return text.encode("utf-8", "surrogateescape")


@dataclass(slots=True)
class Seal:
    """The seals of the frames in one direction of one connection."""

    key: bytes
    count: int = 0
    """Number of frames so far."""

    def next(self, pieces: Iterable[Segment]) -> bytes:
        """The seal of the next frame, which consists of these pieces."""
        mac = hmac.new(self.key, self.count.to_bytes(8, "little"), hashlib.sha256)
        self.count += 1
        for piece in pieces:
            mac.update(piece)
        return mac.digest()


@dataclass(frozen=True, slots=True)
class GroupKey:
    """The secrets with which the ranks of a group prove their identity."""

    key: bytes = field(repr=False)
    seals_frames: bool
    """Whether there is a shared key."""

    @classmethod
    def of(cls, secret: str, environ: Mapping[str, str] | None = None) -> GroupKey:
        """The key for a coordinator's secret, in this environment."""
        shared = shared_key(os.environ if environ is None else environ)
        return cls(_mac(shared, b"group", secret.encode()), bool(shared))

    def check(self) -> str:
        """A value that is equal on ranks with the same key, and proves nothing."""
        return _mac(self.key, b"check").hex()

    def proof(self, hello: bytes) -> bytes:
        """A peer's proof in its HELLO."""
        return _mac(self.key, b"hello", hello)

    def is_proof(self, received_proof: Segment, hello: bytes) -> bool:
        """Whether this is the proof of a rank of the group."""
        return hmac.compare_digest(bytes(received_proof), self.proof(hello))

    def welcome(self, nonce: str) -> bytes:
        """The coordinator's answer."""
        return _mac(self.key, b"welcome", nonce.encode())

    def seals(self, nonce: str) -> tuple[Seal, Seal] | None:
        """The peer's and the coordinator's seals for the connection that began with this nonce."""
        if not self.seals_frames:
            return None
        peers, coordinators = (
            _mac(self.key, who, nonce.encode()) for who in (b"peer", b"coordinator")
        )
        return Seal(peers), Seal(coordinators)


def seal_word(environ: Mapping[str, str], key: str, word: bytes) -> bytes:
    """A message for the store, preceded by its seal if there is a shared key."""
    shared = shared_key(environ)
    return (_mac(shared, b"word", key.encode(), word) if shared else b"") + word


def open_word(environ: Mapping[str, str], key: str, sealed: bytes) -> bytes:
    """The message of `seal_word`. Raises ValueError unless a rank sealed it."""
    word = sealed[SEAL_BYTES:] if shared_key(environ) else sealed
    if not hmac.compare_digest(seal_word(environ, key, word), sealed):
        raise ValueError("expected a word with the seal of a rank, got another's")
    return word


def _mac(key: bytes, *parts: bytes) -> bytes:
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()


class Nonces:
    """Numbers that no process uses twice: the process's own random one, and a count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = secrets.token_hex(16)
        self._count = 0

    def next(self) -> str:
        """The next nonce."""
        with self._lock:
            self._count += 1
            return f"{self._process}{self._count:0{COUNTER_DIGITS}x}"


class SeenNonces:
    """The nonces received: the newest of each process, and which earlier ones."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[int, int]] = {}
        """By process: the newest count, and a bit for each of the `WINDOW` up to it."""

    def take(self, nonce: str) -> bool:
        """Whether this nonce is new. Call it only for peers that have proved their identity."""
        process, digits = nonce[:-COUNTER_DIGITS], nonce[-COUNTER_DIGITS:]
        try:
            count = int(digits, 16)
        except ValueError:
            return False
        newest, bits = self._newest.get(process, (0, 0))
        if count > newest:
            shifted = bits << min(count - newest, WINDOW)
            self._newest[process] = count, (shifted | 1) & ((1 << WINDOW) - 1)
            return True
        bit = 1 << (newest - count) if newest - count < WINDOW else 0
        if not bit or bits & bit:
            return False
        self._newest[process] = newest, bits | bit
        return True


_nonces = Nonces()


def new_nonce() -> str:
    """A nonce that this process has never used."""
    return _nonces.next()


def _forget_in_child() -> None:
    """A forked child is another process, whose counts would be its parent's."""
    global _nonces
    _nonces = Nonces()


operating_system.call_in_forked_children(_forget_in_child)

"""Pure (no I/O): the coordinator's address, and the HELLO with a peer's identity and operation.

The address is in the group's store. A peer connects there and sends one HELLO. If the peer proves
that it knows the group's key (see authentication), the coordinator's listener makes it an
`Arrival`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field, replace

from pytest_dcp._engine.coordinate.authentication import GroupKey, new_nonce
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind

MAX_ADDRESS_BYTES = 65536
IDLE = ""
"""The operation of a peer that runs none yet: its connection only shows that the peer lives."""
BYTES = "bytes"
"""The operation of a rank that connects to send what it has read: see byte_exchange."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a process's listener, and the secret that both ends prove to know."""

    hosts: tuple[str, ...]
    """In order of trial, for a peer on another machine."""
    port: int
    machine: str
    """Equal in processes that reach each other through the loopback."""
    secret: str
    """Never sent over a connection; a part of the group's key."""
    check: str = ""
    """Equal to the check of the peer's key, unless DCP_SHARED_KEY differs."""

    def key(self) -> GroupKey:
        """The secrets with which a rank of the group proves its identity."""
        return GroupKey.of(self.secret)

    def encode(self) -> str:
        """The value kept in the store."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Address:
        """The address in a store's value. Raises ValueError for anything else."""
        try:
            facts = json.loads(data[:MAX_ADDRESS_BYTES])
            address = cls(**(facts | {"hosts": tuple(facts["hosts"])}))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"expected a coordinator's address, got {error!r:.200}") from None
        texts = (*address.hosts, address.machine, address.secret, address.check)
        if type(address.port) is not int or not {str}.issuperset(map(type, texts)):
            raise ValueError(f"expected a coordinator's address, got {address!r:.200}")
        return address


@dataclass(frozen=True, slots=True)
class Hello:
    """A peer's identity and its next operation."""

    group: str
    """The group and its coordinator; a process may have several."""
    operation: str
    number: int
    """Of the operation, see operation_order."""
    rank: int
    epoch: int = 0
    finished_up_to: int = 0
    """All operations of the peer up to this number are over."""
    unordered: bool = False
    subject: tuple[str, str] | None = None
    """The name and the real name of the folder."""
    nonce: str = ""
    """A number that the peer has never used, so that a HELLO cannot be replayed."""

    def is_whole(self) -> bool:
        """Whether every field has its type, as in the HELLO of a rank."""
        texts = (self.group, self.operation, self.nonce, *(self.subject or ()))
        numbers = (self.number, self.rank, self.epoch, self.finished_up_to)
        return (
            {str}.issuperset(map(type, texts))
            and {int}.issuperset(map(type, numbers))
            and type(self.unordered) is bool
            and (self.subject is None or len(self.subject) == 2)
        )

    def frame(self, key: GroupKey) -> Frame:
        """The HELLO frame, with the proof that a rank of the group sends it."""
        text = json.dumps(asdict(self)).encode()
        return Frame(FrameKind.HELLO, segments=[key.proof(text), text])


def greet(connection: Connection, hello: Hello, key: GroupKey) -> bytes:
    """Say hello on a peer's connection, sealed from then on. Returns the coordinator's expected
    answer.
    """
    hello = replace(hello, nonce=new_nonce())
    connection.queue(hello.frame(key))
    seals = key.seals(hello.nonce)
    if seals is not None and not connection.is_sealed:
        connection.seal(outgoing=seals[0], incoming=seals[1])
    connection.flush()
    return key.welcome(hello.nonce)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A peer that proved that it knows the group's key."""

    hello: Hello
    connection: Connection
    came_s: float = field(default_factory=time.monotonic)

"""The parts of a process group that an operation needs: its members, its timeout, and where to
meet.

The coordinator puts the address of its listener into the group's c10d store, one key per group
and coordinator, which is never removed: the address is valid as long as the process lives. Peers
read it once. For each operation that the coordinator gave up, another key gives late peers the
reason. An operation uses the group for nothing else: it runs no collectives and sends no
point-to-point messages on it. So it cannot disturb the order of the user's collectives, and a late
rank does not cost gloo's connections (gloo closes all of them at the first wait that times out).
"""

from __future__ import annotations

import base64
import contextlib
import os
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate.authentication import open_word, seal_word
from pytest_dcp._engine.coordinate.failure import CoordinationError
from pytest_dcp._engine.coordinate.frame import Frame, decode, encode
from pytest_dcp._engine.coordinate.gloo_listener import GlooListener, parse_listener
from pytest_dcp._engine.coordinate.hello import Address
from pytest_dcp._engine.coordinate.machines import local_only
from pytest_dcp._engine.coordinate.operation_order import CallOrder, OperationPlace
from pytest_dcp._engine.coordinate.peer_listener import peer_listener
from pytest_dcp._engine.coordinate.presence import Presence
from pytest_dcp._torch_internals.process_groups import backend_timeout_s, devices_of, group_registry

if TYPE_CHECKING:
    from pytest_dcp._engine.coordinate.idle_connections import Link
    from pytest_dcp._torch_internals.process_groups import Store

POLL_S = (0.001, 0.1)
"""First and longest pause between looks into the store: `check` never blocks, so Ctrl-C works, and
the user's other threads can use the store in between."""


@dataclass(slots=True)
class Meeting:
    """Facts about a group that this process keeps between operations."""

    order: CallOrder = field(default_factory=CallOrder)
    """The operations that this process called in the group."""
    published: dict[int, str] = field(default_factory=dict)
    """By coordinator rank: the secret of this process's address in the store."""
    addresses: dict[int, Address] = field(default_factory=dict)
    """By coordinator rank."""
    idle: dict[int, Link] = field(default_factory=dict)
    """By coordinator rank: this process's connection to it while no operation has it."""
    present: bool = False
    """Whether this process has described itself in the store."""
    presences: dict[int, Presence] = field(default_factory=dict)
    """By rank, addresses looked up so far."""
    gloo_listeners: dict[int, GlooListener | None] = field(default_factory=dict)
    """By rank, gloo's addresses looked up so far; None if we cannot read gloo's address."""
    tying: threading.Lock = field(default_factory=threading.Lock)
    """Held while `idle` changes: a save and a load may begin at once."""


_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, Meeting] = weakref.WeakKeyDictionary()


_meeting = threading.Lock()
_inherited: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
"""Groups that existed when this process was forked."""


def meeting_of(group: dist.ProcessGroup) -> Meeting:
    """This process's `Meeting` of a group."""
    with _meeting:
        meeting = _meetings.get(group)
        if meeting is None:
            meeting = _meetings[group] = Meeting()
            # Not at exit: a connection that breaks without a message shows that the process ended.
            weakref.finalize(
                group, _forget_group, meeting, group.group_name, group.size()
            ).atexit = False
        return meeting


def _forget_group(meeting: Meeting, name: str, size: int) -> None:
    """Close the idle connections of a group that is gone, on both sides."""
    for link in meeting.idle.values():
        link.connection.hang_up()
    for coordinator_rank in meeting.published:
        peer_listener().forget(_key(name, coordinator_rank, size))


def group_key(group: dist.ProcessGroup, coordinator_rank: int) -> str:
    """Identifies the group and its coordinator, the same on all ranks."""
    return _key(group.group_name, coordinator_rank, group.size())


def _key(group_name: str, coordinator_rank: int, size: int) -> str:
    return f"{group_name}/{coordinator_rank}/{size}"


def timeout_of(group: dist.ProcessGroup) -> float:
    """The group's timeout in seconds: its CPU backend's, else its first device's, else torch's."""
    for device in sorted(devices_of(group), key=lambda device: device.type != "cpu"):
        timeout_s = backend_timeout_s(group, device)
        if timeout_s is not None:
            return timeout_s
    return float(dist.constants.default_pg_timeout.total_seconds())


def announce_presence(group: dist.ProcessGroup, rank: int, coordinator_rank: int) -> None:
    """Describe this process in the store, and publish a coordinator's address; once per group.

    If the ranks are on several machines, this process listens from now on, so that the others can
    see that it lives.
    """
    meeting = meeting_of(group)
    if meeting.present or group in _inherited:
        return
    meeting.present = True
    with contextlib.suppress(RuntimeError, CoordinationError):  # only deaths are noticed later
        if local_only(os.environ):
            own = Presence.own()
        else:
            own = Presence.own(peer_listener().address.hosts, peer_listener().address.port)
        _store(group).set(_presence_key(rank), own.encode())
        if rank == coordinator_rank:
            publish(group, coordinator_rank)


def presence_of(group: dist.ProcessGroup, rank: int) -> Presence | None:
    """The process of a rank, or None if it has not described itself yet. Never waits."""
    presences = meeting_of(group).presences
    if rank not in presences:
        try:
            store, key = _store(group), _presence_key(rank)
            if not store.check([key]):
                return None
            presences[rank] = Presence.decode(store.get(key))
        except (RuntimeError, ValueError, TypeError, KeyError):
            return None
    return presences[rank]


def ended_process(group: dist.ProcessGroup, rank: int) -> str | None:
    """The sign that the process of a rank has ended, or None. Never waits."""
    presence = presence_of(group, rank)
    return None if presence is None else presence.how_ended()


def gloo_listener_of(group: dist.ProcessGroup, rank: int) -> GlooListener | None:
    """The address where gloo listens for a rank, or None if it is unknown. Never waits.

    gloo writes it while the group is made, so it is looked up once.
    """
    listeners = meeting_of(group).gloo_listeners
    if rank not in listeners:
        try:
            listeners[rank] = _read_gloo_listener(group, rank)
        except (RuntimeError, CoordinationError):  # the store is gone
            return None
    return listeners[rank]


def _read_gloo_listener(group: dist.ProcessGroup, rank: int) -> GlooListener | None:
    store = _store(group)
    kinds = {device.type for device in devices_of(group)}
    for kind in sorted(kinds, key=lambda kind: (kind != "cpu", kind)):
        key = f"{kind}//0/{rank}"
        if store.check([key]):
            return parse_listener(store.get(key), group.size())
    return None


def _presence_key(rank: int) -> str:
    return f"pytest_dcp/rank/{rank}"


def publish(group: dist.ProcessGroup, coordinator_rank: int) -> None:
    """Put this process's address where the peers look."""
    published, address = meeting_of(group).published, peer_listener().address
    if published.get(coordinator_rank) != address.secret:
        _store(group).set(_store_key(coordinator_rank), address.encode())
        published[coordinator_rank] = address.secret


def look_up(group: dist.ProcessGroup, coordinator_rank: int, until_s: float) -> Address | None:
    """The coordinator's address, or None if it has published none until then.

    `until_s` is a time of CLOCK_MONOTONIC. Raises RuntimeError if the store cannot be reached.
    """
    meeting, key, pause = meeting_of(group), _store_key(coordinator_rank), POLL_S[0]
    while coordinator_rank not in meeting.addresses:
        store = _store(group)
        if store.check([key]):
            meeting.addresses[coordinator_rank] = Address.decode(store.get(key))
        elif time.monotonic() > until_s:
            return None
        else:
            time.sleep(pause)
            pause = min(2 * pause, POLL_S[1])
    return meeting.addresses[coordinator_rank]


def forget(group: dist.ProcessGroup, coordinator_rank: int) -> None:
    """Look the address up again next time: nothing answers there."""
    meeting_of(group).addresses.pop(coordinator_rank, None)


def post(
    group: dist.ProcessGroup, coordinator_rank: int, place: OperationPlace, word: Frame
) -> None:
    """Leave a verdict for peers that join an operation that the coordinator has given up."""
    _write_word(group, _word_key(coordinator_rank, place), word)


def read_verdict(
    group: dist.ProcessGroup, coordinator_rank: int, place: OperationPlace
) -> Frame | None:
    """The verdict in the store, if any; never waits. Raises ValueError for an invalid one."""
    return _read_word(group, _word_key(coordinator_rank, place))


def refuse(
    group: dist.ProcessGroup, coordinator_rank: int, place: OperationPlace, word: Frame
) -> None:
    """Leave a verdict for a coordinator that has no address yet: this rank takes no part."""
    _write_word(group, f"{_word_key(coordinator_rank, place)}/refused", word)


def read_refusal(
    group: dist.ProcessGroup, coordinator_rank: int, place: OperationPlace
) -> Frame | None:
    """The verdict of a rank that takes no part, if any. Like `read_verdict`."""
    return _read_word(group, f"{_word_key(coordinator_rank, place)}/refused")


def _write_word(group: dist.ProcessGroup, key: str, word: Frame) -> None:
    sealed = seal_word(os.environ, key, b"".join(encode(word)))
    _store(group).set(key, base64.b64encode(sealed).decode())


def _read_word(group: dist.ProcessGroup, key: str) -> Frame | None:
    store = _store(group)
    if not store.check([key]):
        return None
    sealed = base64.b64decode(store.get(key), validate=True)
    return decode(open_word(os.environ, key, sealed))


def _word_key(coordinator_rank: int, place: OperationPlace) -> str:
    return f"{_store_key(coordinator_rank)}/left/{place.epoch}.{place.number}"


def _store_key(coordinator_rank: int) -> str:
    return f"pytest_dcp/coordinator/{coordinator_rank}"


def _forget_in_child() -> None:
    """A forked child runs none of its parent's operations."""
    global _meeting
    _meeting = threading.Lock()
    for meeting in _meetings.values():
        meeting.order.forget_pending()
        meeting.idle.clear()
        meeting.published.clear()
    # In these groups its parent is the rank.
    _inherited.update(group_registry().pg_map)


operating_system.call_in_forked_children(_forget_in_child)


def _store(group: dist.ProcessGroup) -> Store:
    backend_and_store = group_registry().pg_map.get(group)
    store = backend_and_store[1] if backend_and_store is not None else group.get_group_store()
    if store is None:
        raise CoordinationError(
            f"the process group {group.group_name!r} has no store to meet through: make it with "
            "init_process_group or new_group"
        )
    return store

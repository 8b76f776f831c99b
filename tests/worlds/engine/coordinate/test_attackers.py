"""Attackers who reach the group's store and the coordinator's port: refused in words, nothing runs.

They speak the protocol by hand, over raw sockets, and share no code with the engine.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import hmac
import json
import pickle
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.coordinate import OperationCall, StepError, Team, rendezvous, team_of
from pytest_dcp._engine.coordinate.hello import Address

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld

SIZE = 3
pytestmark = pytest.mark.world_size(SIZE, timeout=60)
HEADER = struct.Struct("<4sBBHIIQ")
HELLO, WELCOME, VALUE, FAILED, RESULT, VERDICT = 1, 2, 3, 4, 6, 7
ALL_GATHER = 3
ADDRESS = "pytest_dcp/coordinator/0"
KEY = "correct horse battery staple"


def store() -> Any:
    """The store: any process that reaches MASTER_PORT can read and write it."""
    return dist.distributed_c10d._world.pg_map[dist.group.WORLD][1]


def frame(
    kind: int, segments: list[bytes], step: str = "", number: int = 0, mode: int = 0
) -> bytes:
    """The bytes of a frame."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 16)

    name = step.encode()
    table = struct.pack(f"<{len(segments)}Q", *map(len, segments))
    body = padded(table + name) + b"".join(map(padded, segments))
    return HEADER.pack(b"DCP1", kind, mode, len(name), number, len(segments), len(body)) + body


def mac(key: bytes, *parts: bytes) -> bytes:
    """As the manual says how the ranks' HMACs are made."""
    text = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return hmac.new(key, text, hashlib.sha256).digest()


def hello(rank: int, shared: bytes = b"") -> bytes:
    """The greeting of somebody who has read the store, and says to be a rank."""
    address = json.loads(store().get(ADDRESS))
    key = mac(shared, b"group", address["secret"].encode())
    said = {
        "group": f"{dist.group.WORLD.group_name}/0/{SIZE}",
        "operation": "save",
        "number": 1,
        "rank": rank,
        "nonce": secrets.token_hex(16) + "0" * 15 + "1",
    }
    text = json.dumps(said).encode()
    return frame(HELLO, [mac(key, b"hello", text), text])


def connected() -> socket.socket:
    return socket.create_connection(("127.0.0.1", json.loads(store().get(ADDRESS))["port"]), 30)


class Bomb:
    """Its pickle leaves a mark where it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def bomb(checkpoint_dir: Path) -> Iterator[bytes]:
    """A pickle, which must not have been opened in the end."""
    yield pickle.dumps(Bomb(checkpoint_dir / "opened"))
    assert not (checkpoint_dir / "opened").exists()


def save_team() -> Team:
    return team_of(None, OperationCall("save"), use_dist=True, coordinator_rank=0)


def gather(rank: int) -> list[int]:
    with save_team() as team:
        return team.all_gather("meet", lambda: rank)


SENT_BY_A_RANK = {
    "a pickle as a value": (VALUE, "{}", "the value of rank 1 cannot be read"),
    "a pickle as a failure": (FAILED, "{}", "rank 1 sent garbage: "),
    "a value that asks for a pickle": (VALUE, '["p",0]', "got a pickle, and opens none"),
    "a failure that asks for a pickle": (FAILED, '["p",0]', "got a pickle, and opens none"),
    "a failure that is none": (FAILED, '["l",[["b"]]]', "expected the cause of a failure"),
    "a frame of another kind": (RESULT, '["l",[1]]', "got a frame of kind RESULT"),
}


@pytest.mark.parametrize("attack", SENT_BY_A_RANK)
def test_who_poses_as_a_rank_has_no_pickle_opened(
    world: RankWorld, rank: int, attack: str, bomb: bytes
) -> None:
    kind, head, text = SENT_BY_A_RANK[attack]
    if rank == 1:
        store().wait([ADDRESS])
        segments = [bomb] if head == "{}" else [head.encode(), bomb]
        with connected() as sock:
            sock.sendall(hello(1) + frame(kind, segments, "meet", 1, ALL_GATHER))
            world.barrier()
    else:
        with pytest.raises(StepError) as caught:
            gather(rank)
        assert text in str(caught.value)
        world.barrier()


@pytest.mark.parametrize("word", ["left/0.1", "left/0.1/refused"])
def test_a_pickle_that_lies_in_the_store_is_not_opened(
    world: RankWorld, rank: int, word: str, bomb: bytes
) -> None:
    if rank == 1:
        store().set(f"{ADDRESS}/{word}", base64.b64encode(bomb).decode())
    world.barrier()
    if rank == 1:
        time.sleep(1.5)  # the others wait for it, and look into the store
    assert gather(rank) == [0, 1, 2]


@pytest.mark.parametrize("shared", ["", KEY])
def test_who_poses_as_the_coordinator_has_no_pickle_opened(
    world: RankWorld, rank: int, bomb: bytes, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store holds the address of an attacker that knows the secret in it."""
    if shared:
        monkeypatch.setenv("DCP_SHARED_KEY", shared)
    if rank == 0:
        secret = secrets.token_hex(16)
        key = mac(b"", b"group", secret.encode())
        check = mac(mac(shared.encode(), b"group", secret.encode()), b"check").hex()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            told = {"hosts": ["127.0.0.1"], "port": port, "machine": "", "secret": secret}
            store().set(ADDRESS, json.dumps(told | {"check": check}))
            lines = [listener.accept()[0] for _ in range(SIZE - 1)]
            for line in lines:
                line.settimeout(30)
                answer_as_coordinator(line, key, bomb)
            world.barrier()
            for line in lines:
                line.close()
    else:
        with pytest.raises(StepError) as caught:
            gather(rank)
        found = "without the seal" if shared else "expected a value of another rank"
        assert found in str(caught.value)
        world.barrier()


def answer_as_coordinator(line: socket.socket, key: bytes, bomb: bytes) -> None:
    header = line.recv(HEADER.size, socket.MSG_WAITALL)
    body = line.recv(HEADER.unpack(header)[-1], socket.MSG_WAITALL)
    said = json.loads(body[body.index(b'{"') : body.rindex(b"}") + 1])
    if said["operation"]:
        line.sendall(
            frame(WELCOME, [mac(key, b"welcome", said["nonce"].encode())])
            + frame(RESULT, [struct.pack("<I", 1), bomb], "meet", 1, ALL_GATHER)
        )


def test_the_secret_alone_admits_no_peer_where_there_is_a_shared_key(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCP_SHARED_KEY", KEY)
    if rank == 2:
        store().wait([ADDRESS])
        for shared in (b"", b"another key, long enough"):
            with connected() as sock:
                sock.sendall(hello(2, shared))
                assert sock.recv(1) == b""
    assert gather(rank) == [0, 1, 2]


class Proxy(threading.Thread):
    """A man in the middle between a rank and the coordinator, who can change messages."""

    def __init__(self, to: int, attack: str) -> None:
        super().__init__(daemon=True)
        self.opened: list[socket.socket] = []
        self.passing: list[threading.Thread] = []
        self.to, self.attack = to, attack
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self.to))
            self.opened += [sock, there]
            for way in ((sock, there, True), (there, sock, False)):
                self.passing.append(threading.Thread(target=self.pass_on, args=way, daemon=True))
                self.passing[-1].start()

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.join()
        for sock in self.opened:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.passing:
            thread.join()
        for sock in [self.listener, *self.opened]:
            sock.close()

    def pass_on(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            self.pass_frames(source, target, up)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def pass_frames(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        first = True
        while header := source.recv(HEADER.size, socket.MSG_WAITALL):
            _, kind, *_, length = HEADER.unpack(header)
            sealed = 0 if first and up else 32
            first = False
            data = header + source.recv(length + sealed, socket.MSG_WAITALL)
            if up and kind == VALUE and self.attack == "altered":
                data = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
            elif up and kind == VALUE and self.attack == "repeated":
                data *= 2
            elif not up and kind == RESULT and self.attack == "altered result":
                data = data[: HEADER.size] + b"?" + data[HEADER.size + 1 :]
            elif not up and kind == RESULT and self.attack == "a verdict put in":
                data = frame(VERDICT, [b"[]"]) + bytes(32) + data
            target.sendall(data)


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        ("none", ""),
        (
            "altered",
            "rank 1 ended in step 'meet' of save: it sent garbage: a frame without the seal",
        ),
        ("repeated", "sent garbage: a frame without the seal"),
        (
            "altered result",
            "(the coordinator) ended in step 'meet' of save: it sent garbage: a frame",
        ),
        (
            "a verdict put in",
            "(the coordinator) ended in step 'meet' of save: it sent garbage: a fr",
        ),
    ],
)
def test_a_changed_message_ends_the_connection_where_there_is_a_shared_key(
    world: RankWorld, rank: int, attack: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCP_SHARED_KEY", KEY)
    if rank == 0:
        rendezvous.publish(dist.group.WORLD, 0)
    world.barrier()
    proxy: Proxy | None = None
    if rank == 1:
        address = Address.decode(store().get(ADDRESS))
        proxy = Proxy(address.port, attack)
        proxy.start()
        there = json.loads(address.encode()) | {"port": proxy.port}
        changed = Address.decode(json.dumps(there).encode())
        rendezvous.meeting_of(dist.group.WORLD).addresses[0] = changed
    outcome = ""
    try:
        with save_team() as team:
            for _ in range(2):
                assert team.all_gather("meet", lambda: rank) == [0, 1, 2]
    except StepError as error:
        outcome = str(error)
    outcomes = world.gather(outcome)
    assert any(text in one for one in outcomes)
    assert any(outcomes) == (attack != "none")
    if proxy is not None:
        proxy.stop()


def test_a_rank_with_another_shared_key_says_so(
    world: RankWorld, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank != 2:
        monkeypatch.setenv("DCP_SHARED_KEY", KEY)
    if rank == 2:
        with pytest.raises(StepError, match="rank 2 has another DCP_SHARED_KEY in its environment"):
            gather(rank)
    elif rank == 0:
        rendezvous.publish(dist.group.WORLD, 0)
    world.barrier()


class Noted:
    """An object of a user's class, in a planner's data."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


class NotingPlanner(dcp.DefaultSavePlanner):
    """Sends an object of the user's own with each plan."""

    def create_local_plan(self) -> dcp.SavePlan:
        paths: Any = {**self.mappings, "noted": Noted(dist.get_rank())}
        return dataclasses.replace(super().create_local_plan(), planner_data=paths)

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> Any:
        noted = [plan.planner_data.pop("noted").rank for plan in all_plans]
        assert noted == list(range(SIZE))
        return super().create_global_plan(all_plans)


@pytest.mark.parametrize("allowed", [None, False])
def test_objects_of_a_users_planner_travel_unless_it_forbids_pickles(
    rank: int, checkpoint_dir: Path, allowed: bool | None
) -> None:
    planner = NotingPlanner()
    if allowed is False:
        vars(planner)["pickles_between_ranks"] = False
        with pytest.raises(TypeError, match=r"a .*Noted cannot be sent to another rank"):
            dcp.save({"w": torch.ones(2)}, checkpoint_id=checkpoint_dir, planner=planner)
        return
    dcp.save({"w": torch.ones(2)}, checkpoint_id=checkpoint_dir, planner=planner)
    target = {"w": torch.zeros(2)}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["w"].tolist() == [1.0, 1.0]


def test_saves_and_loads_go_on_with_a_shared_key(
    rank: int, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCP_SHARED_KEY", KEY)
    monkeypatch.setattr(
        "pytest_dcp._engine.coordinate.wire.pickle", None
    )  # no pickle is made or opened
    state = {"w": torch.arange(9.0), "n": {"step": 7, "words": ["a", {"b": (1,)}]}}
    dcp.save(state, checkpoint_id=checkpoint_dir)
    copy = {"w": torch.zeros(9), "n": {"step": 0, "words": ["", {"b": (0,)}]}}
    dcp.load(copy, checkpoint_id=checkpoint_dir)
    assert copy["w"].tolist() == state["w"].tolist()
    assert copy["n"] == state["n"]
    wrong = {"w": torch.zeros(9), **({"gone": torch.zeros(1)} if rank == 1 else {})}
    with pytest.raises(dcp.CheckpointMismatchError) as caught:
        dcp.load(wrong, checkpoint_id=checkpoint_dir)
    assert caught.value.missing == ("gone",)

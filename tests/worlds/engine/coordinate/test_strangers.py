"""Strangers who connect to the coordinator, and do not know the secret: saves go on."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.coordinate.peer_listener import peer_listener

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = [
    pytest.mark.world_size(3, timeout=120),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
LIMIT_S = 30.0
FLOODS = {
    "pings without end": """
while True:
    try:
        with socket.create_connection(where) as sock:
            while True: sock.sendall(b"".join(map(bytes, encode(Frame(FrameKind.PING)))) * 1000)
    except OSError: pass
""",
    "greetings of many segments": """
while True:
    try:
        with socket.create_connection(where) as sock:
            hello = Frame(FrameKind.HELLO, segments=[b""] * 8000)
            sock.sendall(b"".join(map(bytes, encode(hello))))
    except OSError: pass
""",
    "idle connections": """
kept = collections.deque(maxlen=800)
while True:
    try: kept.append(socket.create_connection(where))
    except OSError: pass
""",
}
PROGRAM = """
import collections, socket, sys
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, encode
where = ("127.0.0.1", int(sys.argv[1]))
print("here", flush=True)
"""


@contextlib.contextmanager
def flooded(flood: str, port: int) -> Iterator[None]:
    program = [sys.executable, "-c", PROGRAM + FLOODS[flood], str(port)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as stranger:
        try:
            assert stranger.stdout is not None
            assert stranger.stdout.readline() == b"here\n"
            yield
        finally:
            stranger.kill()


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_strangers_fails_no_save(
    world: RankWorld, rank: int, checkpoint_dir: Path, flood: str
) -> None:
    port = world.broadcast(peer_listener().address.port if rank == 0 else None)
    with flooded(flood, port) if rank == 0 else contextlib.nullcontext():
        world.barrier()
        began_s = time.monotonic()
        for n in range(5):
            dcp.save({"w": torch.full((10,), float(n))}, checkpoint_id=checkpoint_dir)
        assert time.monotonic() - began_s < LIMIT_S
        world.barrier()
    target = {"w": torch.zeros(10)}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["w"].tolist() == [4.0] * 10


def test_a_peer_that_was_crowded_out_says_hello_again(
    world: RankWorld, rank: int, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator closes the first connections of every peer before it reads them."""
    refused: list[socket.socket] = []
    if rank == 0:
        whole = peer_listener()._greet

        def crowded() -> None:
            handshaking = peer_listener()._handshaking
            while handshaking and len(refused) < 6:
                line = handshaking.pop()[1]
                refused.append(line.sock)
                peer_listener()._close_stranger(line)
            whole()

        monkeypatch.setattr(peer_listener(), "_greet", crowded)
    dcp.save({"w": torch.ones(3)}, checkpoint_id=checkpoint_dir)
    if rank == 0:
        assert len(refused) == 6
    target = {"w": torch.zeros(3)}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["w"].tolist() == [1.0] * 3

"""The background process of one rank: takes orders from its rank, saves and answers.

It ends with its rank, however the rank ends: by a signal of the kernel, or when the line to it
breaks. While it carries out an order, it repeatedly sends a sign of life.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

from pytest_dcp._engine.background.state_transfer import unpickle_state
from pytest_dcp._engine.coordinate import OperationCall, team_of
from pytest_dcp._engine.coordinate.failure import capture
from pytest_dcp._engine.coordinate.machines import machine
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.plan.storage_capabilities import names_saves
from pytest_dcp._engine.verbs.save import Save
from pytest_dcp._engine.verbs.save_messages import encode_metadata
from pytest_dcp._engine.verbs.save_request import SaveRequest

PROGRAM = """
import json, signal, sys
# Ctrl-C in a terminal, and a scheduler's signal, reach all processes of a job, even during the
# imports; the rank decides whether its saves go on.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])["path"]
from pytest_dcp.garbage_collection import frozen_imports
with frozen_imports():
    from pytest_dcp._engine.background.worker import main
main()
"""
BEAT_S = 0.25
_sending = threading.Lock()
"""Held while a message is sent: signs of life come from a thread of their own."""
LOOPBACK, LOOPBACK_NAME = "127.0.0.1", "lo"
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h
NAME = b"dcp-async-save"
"""The process's name in the system, even while it ends; at most 15 bytes."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, sent every `BEAT_S` until the answer to an order."""

    progress: Progress | None
    """Of the save, once its plan is known."""


class Order(Protocol):
    """An order of a rank to its process."""

    def run(self, line: Connection) -> Any:
        """Carry it out; return or raise the answer. Descriptors that follow come over `line`."""


@dataclass(frozen=True, slots=True)
class Advance:
    """A sign of life that says how far an order is, in units of the order's own."""

    count: int
    """Since the last one."""


def send_advance(line: Connection, count: int) -> None:
    """Tell the rank that this order has done `count` more."""
    with _sending:
        line.send(Advance(count))


@dataclass(frozen=True, slots=True)
class Begin:
    """Answer when the imports are done."""

    def run(self, line: Connection) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Host:
    """Open the store at which the ranks' processes meet; its port."""

    timeout_s: float
    one_machine: bool
    """Whether all ranks are on this machine: then no other machine can reach the store."""

    def run(self, line: Connection) -> int:
        listener = socket.create_server((LOOPBACK if self.one_machine else "", 0))
        port: int = listener.getsockname()[1]
        _store.append(_store_at(LOOPBACK, port, self.timeout_s, listener))
        return port


@dataclass(frozen=True, slots=True)
class Join:
    """Form a process group with the other ranks' processes."""

    rank: int
    size: int
    port: int
    hosts: tuple[str, ...]
    """The coordinator's addresses, in the order in which another machine tries them."""
    machine: str
    """The coordinator's."""
    timeout_s: float
    one_machine: bool

    def run(self, line: Connection) -> None:
        if self.one_machine:
            # For the sockets of gloo and of the save; the rank's own environment is unchanged.
            os.environ["MASTER_ADDR"] = LOOPBACK
            if LOOPBACK_NAME in (name for _, name in socket.if_nameindex()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_NAME)
        store = _store[0] if _store else self._connect()
        dist.init_process_group(
            "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=self.timeout_s),
        )

    def _connect(self) -> TCPStore:
        hosts = (LOOPBACK, *self.hosts) if self.machine == machine() else self.hosts
        failed: Exception = ConnectionError(f"no host to meet the background processes at: {self}")
        for host in hosts:
            try:
                return _store_at(host, self.port, self.timeout_s)
            except (RuntimeError, OSError) as error:  # c10d's errors are RuntimeErrors
                failed = error
        raise failed


@dataclass(frozen=True, slots=True)
class Upload:
    """Save a state; its metadata, packed."""

    state: bytes
    how: bytes
    """The storage writer and the planner."""
    nbytes: int
    """Bytes of the shared memory, whose descriptor follows; 0: no memory follows."""
    no_dist: bool
    use_collectives: bool
    checkpoint_id: str | os.PathLike[str] | None
    """The id to set the storage writer to; None: it is already set."""

    def run(self, line: Connection) -> Any:
        flat = _map_memory(recv_handle(line), self.nbytes) if self.nbytes else None
        writer, planner = unpickle_state(self.how)
        if names_saves(writer):
            # A new id, because every copy of the writer has the original's.
            writer.new_save_id()
        # The folders were compared by the ranks' own save.
        team = team_of(None, OperationCall("save"), use_dist=not self.no_dist, coordinator_rank=0)
        request = SaveRequest(
            lambda: unpickle_state(self.state, flat),
            writer,
            planner,
            use_collectives=self.use_collectives,
            progress=_note_progress,
            reset=None if self.checkpoint_id is None else partial(writer.reset, self.checkpoint_id),
        )
        try:
            return encode_metadata(Save(team, request).run())
        finally:
            _progress.clear()


_store: list[TCPStore] = []
"""The store hosted here, if any."""
_progress: list[Progress] = []
"""Of the running save: the last one that was reported."""


def _note_progress(state: Progress) -> None:
    _progress[:] = [state]


def main() -> None:
    """The process's whole life."""
    settings = json.loads(sys.argv[1])
    _end_with(settings["parent"])
    torch.set_num_threads(settings["threads"])
    with contextlib.suppress(EOFError, OSError):
        serve(Connection(settings["fd"]))
    # Nothing is open, and what torch does at exit may wait for peers.
    os._exit(0)


def serve(line: Connection) -> None:
    """Carry out orders until the line breaks, which raises EOFError or OSError."""
    while True:
        order: Order = line.recv()
        with _send_heartbeats(line):
            answer = _answer(order, line)
        line.send(answer)
        del order, answer
        # A cycle that keeps a state alive would keep its memory mapped. This takes a moment, as the
        # objects of the imports are exempt.
        gc.collect()


def _answer(order: Order, line: Connection) -> Any:
    try:
        return order.run(line)
    except BaseException as error:  # noqa: BLE001 - sent to the rank
        return capture(order.rank if isinstance(order, Join) else 0, error)


@contextlib.contextmanager
def _send_heartbeats(line: Connection) -> Iterator[None]:
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_S):
            try:
                with _sending:
                    line.send(Beat(next(iter(_progress), None)))
            except OSError:
                os._exit(1)  # the rank has ended

    thread = threading.Thread(target=beat, name="dcp-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _map_memory(fd: int, nbytes: int) -> torch.Tensor:
    try:
        return torch.from_numpy(np.frombuffer(mmap.mmap(fd, nbytes), dtype=np.uint8))
    finally:
        os.close(fd)


def _store_at(
    name: str, port: int, timeout_s: float, listener: socket.socket | None = None
) -> TCPStore:
    """The store at this address; with a socket it is hosted here, on the socket."""
    return TCPStore(
        name,
        port,
        is_master=listener is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _end_with(parent: int) -> None:
    """Be killed when the parent's thread that started this process ends, or end now if it has."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_NAME, NAME, 0, 0, 0)
    prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)

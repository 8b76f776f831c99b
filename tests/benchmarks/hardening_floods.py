"""Attacks during a save of 4 ranks: it must not fail, and take at most twice as long.

The attackers are processes of another user, where this one is root, in a network of their own that
they share with the ranks, where namespaces may be made. They connect to the coordinator without
end, by hand and over raw sockets; the last ones know the secret that lies in the group's store.
They run at the lowest priority: attackers on a network bring their own processors, so only the
effect on the coordinator is to be measured.
"""

import argparse
import contextlib
import encodings.idna  # noqa: F401 - the attackers cannot read the standard library
import hashlib
import hmac
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_ranks import World, run_world

RANKS = 4
ATTACKERS = 2
SAVES = 60
QUICK_SAVES = 5
ELEMENTS = 1 << 16
TENSORS = 8
NOBODY = 65534
LOWEST_PRIORITY = 19
MOST_SLOWDOWN = 2.0
HELD = 800
"""Idle connections of each attacker."""
BEGIN_S = 0.5
"""Time for the attackers to start."""
LIMIT_S = 900.0
HEADER = struct.Struct("<4sBBHIIQ")
HELLO, PING = 1, 9

Address = dict[str, Any]
Attack = Callable[[Address, tuple[str, int]], None]


@dataclass(frozen=True, slots=True)
class Attacked:
    """How the saves beside one attack went."""

    attack: str
    other_user: bool
    own_network: bool
    saves: int
    failed: int
    quiet_ms: float
    """One save without the attack; the median."""
    attacked_ms: float
    """One save beside it; the median."""
    times: float
    met: bool


def measure(*, quick: bool = False) -> list[Attacked]:
    """A row for each attack.

    Raises RuntimeError when the ranks could not be run at all.
    """
    saves = str(QUICK_SAVES if quick else SAVES)
    own = _can_make_networks()
    program = [sys.executable, str(Path(__file__).resolve()), saves, str(int(own))]
    if own:
        up = 'ip link set lo up && exec "$@"'
        program = ["unshare", "--net", "sh", "-c", up, "sh", *program]
    process = subprocess.run(program, stdout=subprocess.PIPE, timeout=LIMIT_S, check=False)
    if process.returncode:
        raise RuntimeError(f"the ranks exited with {process.returncode}, see above")
    return [Attacked(**row) for row in json.loads(process.stdout.splitlines()[-1])]


def _can_make_networks() -> bool:
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("ip"):
        return False
    test = ["unshare", "--net", "ip", "link", "set", "lo", "up"]
    return subprocess.run(test, capture_output=True, check=False).returncode == 0


# The attacks. Each runs until it is killed.


def frame(kind: int, segments: list[bytes]) -> bytes:
    """The bytes of a frame."""

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 16)

    table = padded(struct.pack(f"<{len(segments)}Q", *map(len, segments)))
    body = table + b"".join(map(padded, segments))
    return HEADER.pack(b"DCP1", kind, 0, 0, 0, len(segments), len(body)) + body


def hello(address: Address, group: str, operation: str, count: int) -> bytes:
    """The greeting of somebody who knows the secret of the address."""

    def mac(key: bytes, *parts: bytes) -> bytes:
        text = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
        return hmac.new(key, text, hashlib.sha256).digest()

    nonce = f"{secrets.token_hex(16)}{count:016x}"
    fields = {"group": group, "operation": operation, "number": 1, "rank": 1, "nonce": nonce}
    text = json.dumps(fields).encode()
    key = mac(b"", b"group", address["secret"].encode())
    return frame(HELLO, [mac(key, b"hello", text), text])


def send_again(data: Callable[[], bytes], times: int, _: Address, where: tuple[str, int]) -> None:
    """Connect, send the data `times` times, and connect again."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(where) as sock:
            for _nth in range(times):
                sock.sendall(data())


def hold(greeting: Callable[[Address], bytes], address: Address, where: tuple[str, int]) -> None:
    """Keep as many connections as one may, and replace the oldest again and again."""
    sockets: deque[socket.socket] = deque(maxlen=HELD)
    while True:
        with contextlib.suppress(OSError):
            sock = socket.create_connection(where)
            sockets.append(sock)
            sock.sendall(greeting(address))


def ping_as_a_rank(address: Address, where: tuple[str, int]) -> None:
    """Join with the secret, as a rank of another group, and ping without end."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(where) as sock:
            sock.sendall(hello(address, "another group", "", 1))
            while True:
                sock.sendall(frame(PING, []) * 1000)


def _sized(nbytes: int) -> bytes:
    return HEADER.pack(b"DCP1", HELLO, 0, 0, 0, 2, nbytes)


ENDLESS = 1_000_000
ATTACKS: dict[str, Attack] = {
    "connect and close": partial(send_again, bytes, 0),
    "idle connections": partial(hold, lambda _: b""),
    "half a header each": partial(hold, lambda _: b"DCP1"),
    "pings without end": partial(send_again, lambda: frame(PING, []) * 1000, ENDLESS),
    "greetings of 8,000 segments": partial(send_again, lambda: frame(HELLO, [b""] * 8000), 1),
    "greetings of 1 TiB": partial(send_again, lambda: _sized(1 << 40), 1),
    "greetings with a wrong proof": partial(
        send_again, lambda: frame(HELLO, [bytes(32), b'{"group": "", "rank": 1}']), 1
    ),
    "a proxy's requests": partial(send_again, lambda: b"GET / HTTP/1.1\r\n\r\n", 1),
    "with the secret: idle connections": partial(
        hold, lambda address: hello(address, f"{secrets.token_hex(4)}/0/4", "", 1)
    ),
    "with the secret: pings without end": ping_as_a_rank,
}


@contextlib.contextmanager
def attackers(attack: Attack, *, other_user: bool) -> Iterator[list[int]]:
    """Processes that attack the coordinator whose address comes through these pipes, one each."""
    pipes, forked = [os.pipe() for _ in range(ATTACKERS)], []
    try:
        forked = [_fork_attacker(attack, reading, other_user) for reading, _ in pipes]
        yield [writing for _, writing in pipes]
    finally:
        for end in (end for pipe in pipes for end in pipe):
            os.close(end)
        for pid in forked:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # see run_world
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _fork_attacker(attack: Attack, pipe: int, other_user: bool) -> int:
    if pid := os.fork():
        return pid
    try:
        os.nice(LOWEST_PRIORITY)
        if other_user:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        address = json.loads(os.read(pipe, 1 << 16))
        attack(address, ("127.0.0.1", address["port"]))
    except BaseException:  # noqa: BLE001 - this process must not run its parent's code
        traceback.print_exc()
    finally:
        os._exit(1)


# The ranks.


def save_beside(world: World, folder: str, pipes: list[int], saves: int) -> dict[str, Any]:
    """One rank's part: save in peace, let the attackers begin, and save again."""
    import pytest_dcp.checkpoint as dcp
    from pytest_dcp._engine.coordinate.peer_listener import peer_listener

    state = {f"t{n}": torch.full((ELEMENTS,), float(n)) for n in range(TENSORS)}

    def save() -> None:
        writer = dcp.FileSystemWriter(folder, sync_files=False)
        dcp.save(state, storage_writer=writer)

    save()
    quiet = [world.timed(save) for _ in range(saves)]
    for pipe in pipes if world.rank == 0 else ():
        os.write(pipe, peer_listener().address.encode().encode())
    time.sleep(BEGIN_S)
    failed, attacked = 0.0, []
    for _ in range(saves):
        errors: list[Exception] = []
        attacked.append(world.timed(partial(_note, save, errors)))
        failed += world.most(float(bool(errors)))
    return {"failed": int(failed), "quiet": quiet, "attacked": attacked}


def _note(save: Callable[[], None], errors: list[Exception]) -> None:
    try:
        save()
    except Exception as error:  # noqa: BLE001 - it is counted, and the next save tried
        print(f"a save failed: {error}", file=sys.stderr)
        errors.append(error)


def run_attack(name: str, saves: int, own_network: bool) -> Attacked:
    """The row of one attack."""
    other_user = os.geteuid() == 0
    with (
        tempfile.TemporaryDirectory(prefix="bench-floods-") as folder,
        attackers(ATTACKS[name], other_user=other_user) as pipes,
    ):
        found = run_world(partial(save_beside, folder=folder, pipes=pipes, saves=saves), RANKS)
    quiet_ms, attacked_ms = map(statistics.median, (found["quiet"], found["attacked"]))
    times = attacked_ms / quiet_ms
    is_met = found["failed"] == 0 and times <= MOST_SLOWDOWN
    return Attacked(
        *(
            name,
            other_user,
            own_network,
            saves,
            found["failed"],
            quiet_ms,
            attacked_ms,
            times,
            is_met,
        )
    )


def main() -> None:
    """Run every attack, and print the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("saves", type=int)
    parser.add_argument("own_network", type=int)
    options = parser.parse_args()
    rows = [run_attack(name, options.saves, bool(options.own_network)) for name in ATTACKS]
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()

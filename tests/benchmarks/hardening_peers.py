"""One coordinator with many peers: the time of its steps, and its open descriptors.

The coordinator is a process of its own that begins with the soft limit of descriptors of an
ordinary login (1,024). One other process plays all its peers, with one socket each. Both run on
this machine, so the time of a step includes the work of the peers' process; `cpu_ms` does not.
"""

import argparse
import contextlib
import json
import os
import resource
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from pytest_dcp._engine.coordinate import OperationCall, rendezvous, team_of
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, Head, Mode, encode
from pytest_dcp._engine.coordinate.hello import Address, Hello, greet
from pytest_dcp._engine.coordinate.peer_listener import peer_listener
from pytest_dcp._engine.coordinate.peer_side import connect

PEERS = (64, 512, 4096)
QUICK_PEERS = (8, 64)
STEPS = 20
SOFT_LIMIT = 1024
"""Of descriptors, in a login shell of the common distributions."""
MS_PER_PEER = 0.1
"""The promised processor time of the coordinator in one step."""
BESIDE = 8
"""Descriptors that do not grow with the peers."""
LIMIT_S = 300.0
OPERATION = "save"


@dataclass(frozen=True, slots=True)
class PeerTimes:
    """Costs of one coordinator for one number of peers."""

    peers: int
    join_ms: float
    """The first step of the first operation: all peers connect and say who they are."""
    rejoin_ms: float
    """The first step of the second operation."""
    agree_ms: float
    """One further step; the median."""
    cpu_ms: float
    """Time of the coordinator's processor in such a step; the mean."""
    descriptors: int
    """That the coordinator has open in the second operation, and had not before the first."""
    met: bool
    """Whether a step takes at most `MS_PER_PEER`, and a peer one descriptor."""


def measure(*, quick: bool = False) -> list[PeerTimes]:
    """The times of one coordinator, for each number of peers.

    Raises RuntimeError when a process fails.
    """
    return [_measure(peers, STEPS) for peers in (QUICK_PEERS if quick else PEERS)]


def _measure(peers: int, steps: int) -> PeerTimes:
    with (
        _started("coordinator", peers, steps) as coordinator,
        _started("peers", peers, steps) as crowd,
    ):
        address, _ready = _read_line(coordinator), _read_line(crowd)
        for process in (crowd, coordinator):
            _write_line(process, address)
        answer, _ = coordinator.communicate(timeout=LIMIT_S)
        crowd.wait(LIMIT_S)
        if coordinator.returncode or crowd.returncode:
            raise RuntimeError(f"{peers} peers: a process failed, see above")
    return PeerTimes(**json.loads(answer))


@contextlib.contextmanager
def _started(role: str, peers: int, steps: int) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed when the block is left."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), role, str(peers), str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"MASTER_ADDR": "localhost"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _read_line(process: subprocess.Popen[str]) -> str:
    line = "" if process.stdout is None else process.stdout.readline()
    if not line:
        raise RuntimeError("a process failed, see above")
    return line.strip()


def _write_line(process: subprocess.Popen[str], text: str) -> None:
    if process.stdin is not None:
        process.stdin.write(f"{text}\n")
        process.stdin.flush()


# The coordinator's process.


def run_coordinator(peers: int, steps: int) -> None:
    """Print the address, run two operations, and print the times."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(SOFT_LIMIT, hard), hard))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=peers + 1)
    before = _count_descriptors()
    print(peer_listener().address.encode(), flush=True)
    sys.stdin.readline()  # the peers are ready, too
    join_ms, _, _, _ = _run_operation(steps)
    rejoin_ms, agree_ms, cpu_ms, descriptor_count = _run_operation(steps)
    is_met = cpu_ms <= MS_PER_PEER * peers + 1 and descriptor_count - before <= peers + BESIDE
    times = PeerTimes(
        peers, join_ms, rejoin_ms, agree_ms, cpu_ms, descriptor_count - before, is_met
    )
    print(json.dumps(asdict(times)))


def _run_operation(steps: int) -> tuple[float, float, float, int]:
    """Times in ms of the first step, and of the others by the clock and the processor."""
    times_ms = []
    with team_of(None, OperationCall(OPERATION), use_dist=True, coordinator_rank=0) as team:
        for step in range(steps + 1):
            began_s = time.perf_counter()
            team.agree(f"step {step}", lambda: None)
            times_ms.append(1000 * (time.perf_counter() - began_s))
            if step == 0:
                cpu_s = time.process_time()
        cpu_ms = 1000 * (time.process_time() - cpu_s) / steps
        return times_ms[0], statistics.median(times_ms[1:]), cpu_ms, _count_descriptors()


def _count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# The peers' process.


def run_peers(peers: int, steps: int) -> None:
    """Play ranks 1 to `peers` in both operations."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    dist.init_process_group("fake", store=dist.HashStore(), rank=1, world_size=peers + 1)
    world = dist.group.WORLD
    assert world is not None
    group = rendezvous.group_key(world, 0)
    print("ready", flush=True)
    address = Address.decode(sys.stdin.readline().encode())
    with selectors.DefaultSelector() as selector:
        lines: dict[int, Connection] = {}
        for number in (1, 2):
            for rank in range(1, peers + 1):
                line = lines[rank] if number > 1 else Connection(connect(address))
                lines[rank] = line
                greet(line, Hello(group, OPERATION, number, rank), address.key())
                selector.register(line, selectors.EVENT_READ, line)
            _run_steps(lines.values(), selector, steps)
            for line in lines.values():
                line.finish()
                if line in selector.get_map():
                    selector.unregister(line)
        for line in lines.values():
            line.close()


def _run_steps(lines: Collection[Connection], selector: selectors.BaseSelector, steps: int) -> None:
    for step in range(steps + 1):
        head = Head(step + 1, Mode.AGREE, f"step {step}")
        pieces = encode(Frame(FrameKind.VALUE, head))
        for line in lines:
            line.queue_encoded(pieces)
            line.flush()
        waiting = set(lines)
        while waiting:
            for key, _ in selector.select():
                line: Connection = key.data
                line.receive()
                if any(frame.kind is FrameKind.RESULT for frame in line.frames):
                    waiting.discard(line)
                line.frames.clear()
                if line.over:  # after the last step
                    selector.unregister(line)
                    if line in waiting:
                        raise RuntimeError(f"the coordinator has left: {line.ended}")


def main() -> None:
    """Play one of the processes, or measure all and print a line for each number of peers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="?", choices=["coordinator", "peers"])
    parser.add_argument("facts", nargs="*", type=int)
    chosen = parser.parse_args()
    if chosen.role is None:
        for times in measure():
            print(times, flush=True)
    elif chosen.role == "coordinator":
        run_coordinator(*chosen.facts)
    else:
        run_peers(*chosen.facts)


if __name__ == "__main__":
    main()

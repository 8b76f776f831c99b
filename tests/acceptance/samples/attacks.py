"""Copied as test_attacks.py: tests that turn on the harness itself, most of them in rank 1."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from session_recorder import note

from pytest_dcp._harness.protocol.messages import Done, Exchange, SubReport, encode
from pytest_dcp._harness.rank import pytest_plugin as rank_items
from pytest_dcp._harness.rank.this_rank import Rank, current
from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size(2, timeout=30)
FOREVER_S = 600
NOBODY = 65534
PIDFD_GETFD = 438
"""The system call's number, the same on all machines."""
HUGE_BYTES = 1 << 42
CANARY = Path("canary").absolute()


def this_rank() -> Rank:
    one = current()
    assert one is not None
    return one


def report_socket() -> int:
    return this_rank().fds.socket


def passed(phase: str) -> bytes:
    return encode(Done(phase, "passed", time.monotonic()))  # type: ignore[arg-type]


def write(data: bytes) -> None:
    """Write to this rank's report socket past its channel."""
    os.write(report_socket(), data)


def frame(text: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">II", len(text), len(payload)) + text + payload


def told(name: str, **body: object) -> bytes:
    return frame(json.dumps([name, body]).encode())


def copied(pid: int, fd: int) -> int:
    """A copy of another process's descriptor, by pidfd_getfd(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    got = libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
    os.close(pidfd)
    if got < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return int(got)


class Canary:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(CANARY),)


# Bytes that are no message.


def test_garbage(rank: int) -> None:
    if rank == 1:
        write(random.Random(1).randbytes(4096))
        time.sleep(FOREVER_S)


def test_garbage_and_passes(rank: int) -> None:
    if rank == 1:
        write(b"a line of text that was meant for a file\n")


def test_truncated_message(rank: int) -> None:
    if rank == 1:
        write(passed("call")[:20])


def test_claims_all_memory(rank: int) -> None:
    if rank == 1:
        write(struct.pack(">II", 2**32 - 1, 2**32 - 1))
        time.sleep(FOREVER_S)


def test_claims_much_and_passes(rank: int) -> None:
    if rank == 1:
        write(struct.pack(">II", 100, 2**29))


def test_pickle_in_the_place_of_a_message(rank: int) -> None:
    if rank == 1:
        write(frame(pickle.dumps(Canary())))


def test_message_of_the_controller(rank: int) -> None:
    if rank == 1:
        write(told("Leave"))


def test_time_that_is_none(rank: int) -> None:
    if rank == 1:
        write(told("Done", phase="call", outcome="failed", at_s="now"))
        time.sleep(FOREVER_S)


def test_kills_a_rank_that_is_not_there(rank: int) -> None:
    if rank == 1:
        write(told("FaultAsk", act="kill", rank=99))
        time.sleep(FOREVER_S)


def test_stops_the_clock(rank: int) -> None:
    if rank == 1:
        write(told("At", place="preparing", text="importing torch"))
        time.sleep(FOREVER_S)


def test_floods(rank: int) -> None:
    if rank == 1:
        for _ in range(1000):
            write(encode(Exchange("x")))


# Verdicts that are not the rank's own.


def give_all_verdicts(fd: int) -> None:
    """Answer all that the controller will still ask of a rank."""
    for phase in ("call", "teardown", "finish"):
        os.write(fd, passed(phase))
        if phase != "finish":
            os.read(fd, 1 << 16)  # the order for the next phase


def until_made(path: Path) -> None:
    while not path.exists():
        time.sleep(0.001)


def test_peer_gives_all_verdicts_of_a_rank_that_dies(rank: int, world: RankWorld) -> None:
    places = world.gather((os.getpid(), report_socket()))
    done = Path("spoken-by-peer")

    def speak() -> None:
        give_all_verdicts(copied(*places[1]))
        done.touch()

    if rank == 0:  # and go on meanwhile: the controller asks for more only when all have answered
        threading.Thread(target=speak, daemon=True).start()
    else:
        until_made(done)
        os._exit(0)


def test_peer_gives_the_verdict_of_a_rank_that_fails(rank: int, world: RankWorld) -> None:
    places = world.gather((os.getpid(), report_socket()))
    if rank == 0:
        os.write(copied(*places[1]), passed("call"))
        Path("given-by-peer").touch()
    else:
        until_made(Path("given-by-peer"))
        raise ValueError("boom")


def test_child_gives_all_verdicts_of_a_rank_that_dies(rank: int) -> None:
    if rank == 1:
        done = Path("spoken-by-child")
        if os.fork() == 0:
            give_all_verdicts(report_socket())
            done.touch()
            os._exit(0)
        until_made(done)
        os._exit(0)


def test_gives_its_verdict_by_hand_and_fails(rank: int) -> None:
    if rank == 1:
        write(passed("call"))
        raise ValueError("boom")


def test_gives_its_verdict_by_hand_and_dies(rank: int) -> None:
    if rank == 1:
        write(passed("call"))
        os._exit(0)


def test_gives_the_verdict_of_its_teardown_and_fails(rank: int) -> None:
    if rank == 1:
        write(passed("teardown"))
        raise ValueError("boom")


def report_of_subtest(nodeid: str, outcome: str = "passed") -> dict[str, object]:
    return {
        "_report_type": "SubTestReport",
        "_subtest.context": {"msg": "forged", "kwargs": {}},
        "nodeid": nodeid,
        "location": ["test_attacks.py", 1, "test"],
        "keywords": {},
        "outcome": outcome,
        "longrepr": None,
        "when": "call",
        "sections": [],
        "duration": 0,
        "start": 0,
        "stop": 0,
        "user_properties": [],
    }


@pytest.mark.parametrize(
    "report",
    [{}, {"_report_type": "SubTestReport"}, report_of_subtest("test_attacks.py::test_not_there")],
    ids=["empty", "bare", "of another test"],
)
def test_report_of_no_subtest(rank: int, report: dict[str, object]) -> None:
    if rank == 1:
        write(encode(SubReport(report)))


# Descriptors.


def test_closes_all_descriptors(rank: int) -> None:
    if rank == 1:
        os.closerange(3, 256)


def test_puts_null_over_all_descriptors(rank: int) -> None:
    if rank == 1:
        null = os.open(os.devnull, os.O_RDWR)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2:
                os.dup2(null, int(name))


def test_puts_a_socket_over_its_own(rank: int) -> None:
    if rank == 1:
        here, _there = socket.socketpair()
        os.dup2(here.fileno(), report_socket())
        here.close()


def test_child_keeps_the_socket(rank: int) -> None:
    if rank == 1 and os.fork() == 0:
        time.sleep(FOREVER_S)


def test_child_keeps_the_socket_that_its_rank_closes(rank: int) -> None:
    if rank == 1:
        if os.fork() == 0:
            time.sleep(FOREVER_S)
        os.close(report_socket())


def test_shuts_the_socket_down(rank: int) -> None:
    if rank == 1:
        socket.socket(fileno=os.dup(report_socket())).shutdown(socket.SHUT_RDWR)


def test_its_output_is_huge(rank: int) -> None:
    if rank == 1:
        os.ftruncate(this_rank().fds.out, HUGE_BYTES)
        time.sleep(FOREVER_S)


@pytest.mark.world_size(2, timeout=2)
def test_its_stacks_are_huge(rank: int) -> None:
    if rank == 1:
        threading.Thread(target=fill_the_trace, daemon=True).start()
        time.sleep(FOREVER_S)


def fill_the_trace() -> None:
    while True:
        os.ftruncate(this_rank().fds.trace, HUGE_BYTES)
        time.sleep(0.001)


once = settings(max_examples=1, phases=[Phase.generate], database=None)


@once
@given(number=st.integers())
def test_record_is_huge(rank: int, number: int) -> None:
    if rank == 1:
        os.ftruncate(this_rank().fds.draws, HUGE_BYTES)
        raise ValueError("boom")


@once
@given(data=st.data())
def test_pickle_in_a_peers_record(data: st.DataObject, world: RankWorld) -> None:
    places = world.gather((os.getpid(), this_rank().fds.draws))
    if world.rank == 0:
        pid, fd = places[1]
        Path(f"/proc/{pid}/fd/{fd}").write_bytes(pickle.dumps(Canary()))
    world.barrier()
    if world.rank == 1:
        raise ValueError("boom")


# Actions of the controller for a rank.


def test_has_a_module_of_its_own_preloaded(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if rank == 1:
        Path("canary_module.py").write_text(f"import os; os.mkdir({str(CANARY)!r})")
        concluded = rank_items.RankPlugin._conclude_item

        def also(self: rank_items.RankPlugin, done: Done) -> Done:
            return replace(concluded(self, done), imported=("canary_module",))

        rank_items.RankPlugin._conclude_item = also  # type: ignore[method-assign]


def test_sends_garbage_for_its_plugins(rank: int) -> None:
    if rank == 1:
        rank_items.carried_state.collect = lambda item: b"garbage"


# Files.


def test_removes_the_folder_of_the_session(rank: int) -> None:
    if rank == 1:
        shutil.rmtree(Path(this_rank().order.store).parent)


def test_takes_the_names_of_coming_stores(rank: int) -> None:
    if rank == 1:
        folder = Path(this_rank().order.store).parent
        controller = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
        for number in range(200):
            (folder / f"store-{controller}-{number}").write_bytes(b"garbage" * 100)


# Another user.


def as_nobody(attack: Callable[[], None]) -> None:
    """Do this as another user, in a separate process. Raises its error, shortened."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            attack()
            code = 0
        except BaseException as error:  # noqa: BLE001 - told by the exit code
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "see what it wrote"


def test_another_user_finds_no_way_in(world: RankWorld, tmp_path: Path) -> None:
    places = world.gather((os.getpid(), this_rank().fds.socket, this_rank().fds.draws))
    folder = Path(this_rank().order.store).parent
    leases = Path(os.environ["TMPDIR"]) / "pytest-dcp-0"
    zygote = os.getppid()

    def attack() -> None:
        for pid, report, draws in places:
            for way in (
                lambda: copied(pid, report),  # noqa: B023 - called at once
                lambda: os.open(f"/proc/{pid}/fd/{draws}", os.O_RDWR),  # noqa: B023
                lambda: os.kill(pid, signal.SIGKILL),  # noqa: B023
            ):
                with pytest.raises(PermissionError):
                    way()
        for path in (folder, leases, tmp_path):
            with pytest.raises(PermissionError):
                os.listdir(path)
        for lock in ("turnstile.lock", "cpu-0.lock"):
            with pytest.raises(PermissionError):
                os.open(leases / lock, os.O_RDWR)
        with pytest.raises(PermissionError):
            os.kill(zygote, signal.SIGSTOP)

    if world.rank == 0:
        as_nobody(attack)
    world.barrier()


def listening_ports() -> list[int]:
    """Of this machine, on the loopback interface, as /proc/net/tcp has them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A"]


def test_another_user_connects_to_gloo_first(world: RankWorld) -> None:
    """While groups are made, a stranger connects to all that listens, and says nonsense."""
    stop = Path("stop-strangers")

    def attack() -> None:
        kept = []
        while not stop.exists():
            for port in listening_ports():
                with_port = socket.socket()
                with_port.settimeout(1)
                try:
                    with_port.connect(("127.0.0.1", port))
                    with_port.send(random.randbytes(100))
                    kept.append(with_port)
                except OSError:
                    with_port.close()
            kept = kept[-50:]

    attacker = threading.Thread(target=as_nobody, args=(attack,))
    if world.rank == 0:
        if os.getuid() != 0:
            attack_by: Callable[[], None] = attack
            attacker = threading.Thread(target=attack_by)
        attacker.start()
    try:
        for _ in range(3):
            group = dist.new_group(backend="gloo")
            one = torch.ones(1)
            dist.all_reduce(one, group=group)
            assert one == 2
    finally:
        world.barrier()
        stop.touch()
        if world.rank == 0:
            attacker.join()


SQUATTER = """
import os, socket, sys, time
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
squatter = socket.socket()
squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
squatter.bind(("127.0.0.1", int(sys.argv[1])))
squatter.listen()
print("listens", flush=True)
time.sleep(600)
"""


def test_another_user_listens_on_the_master_port(rank: int, world: RankWorld) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    squatter = None
    if rank == 0:
        command = [sys.executable, "-c", SQUATTER, os.environ["MASTER_PORT"]]
        squatter = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == b"listens\n"
    world.barrier()
    try:
        dist.destroy_process_group()
        dist.init_process_group("gloo")
    finally:
        if squatter is not None:
            squatter.kill()
            squatter.communicate()


# The end.


def test_passes_in_the_end(rank: int, world: RankWorld) -> None:
    assert world.gather(rank) == [0, 1]
    note("canary", found=CANARY.exists(), module="canary_module" in sys.modules)


def test_stops_the_parent_of_the_ranks(rank: int) -> None:
    if rank == 1:
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(FOREVER_S)

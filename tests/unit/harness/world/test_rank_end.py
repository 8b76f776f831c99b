"""The controller's ends of a rank: who sent what, and what the rank wrote can be read."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from pytest_dcp._harness.protocol.frames import WireError
from pytest_dcp._harness.world.rank_handle import DRAWS_BYTES, RankEnd


@pytest.fixture
def end() -> Iterator[RankEnd]:
    one = RankEnd()
    yield one
    one.close()


def in_child(work: Callable[[], object]) -> int:
    """Do this in a forked child; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return pid


def test_the_first_process_that_sends_is_the_rank(end: RankEnd) -> None:
    pid = in_child(lambda: end.theirs.sendall(b"one"))
    assert end.receive() == b"one"
    assert end.pid == pid


def test_a_message_of_another_process_is_refused_and_names_the_process(end: RankEnd) -> None:
    end.theirs.sendall(b"mine")
    assert end.receive() == b"mine"
    pid = in_child(lambda: end.theirs.sendall(b"not mine"))
    with pytest.raises(WireError, match=rf"process {pid} \(.*which is process {os.getpid()}"):
        end.receive()


def test_bytes_of_two_processes_never_come_as_one(end: RankEnd) -> None:
    end.theirs.sendall(b"mine")
    in_child(lambda: end.theirs.sendall(b"not mine"))
    end.theirs.sendall(b"mine again")
    assert end.receive() == b"mine"
    with pytest.raises(WireError):
        end.receive()
    assert end.receive() == b"mine again"


def test_descriptors_that_are_sent_along_do_not_arrive(end: RankEnd) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        socket.send_fds(end.theirs, [b"x"], [end.out] * 50)
        assert end.receive() == b"x"
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_end_of_the_socket_is_no_sender(end: RankEnd) -> None:
    end.theirs.close()
    assert end.receive() == b""


def test_a_record_of_any_size_is_read_in_part(end: RankEnd) -> None:
    os.pwrite(end.draws, b"drawn", 0)
    assert end.read_draws() == b"drawn"
    os.ftruncate(end.draws, 1 << 42)
    assert len(end.read_draws()) == DRAWS_BYTES


def test_stacks_that_are_asked_for_again_replace_the_first() -> None:
    end = RankEnd()
    of_rank = os.dup(end.trace)  # shares the offset, as an inherited descriptor does
    try:
        os.write(of_rank, b"the first stacks, long ones")
        end.empty_trace()
        os.write(of_rank, b"the second")
        assert end.read(end.trace) == "the second"
    finally:
        os.close(of_rank)
        end.close()

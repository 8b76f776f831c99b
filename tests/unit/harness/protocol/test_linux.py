"""The Linux calls, on real processes that live for milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_dcp._harness.protocol import linux

WAIT_S = 20.0
"""Bounds waits that should take milliseconds; a test that reaches it fails."""

LOAD = f"""
import importlib.util, os, signal, subprocess, sys, time
spec = importlib.util.spec_from_file_location("linux", {linux.__file__!r})
linux = importlib.util.module_from_spec(spec)
spec.loader.exec_module(linux)

def say(*words):
    print(*words, flush=True)
"""
"""The module alone: a child needs no pytest."""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a script that speaks through a pipe; ends it afterwards."""
    started: list[subprocess.Popen[str]] = []

    def begin(script: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LOAD + textwrap.dedent(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def hears(process: subprocess.Popen[str]) -> list[str]:
    """The words of the next line that the process says."""
    assert process.stdout is not None
    return process.stdout.readline().split()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lives(pid: int) -> bool:
    return linux.state_of(pid) not in ("", "Z", "X")


@pytest.fixture
def gone_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# Contents of /proc.


@pytest.mark.parametrize("list_", [linux.children, linux._children_by_scan])
def test_a_child_is_listed_while_it_runs_and_as_a_zombie_and_not_after(
    list_: Callable[[], list[int]], sleeper: subprocess.Popen[bytes]
) -> None:
    assert sleeper.pid in list_()
    sleeper.kill()
    until(lambda: linux.state_of(sleeper.pid) == "Z")
    assert sleeper.pid in list_()
    sleeper.wait()
    assert sleeper.pid not in list_()


def test_grandchildren_are_no_children(start: Start) -> None:
    parent = start(
        """
        child = subprocess.Popen(["sleep", "60"])
        say(child.pid, *linux.children())
        sys.stdin.read()
        child.kill()
        """
    )
    grandchild, *listed = map(int, hears(parent))
    assert listed == [grandchild]
    assert grandchild not in linux.children()
    assert parent.pid in linux.children()
    parent.communicate("")


def test_a_child_whose_name_looks_like_the_format_is_still_listed(tmp_path: Path) -> None:
    # /proc/<pid>/stat is `pid (name) state ppid ...`, and the name is anyone's.
    odd = tmp_path / "a) R 1 (b c"
    odd.symlink_to(Path("/bin/sleep").resolve())
    with subprocess.Popen([str(odd), "60"]) as process:
        try:
            until(lambda: "60" in linux.command_of(process.pid))
            assert process.pid in linux._children_by_scan()
            until(lambda: linux.state_of(process.pid) == "S")
        finally:
            process.kill()


def test_this_process_is_among_all_processes() -> None:
    assert os.getpid() in linux.processes()


def test_a_command_is_shown_with_its_arguments(sleeper: subprocess.Popen[bytes]) -> None:
    until(lambda: linux.command_of(sleeper.pid) == "sleep 60")


def test_a_zombie_has_its_name_for_a_command_and_a_process_that_is_gone_a_question_mark(
    sleeper: subprocess.Popen[bytes],
) -> None:
    until(lambda: linux.command_of(sleeper.pid) == "sleep 60")
    sleeper.kill()
    until(lambda: linux.state_of(sleeper.pid) == "Z")
    assert linux.command_of(sleeper.pid) == "sleep"
    sleeper.wait()
    assert linux.command_of(sleeper.pid) == "?"


def test_a_command_that_is_no_text_is_shown_all_the_same() -> None:
    with subprocess.Popen([b"sleep", b"60", b"--", b"0\xff\n"]) as process:
        try:
            until(lambda: "60" in linux.command_of(process.pid) or not lives(process.pid))
        finally:
            process.kill()
    assert linux.command_of(process.pid) == "?"


def test_a_variable_is_the_one_that_the_process_was_started_with() -> None:
    env = {"RANK": "3", "RANK_OF": "wrong", "MY_RANK": "wrong", "EMPTY": "", "TWO": "a=b"}
    with subprocess.Popen(["/bin/sleep", "60"], env=env) as process:
        try:
            until(lambda: linux.variable_of(process.pid, "RANK") == "3")
            assert linux.variable_of(process.pid, "TWO") == "a=b"
            assert linux.variable_of(process.pid, "EMPTY") == ""
            assert linux.variable_of(process.pid, "RAN") == ""
            assert linux.variable_of(process.pid, "PATH") == ""
        finally:
            process.kill()


def test_a_variable_of_a_process_that_is_gone_is_empty(gone_pid: int) -> None:
    assert linux.variable_of(gone_pid, "PATH") == ""


def test_a_process_that_stops_and_goes_on_and_ends_is_seen_to(
    sleeper: subprocess.Popen[bytes],
) -> None:
    pid = sleeper.pid
    until(lambda: linux.state_of(pid) == "S")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: linux.state_of(pid) == "T")
    os.kill(pid, signal.SIGCONT)
    until(lambda: linux.state_of(pid) == "S")
    sleeper.kill()
    until(lambda: linux.state_of(pid) == "Z")
    sleeper.wait()
    assert linux.state_of(pid) == ""


def test_a_process_is_at_work_while_any_of_its_threads_is(start: Start) -> None:
    process = start(
        """
        import threading
        stop = []
        def spin():
            while not stop:
                pass
        threading.Thread(target=spin).start()
        say("spins")
        sys.stdin.readline()
        stop.append(True)
        say("waits")
        sys.stdin.readline()
        """
    )
    assert hears(process) == ["spins"]
    for _ in range(20):
        assert linux.at_work(process.pid)
        time.sleep(0.001)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert hears(process) == ["waits"]
    until(lambda: not linux.at_work(process.pid))


def test_a_thread_s_name_may_be_any_bytes(start: Start) -> None:
    process = start(
        """
        import ctypes
        ctypes.CDLL(None).prctl(15, "fourteen bytesé".encode(), 0, 0, 0)  # PR_SET_NAME
        say("named")
        sys.stdin.readline()
        """
    )
    assert hears(process) == ["named"]
    until(lambda: linux.state_of(process.pid) == "S")
    assert not linux.at_work(process.pid)


def test_a_process_that_is_gone_is_not_at_work(gone_pid: int) -> None:
    assert not linux.at_work(gone_pid)


# Parents and orphans.

MIDDLE = """
    # A middle process starts the last one, says its id and ends.
    source = open({source!r}).read()
    last = subprocess.Popen([sys.executable, "-I", "-S", "-c", source], stdout=subprocess.PIPE)
    last.stdout.readline()
    say(last.pid)
    {then}
"""


def test_a_process_that_asked_for_it_dies_with_its_parent(start: Start, tmp_path: Path) -> None:
    source = tmp_path / "last.py"
    source.write_text(LOAD + "linux.die_with_parent(os.getppid())\nsay('ready')\ntime.sleep(60)\n")
    parent = start(MIDDLE.format(source=str(source), then="sys.stdin.read()"))
    (last,) = map(int, hears(parent))
    assert lives(last)
    parent.kill()
    until(lambda: not lives(last))


def test_a_process_that_did_not_ask_outlives_its_parent(start: Start, tmp_path: Path) -> None:
    # The control of the test above.
    source = tmp_path / "last.py"
    source.write_text(LOAD + "say('ready')\ntime.sleep(60)\n")
    parent = start(MIDDLE.format(source=str(source), then="sys.stdin.read()"))
    (last,) = map(int, hears(parent))
    parent.kill()
    parent.wait()
    try:
        assert lives(last)
    finally:
        os.kill(last, signal.SIGKILL)


def test_the_signal_at_the_parent_s_end_can_be_chosen(start: Start, tmp_path: Path) -> None:
    source = tmp_path / "last.py"
    told = tmp_path / "told"
    source.write_text(
        LOAD
        + "def tell(*_):\n"
        + f"    open({str(told)!r}, 'w').close()\n"
        + "    os._exit(0)\n"
        + "signal.signal(signal.SIGTERM, tell)\n"
        + "linux.die_with_parent(os.getppid(), signal.SIGTERM)\nsay('ready')\ntime.sleep(60)\n"
    )
    parent = start(MIDDLE.format(source=str(source), then="sys.stdin.read()"))
    (last,) = map(int, hears(parent))
    parent.kill()
    until(lambda: not lives(last))
    assert told.exists()


def test_a_process_whose_parent_is_gone_already_ends_at_once(start: Start) -> None:
    process = start("linux.die_with_parent(1 << 22)\nsay('lives')")
    out, _ = process.communicate(timeout=WAIT_S)
    assert (out, process.returncode) == ("", 1)


@pytest.mark.parametrize("adopts", [True, False])
def test_orphans_come_to_the_process_that_adopts_them_and_only_to_it(
    start: Start, adopts: bool
) -> None:
    process = start(
        f"""
        if {adopts}:
            linux.adopt_orphans()
        middle = subprocess.Popen(
            ["/bin/sh", "-c", "sleep 60 >/dev/null & echo $!"], stdout=subprocess.PIPE
        )
        orphan = int(middle.stdout.readline())
        middle.wait()
        say(orphan, int(orphan in linux.children()))
        os.kill(orphan, signal.SIGKILL)
        if {adopts}:
            say(os.waitpid(orphan, 0)[1])
        """
    )
    _, adopted = hears(process)
    assert adopted == str(int(adopts))
    if adopts:
        assert hears(process) == [str(int(signal.SIGKILL))]


def test_an_impossible_request_is_an_os_error_with_its_code() -> None:
    with pytest.raises(OSError, match=r"prctl\(-1\)") as caught:
        linux._prctl(-1, 0)
    assert caught.value.errno is not None


# Memory.


def test_collapsing_memory_covers_whole_huge_pages_and_changes_no_byte(start: Start) -> None:
    process = start(
        """
        import ctypes, hashlib
        blocks = [bytes([i % 251]) * 100_000 for i in range(300)]
        before = hashlib.sha1(b"".join(blocks)).hexdigest()
        covered = [linux.collapse_memory() for _ in range(2)]
        after = hashlib.sha1(b"".join(blocks)).hexdigest()
        say(*covered, before == after)
        """
    )
    first, second, same = hears(process)
    assert same == "True"
    for covered in (int(first), int(second)):
        assert covered >= 0
        assert covered % linux.HUGE_PAGE_BYTES == 0
    assert process.wait(WAIT_S) == 0


def test_a_forked_child_of_a_collapsed_process_sees_the_same_memory(start: Start) -> None:
    process = start(
        """
        data = bytearray(b"x" * (8 << 20))
        covered = linux.collapse_memory()
        pid = os.fork()
        if pid == 0:
            right = data.count(b"x") == len(data)
            data[:] = b"y" * len(data)
            os._exit(0 if right else 1)
        say(type(covered).__name__, os.waitpid(pid, 0)[1], data.count(b"x") == len(data))
        """
    )
    assert hears(process) == ["int", "0", "True"]


def test_pausing_openmp_without_one_does_nothing(start: Start) -> None:
    process = start("linux.pause_openmp()\nsay('lives')")
    assert hears(process) == ["lives"]


def test_pausing_openmp_ends_its_threads(start: Start) -> None:
    process = start(
        """
        import ctypes
        try:
            gomp = ctypes.CDLL("libgomp.so.1")
        except OSError:
            say("no libgomp")
            sys.exit()
        work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
        gomp.GOMP_parallel(work, None, 4, 0)
        before = len(os.listdir("/proc/self/task"))
        linux.pause_openmp()
        say(before, len(os.listdir("/proc/self/task")))
        """
    )
    threads = hears(process)
    if threads == ["no", "libgomp"]:
        pytest.skip("there is no system-wide libgomp")
    assert threads == ["4", "1"]


def test_a_process_that_ended_is_exiting_and_one_that_runs_is_not() -> None:
    assert not linux.is_exiting(os.getpid())
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert linux.is_exiting(process.pid)
    assert linux.is_exiting(process.pid)


def test_the_main_thread_of_a_process_uses_time_when_it_works() -> None:
    before = linux.main_thread_cpu_s(os.getpid())
    while time.process_time() < 0.02 + before:
        pass
    assert linux.main_thread_cpu_s(os.getpid()) > before


def test_a_signal_for_the_main_thread_says_when_there_is_none() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(ProcessLookupError):
        linux.signal_main_thread(process.pid, 0)

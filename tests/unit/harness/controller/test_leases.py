"""Leases between real processes; each taker below is its own Python, started without pytest."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

import pytest_dcp
from pytest_dcp._harness.controller.lease_errors import (
    GpusUnavailable,
    LeaseFolderRejected,
    LeaseRequest,
    LeaseTimeout,
    Shortage,
)
from pytest_dcp._harness.controller.leases import (
    LeasePool,
    default_max_processes,
    folder_problems,
    visible_gpus,
)

WAIT_S = 20.0
"""Bounds waits that should take milliseconds; a test that reaches it fails."""

PRELUDE = """
import os, subprocess, sys, time
from pathlib import Path
from pytest_dcp._harness.controller.leases import LeasePool, LeaseRequest, LeaseTimeout

def pool(max_processes=4, *gpus):
    return LeasePool(Path(sys.argv[1]), max_processes=max_processes, visible_gpus=gpus)

def note(line):
    # One write of one line to a file opened for appending does not mix with others.
    fd = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (line + "\\n").encode())
    os.close(fd)

def say(line):
    print(line, flush=True)
"""

StartTaker = Callable[[str], "Taker"]


class Taker:
    """A process that runs a script; it says lines, and goes on when told."""

    def __init__(self, script: str, folder: Path, journal: Path) -> None:
        root = str(Path(pytest_dcp.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, str(folder), str(journal)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": root},
            text=True,
        )

    def hears(self) -> str:
        """The next line that the process says; empty when it ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def ended(self) -> int:
        return self.process.wait(WAIT_S)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "locks"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def start(folder: Path, journal: Path) -> Iterator[StartTaker]:
    takers: list[Taker] = []

    def start_taker(script: str) -> Taker:
        takers.append(Taker(script, folder, journal))
        return takers[-1]

    yield start_taker
    for taker in takers:
        taker.process.kill()
        taker.process.communicate()


def highest_sum(journal: Path) -> int:
    """The most that was held at any moment, by an account that the takers kept themselves.

    A taker notes +n after it got n, and -n before it gives them back.
    """
    held = highest = 0
    for line in journal.read_text().splitlines():
        held += int(line)
        highest = max(highest, held)
    assert held == 0
    return highest


def first_timeout(pool: LeasePool, request: LeaseRequest) -> LeaseTimeout:
    """How `request` fails once somebody is in its way."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        try:
            pool.acquire(request, 0).release()
        except LeaseTimeout as exc:
            return exc
        time.sleep(0.005)
    pytest.fail(f"{request!r} was never in anybody's way")


HOLD = """
with pool(4, "0").acquire(LeaseRequest(3, 1), 10):
    say("held")
    sys.stdin.readline()
"""


# Exclusivity


def test_a_process_cannot_take_the_slots_of_another(folder: Path, start: StartTaker) -> None:
    holder = start(HOLD)
    assert holder.hears() == "held"
    pool = LeasePool(folder, max_processes=4, visible_gpus=("0",))
    pool.acquire(LeaseRequest(1, 0), 0).release()
    with pytest.raises(LeaseTimeout):
        pool.acquire(LeaseRequest(2, 0), 0)
    with pytest.raises(LeaseTimeout):
        pool.acquire(LeaseRequest(1, 1), 0)
    holder.tell()
    assert holder.ended() == 0
    with pool.acquire(LeaseRequest(4, 1), 0) as lease:
        assert lease.gpus == (0,)


def test_one_pool_does_not_take_a_slot_twice(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=4, visible_gpus=("0", "1"))
    with pool.acquire(LeaseRequest(3, 1), 0) as first:
        with pytest.raises(LeaseTimeout):
            pool.acquire(LeaseRequest(2, 0), 0)
        with pool.acquire(LeaseRequest(1, 1), 0) as second:
            assert {first.gpus, second.gpus} == {(0,), (1,)}


def test_threads_of_one_pool_stay_within_the_budget(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=4)
    held: list[int] = []
    sums: list[int] = []

    def take_many_times() -> None:
        for _ in range(20):
            with pool.acquire(LeaseRequest(2, 0), WAIT_S):
                held.append(2)
                sums.append(sum(held))
                time.sleep(0.001)
                held.remove(2)

    threads = [threading.Thread(target=take_many_times) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(sums) == 80
    assert max(sums) == 4


def test_a_lease_taken_in_one_thread_is_released_in_another(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=1)
    lease = pool.acquire(LeaseRequest(1, 0), 0)
    thread = threading.Thread(target=lease.release)
    thread.start()
    thread.join(WAIT_S)
    LeasePool(folder, max_processes=1).acquire(LeaseRequest(1, 0), 0).release()


def test_a_world_larger_than_the_budget_takes_all_of_it(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=2)
    with pool.acquire(LeaseRequest(16, 0), 0), pytest.raises(LeaseTimeout):
        pool.acquire(LeaseRequest(1, 0), 0)


def test_a_second_release_does_not_free_the_next_holder(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=1)
    first = pool.acquire(LeaseRequest(1, 0), 0)
    first.release()
    with pool.acquire(LeaseRequest(1, 0), 0):
        first.release()
        with pytest.raises(LeaseTimeout):
            LeasePool(folder, max_processes=1).acquire(LeaseRequest(1, 0), 0)


def test_a_world_that_raises_gives_its_lease_back(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=1)
    with pytest.raises(ZeroDivisionError), pool.acquire(LeaseRequest(1, 0), 0):
        raise ZeroDivisionError
    pool.acquire(LeaseRequest(1, 0), 0).release()


def test_lock_files_do_not_grow_with_use(folder: Path) -> None:
    for _ in range(5):
        pool = LeasePool(folder, max_processes=3, visible_gpus=("0", "MIG-GPU-ab/1/0"))
        for _ in range(5):
            pool.acquire(LeaseRequest(3, 2), 0).release()
    assert sorted(path.name for path in folder.iterdir()) == [
        "cpu-0.lock",
        "cpu-1.lock",
        "cpu-2.lock",
        "gpu-0.lock",
        "gpu-MIG-GPU-ab%2F1%2F0.lock",
        "turnstile-gpu.lock",
        "turnstile.lock",
    ]


# Death and forks


def test_a_killed_holder_frees_its_slots_though_its_children_live(
    folder: Path, start: StartTaker
) -> None:
    holder = start("""
lease = pool(4, "0").acquire(LeaseRequest(4, 1), 10)
executed = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
forked = os.fork()
if forked == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
say(f"{executed.pid} {forked}")
time.sleep(60)
""")
    children = [int(pid) for pid in holder.hears().split()]
    assert len(children) == 2
    try:
        pool = LeasePool(folder, max_processes=4, visible_gpus=("0",))
        with pytest.raises(LeaseTimeout):
            pool.acquire(LeaseRequest(1, 0), 0)
        holder.process.send_signal(signal.SIGKILL)
        assert holder.ended() == -signal.SIGKILL
        pool.acquire(LeaseRequest(4, 1), 1).release()
        for pid in children:
            os.kill(pid, 0)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_a_killed_waiter_frees_the_turnstile(folder: Path, start: StartTaker) -> None:
    pool = LeasePool(folder, max_processes=2)
    with pool.acquire(LeaseRequest(1, 0), 0):
        waiter = start("""
say("waiting")
pool(2).acquire(LeaseRequest(2, 0), 60)
""")
        assert waiter.hears() == "waiting"
        assert "its turn" in first_timeout(pool, LeaseRequest(1, 0)).shortage.waiting_for
        waiter.process.kill()
        waiter.ended()
        pool.acquire(LeaseRequest(1, 0), 1).release()


def test_a_forked_child_neither_releases_nor_shares_its_parents_lease(
    folder: Path, start: StartTaker
) -> None:
    parent = start("""
import gc
mine = pool(3)
lease = mine.acquire(LeaseRequest(1, 0), 0)
pid = os.fork()
if pid == 0:
    lease.release()
    try:
        mine.acquire(LeaseRequest(3, 0), 0)
    except LeaseTimeout as exc:
        free = exc.shortage.free_processes
    own = mine.acquire(LeaseRequest(2, 0), 0)
    own.release()
    own.release()
    del lease, mine, own
    gc.collect()
    os._exit(free)
say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
sys.stdin.readline()
lease.release()
say("released")
sys.stdin.readline()
""")
    assert parent.hears() == "2"
    pool = LeasePool(folder, max_processes=3)
    with pytest.raises(LeaseTimeout):
        pool.acquire(LeaseRequest(3, 0), 0)
    parent.tell()
    assert parent.hears() == "released"
    pool.acquire(LeaseRequest(3, 0), 0).release()


# Contention


def test_two_takers_of_three_of_four_slots_never_deadlock(start: StartTaker, journal: Path) -> None:
    takers = [
        start("""
mine = pool(4)
say("ready")
sys.stdin.readline()
for _ in range(200):
    with mine.acquire(LeaseRequest(3, 0), 5):
        note("+3")
        note("-3")
say("done")
""")
        for _ in range(2)
    ]
    assert [taker.hears() for taker in takers] == ["ready"] * 2
    for taker in takers:
        taker.tell()
    assert [taker.hears() for taker in takers] == ["done"] * 2
    assert highest_sum(journal) == 3


def test_takers_of_one_slot_do_not_starve_a_taker_of_all(
    start: StartTaker, folder: Path, journal: Path
) -> None:
    small = [
        start("""
mine, stop = pool(4), Path(sys.argv[2]).with_name("stop")
say("ready")
while not stop.exists():
    with mine.acquire(LeaseRequest(1, 0), 10):
        note("+1")
        time.sleep(0.01)
        note("-1")
say("done")
""")
        for _ in range(6)
    ]
    assert [taker.hears() for taker in small] == ["ready"] * 6
    time.sleep(0.1)
    large = start("""
mine = pool(4)
for _ in range(5):
    with mine.acquire(LeaseRequest(4, 0), 10):
        note("+4")
        time.sleep(0.02)
        note("-4")
say("done")
""")
    said = large.hears()
    journal.with_name("stop").touch()
    assert said == "done"
    assert [taker.hears() for taker in small] == ["done"] * 6
    assert highest_sum(journal) == 4
    during = journal.read_text().split("+4")
    # The small ones went on between the turns of the large one, or this test shows nothing.
    assert all("+1" in between for between in during[1:-1])


def test_a_taker_of_cpu_slots_passes_one_that_waits_for_a_gpu(
    folder: Path, start: StartTaker
) -> None:
    pool = LeasePool(folder, max_processes=2, visible_gpus=("0",))
    with pool.acquire(LeaseRequest(1, 1), 0) as first:
        waiter = start("""
say("waiting")
with pool(2, "0").acquire(LeaseRequest(1, 1), 10) as lease:
    say(lease.gpus)
""")
        assert waiter.hears() == "waiting"
        end_s = time.monotonic() + 0.2
        while time.monotonic() < end_s:
            pool.acquire(LeaseRequest(1, 0), 0).release()
        first.release()
    assert waiter.hears() == "(0,)"


# Time


def test_a_timeout_names_the_wanted_and_free_slots_and_the_folder(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=4, visible_gpus=("6", "7"))
    with pool.acquire(LeaseRequest(3, 1), 0):
        start_s = time.monotonic()
        with pytest.raises(LeaseTimeout) as caught:
            pool.acquire(LeaseRequest(9, 1), 0.2)
        elapsed_s = time.monotonic() - start_s
    shortage = caught.value.shortage
    assert 0.2 <= shortage.waited_s <= elapsed_s < 2
    assert shortage == Shortage(
        request=LeaseRequest(9, 1),
        waiting_for="CPU slots",
        max_processes=4,
        free_processes=1,
        visible_gpus=("6", "7"),
        free_gpus=1,
        waited_s=shortage.waited_s,
        folder=folder,
    )
    text = str(caught.value)
    for fact in (
        "a world of 9 processes after 0.2 s",
        "waiting for CPU slots",
        "Wanted: 4 of the 4 CPU slots, 1 of the 2 GPUs ('6', '7')",
        "Free: 1 CPU slots, 1 GPUs",
        repr(str(folder)),
        "--dcp-max-procs",
    ):
        assert fact in text


def test_a_taker_in_vain_gives_back_all_that_it_collected(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=3, visible_gpus=("0",))
    with pool.acquire(LeaseRequest(1, 0), 0):
        with pytest.raises(LeaseTimeout):
            pool.acquire(LeaseRequest(3, 1), 0.05)
        LeasePool(folder, max_processes=3, visible_gpus=("0",)).acquire(LeaseRequest(2, 1), 0)


def test_an_interrupted_taker_gives_back_all_that_it_collected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    pool = LeasePool(folder, max_processes=3, visible_gpus=("0",))
    with pool.acquire(LeaseRequest(1, 0), 0):
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.acquire(LeaseRequest(3, 1), 1)
        pool.acquire(LeaseRequest(2, 1), 0).release()


def test_a_waiter_goes_on_soon_after_a_release(folder: Path, start: StartTaker) -> None:
    holder = start(HOLD)
    assert holder.hears() == "held"
    pool = LeasePool(folder, max_processes=4, visible_gpus=("0",))
    released_s: list[float] = []

    def release_later() -> None:
        time.sleep(0.2)
        released_s.append(time.monotonic())
        holder.tell()

    thread = threading.Thread(target=release_later)
    thread.start()
    pool.acquire(LeaseRequest(4, 1), WAIT_S).release()
    thread.join(WAIT_S)
    assert time.monotonic() - released_s[0] < 2


def test_gpus_that_cannot_come_are_refused_at_once(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=4, visible_gpus=("3",))
    start_s = time.monotonic()
    with pytest.raises(GpusUnavailable, match=r"expected 2 .* got 1 .*\('3',\)") as caught:
        pool.acquire(LeaseRequest(1, 2), WAIT_S)
    assert time.monotonic() - start_s < 2
    assert (caught.value.count, caught.value.visible) == (2, ("3",))


# Which GPUs


def test_a_gpu_is_the_same_under_different_visible_lists(folder: Path) -> None:
    both = LeasePool(folder, max_processes=8, visible_gpus=("2", "3"))
    last = LeasePool(folder, max_processes=8, visible_gpus=("3",))
    with last.acquire(LeaseRequest(1, 1), 0) as lease:
        assert lease.gpus == (0,)
        with both.acquire(LeaseRequest(1, 1), 0) as other:
            assert other.gpus == (0,)
        with pytest.raises(LeaseTimeout) as caught:
            both.acquire(LeaseRequest(1, 2), 0)
        assert caught.value.shortage.waiting_for == "GPUs"
    with both.acquire(LeaseRequest(1, 2), 0) as lease:
        assert lease.gpus == (0, 1)
    with ExitStack() as held:
        held.enter_context(both.acquire(LeaseRequest(1, 1), 0))
        second = held.enter_context(both.acquire(LeaseRequest(1, 1), 0))
        assert second.gpus == (1,)
        with pytest.raises(LeaseTimeout):
            last.acquire(LeaseRequest(1, 1), 0)


@pytest.mark.parametrize(
    ("listed", "device_count", "keys"),
    [
        (None, 0, ()),
        (None, 3, ("0", "1", "2")),
        ("", 8, ()),
        ("2,3", 8, ("2", "3")),
        ("2,3", 2, ("2", "3")),
        ("0", 0, ()),
        (" 1 , 0", 8, ("1", "0")),
        ("-1", 8, ()),
        ("1,-1,2", 8, ("1",)),
        ("1,,2", 8, ("1",)),
        ("1,none,2", 8, ("1",)),
        ("NoDevFiles", 8, ()),
        ("03,+1", 8, ("3", "1")),
        ("1gpu,2", 8, ("1", "2")),
        ("2,2", 8, ()),
        ("1,-1,1", 8, ("1",)),
        ("GPU-aa,GPU-bb", 8, ("GPU-aa", "GPU-bb")),
        ("GPU-aa, GPU-bb", 8, ("GPU-aa", "GPU-bb")),
        ("GPU-aa,1", 8, ("GPU-aa",)),
        ("1,GPU-aa", 8, ("1",)),
        ("GPU-aa,GPU-aa", 8, ()),
        ("MIG-aa,GPU-bb", 8, ("MIG-aa",)),
        ("MIG-GPU-aa/1/0", 8, ("MIG-GPU-aa/1/0",)),
    ],
)
def test_visible_gpus_are_the_ones_cuda_shows(
    listed: str | None, device_count: int, keys: tuple[str, ...]
) -> None:
    environ = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert visible_gpus(environ, device_count) == keys


@pytest.mark.parametrize(("cpus", "processes"), [(None, 8), (1, 8), (2, 8), (3, 12), (64, 256)])
def test_the_default_budget_grows_with_the_cpus(cpus: int | None, processes: int) -> None:
    assert default_max_processes(cpus) == processes


# The folder


def test_the_default_folder_is_one_per_user_and_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    umask = os.umask(0)
    try:
        LeasePool(max_processes=1).acquire(LeaseRequest(1, 0), 0).release()
    finally:
        os.umask(umask)
    folder = tmp_path / f"pytest-dcp-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "cpu-0.lock").exists()


def test_a_link_in_the_folders_place_is_rejected(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    folder.symlink_to(target)
    with pytest.raises(LeaseFolderRejected, match="is a symbolic link") as caught:
        LeasePool(folder, max_processes=1)
    assert caught.value.folder == folder
    assert list(target.iterdir()) == []


def test_a_folder_that_others_can_enter_is_rejected(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(LeaseFolderRejected, match=r"mode 0777, expected 0700.*TMPDIR"):
        LeasePool(folder, max_processes=1)


def test_all_problems_of_a_folder_are_reported_together() -> None:
    assert folder_problems(stat.S_IFDIR | 0o700, owner=7, uid=7) == ()
    assert folder_problems(stat.S_IFDIR | 0o1777, owner=0, uid=7) == (
        "has mode 1777, expected 0700",
        "belongs to uid 0, expected 7",
    )
    assert folder_problems(stat.S_IFLNK | 0o777, owner=7, uid=7) == ("is a symbolic link",)
    assert folder_problems(stat.S_IFREG | 0o700, owner=7, uid=7) == ("is not a folder",)


def test_a_folder_that_cannot_be_made_is_reported(folder: Path) -> None:
    with pytest.raises(LeaseFolderRejected, match="cannot be made") as caught:
        LeasePool(folder / "deeper", max_processes=1)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_folder_swapped_while_the_pool_lives_is_rejected(folder: Path, tmp_path: Path) -> None:
    pool = LeasePool(folder, max_processes=1)
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(LeaseFolderRejected, match="is a symbolic link"):
        pool.acquire(LeaseRequest(1, 0), 0)


def put_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "precious")


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    "put", [put_link, Path.mkdir, put_socket], ids=["link", "folder", "socket"]
)
@pytest.mark.parametrize("name", ["turnstile.lock", "cpu-0.lock"])
def test_a_path_that_is_no_lock_file_is_refused_by_name_and_left_alone(
    tmp_path: Path, put: Callable[[Path], None], name: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "locks"
    pool = LeasePool(folder, max_processes=1)
    put(folder / name)
    with pytest.raises(LeaseFolderRejected, match=f"no usable lock file '{name}': .*TMPDIR"):
        pool.acquire(LeaseRequest(processes=1, gpus=0), 5.0)
    assert precious.read_text() == "precious"
    if put is Path.mkdir:
        (folder / name).rmdir()
    else:
        (folder / name).unlink()
    pool.acquire(LeaseRequest(processes=1, gpus=0), 5.0).release()


def test_a_full_disk_is_reported_with_the_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(self: FileLock, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pool = LeasePool(tmp_path / "locks", max_processes=1)
    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(LeaseFolderRejected, match=r"'turnstile.lock': No space left on device"):
        pool.acquire(LeaseRequest(processes=1, gpus=0), 5.0)


def test_a_folder_removed_while_the_pool_lives_is_made_again(folder: Path) -> None:
    pool = LeasePool(folder, max_processes=1)
    folder.rmdir()
    pool.acquire(LeaseRequest(1, 0), 0).release()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_relative_folder_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pool = LeasePool(Path("locks"), max_processes=1)
    monkeypatch.chdir("/")
    with pool.acquire(LeaseRequest(1, 0), 0), pytest.raises(LeaseTimeout):
        LeasePool(tmp_path / "locks", max_processes=1).acquire(LeaseRequest(1, 0), 0)


# Values


@pytest.mark.parametrize(("processes", "gpus"), [(0, 0), (-1, 0), (1, -1)])
def test_a_request_out_of_range_is_refused(processes: int, gpus: int) -> None:
    with pytest.raises(ValueError, match=f"processes={processes}, gpus={gpus}"):
        LeaseRequest(processes, gpus)


def test_a_pool_of_nothing_or_with_a_gpu_twice_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_processes >= 1, got 0"):
        LeasePool(folder, max_processes=0)
    with pytest.raises(ValueError, match="each GPU once"):
        LeasePool(folder, max_processes=1, visible_gpus=("0", "0"))


@pytest.mark.parametrize(
    "error",
    [
        LeaseTimeout(Shortage(LeaseRequest(4, 1), "GPUs", 8, 3, ("0",), 0, 1.5, Path("/locks"))),
        GpusUnavailable(2, ("3",)),
        LeaseFolderRejected(Path("/locks"), ("is a symbolic link",)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert vars(error)

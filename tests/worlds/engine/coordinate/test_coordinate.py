"""Teams in worlds: results of steps, and failures of every sort that reach every rank.

When a rank has to die or stop, a fork of it takes its part and dies: the rank itself lives on, so
that every rank can run assertions.
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import stat
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from pytest_dcp._engine.coordinate import (
    OperationCall,
    OutOfStepError,
    PeerAborted,
    RankEndedError,
    RankLeftError,
    RankSilentError,
    RemoteError,
    StepError,
    Team,
    idle_connections,
    rendezvous,
    team_of,
)
from pytest_dcp._engine.coordinate.descriptors import FEW
from pytest_dcp._engine.coordinate.peer_listener import BACKLOG, peer_listener

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld

SIZE = 3
PROMPT_S = 8.0
"""For what happens at once, on a machine with other work; the groups' timeouts are far longer."""
SHORT_S = 0.6
"""A timeout that is waited for."""

pytestmark = pytest.mark.world_size(SIZE, timeout=60)

each_coordinator = pytest.mark.parametrize("coordinator", range(2))


@pytest.fixture
def group() -> dist.ProcessGroup:
    """A group that no other test has met in."""
    return new_group(60)


def new_group(timeout_s: float, ranks: list[int] | None = None) -> dist.ProcessGroup:
    group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def team(group: dist.ProcessGroup | None, coordinator: int = 0, operation: str = "save") -> Team:
    return team_of(group, OperationCall(operation), use_dist=True, coordinator_rank=coordinator)


def raiser(error: BaseException) -> Callable[[], object]:
    def local() -> object:
        raise error

    return local


def nothing() -> None:
    pass


def facts(error: CheckpointException) -> list[tuple[int, str, str]]:
    return [(r, type(e).__name__, str(e)) for r, (e, _) in sorted(error.failures.items())]


@contextmanager
def fails(step: str, within_s: float = PROMPT_S) -> Iterator[list[StepError]]:
    """The block raises the error of a step, and in time."""
    seen: list[StepError] = []
    began_s = time.monotonic()
    with pytest.raises(CheckpointException) as caught:
        yield seen
    assert time.monotonic() - began_s < within_s
    assert isinstance(caught.value, StepError)
    assert caught.value.step == step
    seen.append(caught.value)


@contextmanager
def fork(part: Callable[[], object]) -> Iterator[int]:
    """A fork of this rank runs `part` while the block runs, and is dead after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads: gloo's, unused there
        child = os.fork()
    if child == 0:
        try:
            part()
        except BaseException:  # noqa: BLE001 - whatever it was, this process ends here
            traceback.print_exc()
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Results.


@each_coordinator
def test_every_step_gives_each_rank_its_result(coordinator: int, rank: int) -> None:
    with team(None, coordinator) as t:
        assert (t.rank, t.size, t.is_coordinator) == (rank, SIZE, rank == coordinator)
        scattered = t.reduce_scatter("a", lambda: rank, lambda all_: [10 * r + 1 for r in all_])
        assert scattered == 10 * rank + 1
        assert t.all_reduce("b", lambda: [rank], lambda all_: [*all_, "all"]) == [
            [0],
            [1],
            [2],
            "all",
        ]
        assert t.all_gather("c", lambda: {"rank": rank}) == [{"rank": r} for r in range(SIZE)]
        assert t.agree("d", lambda: lambda: rank)() == rank
        assert t.broadcast("e", lambda: f"from {rank}") == f"from {coordinator}"
        t.barrier("f")


def test_local_work_of_a_broadcast_runs_on_the_coordinator_alone(rank: int) -> None:
    ran: list[int] = []
    with team(None, 1) as t:
        t.broadcast("commit", lambda: ran.append(rank))
    assert ran == ([1] if rank == 1 else [])


@pytest.mark.parametrize("elements", [0, 1, 1000, 3_000_000])
def test_arrays_arrive_whole_aligned_and_writable(elements: int, rank: int) -> None:
    mine = np.arange(elements, dtype=np.float64) + rank
    with team(None) as t:
        gathered = t.all_gather("gather", lambda: ("x", mine, np.asfortranarray(np.eye(3))))
        mean = t.all_reduce("mean", lambda: mine, lambda arrays: np.mean(arrays, axis=0))
    for peer, (_, array, eye) in enumerate(gathered):
        assert np.array_equal(array, np.arange(elements) + peer)
        assert array.flags.aligned
        assert array.flags.writeable
        assert np.array_equal(eye, np.eye(3))
    assert np.allclose(mean, np.arange(elements) + 1)


def test_a_barrier_holds_all_until_the_last_has_come(world: RankWorld, rank: int) -> None:
    if rank == 2:
        time.sleep(0.3)
    came_s = time.monotonic()
    with team(None) as t:
        t.barrier("meet")
    went_s = time.monotonic()
    assert went_s >= max(world.gather(came_s))


def test_a_subgroup_counts_its_own_ranks(rank: int) -> None:
    group = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ValueError, match="not in the process group"):
            team(group)
        return
    with team(group, coordinator=1) as t:
        assert (t.rank, t.is_coordinator) == (rank - 1, rank == 2)
        assert t.all_gather("global ranks", lambda: rank) == [1, 2]
        with fails("write") as seen:
            t.agree("write", raiser(ValueError("x")) if rank == 1 else nothing)
    assert list(seen[0].failures) == [0]


def test_a_coordinator_outside_of_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 2; got 3"):
        team(None, coordinator=SIZE)


def test_steps_leave_the_order_of_collectives_alone(rank: int) -> None:
    done: list[list[int]] = []

    def save() -> None:
        with team(None) as t:
            done.extend(t.all_gather(f"step {i}", lambda: rank) for i in range(50))

    thread = threading.Thread(target=save)
    thread.start()
    gathered: list[Any] = [None] * SIZE
    for _ in range(20):
        dist.all_gather_object(gathered, rank)
        assert gathered == [0, 1, 2]
    thread.join()
    assert done == [[0, 1, 2]] * 50


def test_a_save_and_a_load_may_run_at_once(rank: int) -> None:
    saved: list[list[str]] = []

    def save() -> None:
        with team(None, operation="save step_1") as t:
            saved.extend(t.all_gather("s", lambda: f"s{rank}") for _ in range(50))

    thread = threading.Thread(target=save)
    thread.start()
    for _ in range(5):
        with team(None, operation="load step_0") as t:
            for _ in range(10):
                assert t.all_gather("l", lambda: f"l{rank}") == ["l0", "l1", "l2"]
    thread.join()
    assert saved == [["s0", "s1", "s2"]] * 50


# Exceptions.


@each_coordinator
@pytest.mark.parametrize("bad", [[0], [1], [2], [1, 2], [0, 1, 2]])
def test_all_ranks_raise_the_failures_of_all(
    world: RankWorld, rank: int, bad: list[int], coordinator: int
) -> None:
    mine = ValueError(f"boom {rank}")
    local = raiser(mine) if rank in bad else nothing
    with team(None, coordinator) as t:
        steps: list[Callable[[], object]] = [
            lambda: t.agree("write", local),
            lambda: t.all_gather("write", local),
            lambda: t.all_reduce("write", local, list),
            lambda: t.reduce_scatter("write", local, list),
        ]
        for step in steps:
            with fails("write") as seen:
                step()
            check_failures(world, rank, seen[0], bad, mine)
            assert t.all_gather("after", lambda: rank) == [0, 1, 2]
    with team(None, coordinator) as t:
        assert t.all_gather("again", lambda: rank) == [0, 1, 2]


def check_failures(
    world: RankWorld, rank: int, error: StepError, bad: list[int], mine: ValueError
) -> None:
    assert facts(error) == [(r, "ValueError", f"boom {r}") for r in bad]
    assert len(set(world.gather(str(error)))) == 1
    assert error.__cause__ is (mine if rank in bad else None)
    assert {frame.name for frame in error.failures[bad[0]][1]} == {"local"}


@each_coordinator
@pytest.mark.parametrize("method", ["all_reduce", "reduce_scatter"])
def test_a_failing_reduction_is_the_coordinators(method: str, coordinator: int) -> None:
    def reduce(_: list[None]) -> list[None]:
        raise OSError(28, "No space left on device")

    with team(None, coordinator) as t, fails("plan") as seen:
        getattr(t, method)("plan", nothing, reduce)
    assert facts(seen[0]) == [(coordinator, "OSError", "[Errno 28] No space left on device")]


def test_a_scatter_of_too_few_results_fails_on_all() -> None:
    with team(None) as t, fails("plan") as seen:
        t.reduce_scatter("plan", nothing, lambda _: [1, 2])
    assert facts(seen[0]) == [
        (0, "ValueError", "step 'plan': expected one result per rank (3), got 2")
    ]


def test_a_failing_broadcast_reaches_all() -> None:
    with team(None, 2) as t, fails("commit") as seen:
        t.broadcast("commit", raiser(KeyError("w")))
    assert facts(seen[0]) == [(2, "KeyError", "'w'")]


def test_a_value_that_cannot_be_sent_fails_on_all(rank: int) -> None:
    with team(None) as t, fails("plan") as seen:
        t.all_gather("plan", lambda: threading.Lock() if rank == 1 else rank)
    assert list(seen[0].failures) == [1]
    assert "a _thread.lock cannot be sent to another rank" in str(seen[0])


class Clingy(Exception):
    """Is no plain data: it holds a lock."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Changeling(Exception):
    """Its pickle builds something else."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return ValueError, ("another",)


class Brittle(Exception):
    """Its pickle cannot be loaded: it does not keep its arguments."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize("error", [Changeling("held"), Brittle(1, 2)])
def test_an_exception_that_pickle_would_not_carry_arrives_as_itself(
    world: RankWorld, rank: int, error: Exception
) -> None:
    with team(None) as t, fails("write") as seen:
        t.agree("write", raiser(error) if rank == 1 else nothing)
    remote = seen[0].failures[1][0]
    assert (type(remote), remote.args, str(remote)) == (type(error), error.args, str(error))
    assert str(error) in str(seen[0])
    assert isinstance(seen[0], type(error))
    assert len(set(world.gather(str(seen[0])))) == 1


@pytest.mark.parametrize("error", [Clingy("held")])
def test_an_exception_that_is_no_plain_data_travels_as_text(
    world: RankWorld, rank: int, error: Exception
) -> None:
    with team(None) as t, fails("write") as seen:
        t.agree("write", raiser(error) if rank == 1 else nothing)
    remote = seen[0].failures[1][0]
    assert isinstance(remote, RemoteError)
    assert remote.type_name == f"{__name__}.{type(error).__name__}"
    assert str(error) in str(seen[0])
    assert len(set(world.gather(str(pickle.loads(pickle.dumps(seen[0])))))) == 1


@each_coordinator
@pytest.mark.parametrize("stop", [KeyboardInterrupt("ctrl-c"), SystemExit(3)])
def test_an_interrupt_stays_itself_and_reaches_the_peers(
    rank: int, stop: BaseException, coordinator: int
) -> None:
    with team(None, coordinator) as t:
        if rank == 1:
            with pytest.raises(type(stop)) as caught:
                t.agree("write", raiser(stop))
            assert caught.value is stop
        else:
            with fails("write") as seen:
                t.agree("write", nothing)
            assert facts(seen[0]) == [(1, type(stop).__name__, str(stop))]
    with team(None, coordinator) as t:
        assert t.all_gather("again", lambda: rank) == [0, 1, 2]


@each_coordinator
def test_an_interrupt_while_waiting_reaches_the_peers(rank: int, coordinator: int) -> None:
    with team(None, coordinator) as t:
        if rank == 1:
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                t.barrier("meet")
            timer.join()
        else:
            time.sleep(0.6 if rank == 2 else 0)
            with fails("meet") as seen:
                t.barrier("meet")
            assert facts(seen[0]) == [(1, "KeyboardInterrupt", "")]


def test_a_rank_that_comes_when_the_coordinator_has_left_learns_why(
    world: RankWorld, rank: int
) -> None:
    with team(None) as t:
        if rank == 0:
            with pytest.raises(KeyboardInterrupt):
                t.agree("write", raiser(KeyboardInterrupt()))
        if rank == 2:
            world.barrier()
        if rank != 0:
            with fails("write") as seen:
                t.agree("write", nothing)
            assert facts(seen[0]) == [(0, "KeyboardInterrupt", "")]
    if rank != 2:
        world.barrier()
    world.barrier()
    with team(None) as t:
        assert t.all_gather("again", lambda: rank) == [0, 1, 2]


@each_coordinator
def test_an_exception_between_steps_reaches_the_peers(rank: int, coordinator: int) -> None:
    def interrupted() -> None:
        with team(None, coordinator) as t:
            t.barrier("first")
            raise LookupError("between")

    if rank == 1:
        with pytest.raises(LookupError, match="between"):
            interrupted()
    else:
        with team(None, coordinator) as t:
            t.barrier("first")
            with fails("second") as seen:
                t.barrier("second")
        assert facts(seen[0]) == [(1, "LookupError", "between")]


# Ranks that die, hang or go astray.


@each_coordinator
@pytest.mark.parametrize("when", ["in its work", "while it waits", "between steps"])
def test_a_rank_that_dies_is_named_to_the_survivors(
    world: RankWorld, group: dist.ProcessGroup, rank: int, coordinator: int, when: str
) -> None:
    def part() -> None:
        with team(group, coordinator) as t:
            t.barrier("first")
            if when == "between steps":
                die()
            if when == "while it waits":
                threading.Timer(0.2, die).start()
            t.agree("write", die if when == "in its work" else nothing)

    def survive() -> list[StepError]:
        with team(group, coordinator) as t:
            t.barrier("first")
            with fails("write") as seen:
                t.agree("write", (lambda: time.sleep(0.4)) if rank == 2 else nothing)
            with fails("more"):
                t.barrier("more")
        return seen

    if rank == 1:
        with fork(part):
            world.gather("")
    else:
        (error,) = survive()
        ((failed, (cause, _)),) = error.failures.items()
        assert failed == 1
        assert isinstance(cause, RankEndedError)
        assert "rank 1" in str(cause)
        assert "'write' of save" in str(cause)
        world.gather("")


def test_a_rank_that_died_between_operations_is_missed_at_once(
    world: RankWorld, group: dist.ProcessGroup, rank: int
) -> None:
    def part() -> None:
        with team(group) as t:
            t.barrier("meet")
        die()

    if rank == 2:
        with fork(part):
            world.gather("")
    else:
        with team(group) as t:
            t.barrier("meet")
        with team(group) as t, fails("meet") as seen:
            t.barrier("meet")
        assert isinstance(seen[0].failures[2][0], RankEndedError)
        world.gather("")


@each_coordinator
def test_busy_ranks_learn_of_a_failure_from_check(
    world: RankWorld, rank: int, coordinator: int
) -> None:
    def busy() -> None:
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s:
            time.sleep(0.01)
            t.check()

    with team(None, coordinator) as t:
        t.barrier("meet")
        with fails("write") as seen:
            t.agree("write", raiser(ValueError("disk")) if rank == 1 else busy)
        t.barrier("after")
        t.check()
    assert facts(seen[0]) == [(1, "ValueError", "disk")]
    if rank == 1:
        assert isinstance(seen[0].__cause__, ValueError)
    else:  # nothing of the rank's own failed, and a traceback shows no class of ours
        assert seen[0].__cause__ is None
        assert seen[0].__suppress_context__
        assert isinstance(seen[0].__context__, PeerAborted)


@each_coordinator
def test_busy_ranks_learn_of_a_death_from_check(
    world: RankWorld, group: dist.ProcessGroup, rank: int, coordinator: int
) -> None:
    def busy(t: Team) -> None:
        for _ in range(6000):
            time.sleep(0.01)
            t.check()

    def part() -> None:
        with team(group, coordinator) as t:
            t.agree("write", die)

    if rank == 1:
        with fork(part):
            world.gather("")
    else:
        with team(group, coordinator) as t, fails("write") as seen:
            t.agree("write", lambda: busy(t))
        assert isinstance(seen[0].failures[1][0], RankEndedError)
        world.gather("")


@each_coordinator
@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_silent_rank_is_named_when_the_timeout_is_over(
    world: RankWorld, rank: int, silent: int, coordinator: int
) -> None:
    group = new_group(SHORT_S)

    def part() -> None:
        with team(group, coordinator) as t:
            t.barrier("first")
            t.agree("write", lambda: os.kill(os.getpid(), signal.SIGSTOP))

    if rank == silent:
        with fork(part):
            world.gather("")
    else:
        with team(group, coordinator) as t:
            t.barrier("first")
            with fails("write") as seen:
                t.agree("write", nothing)
        ((failed, (cause, _)),) = seen[0].failures.items()
        assert failed == silent
        assert isinstance(cause, RankSilentError)
        assert f"rank {silent}" in str(cause)
        assert "silent for 0.6 s in step 'write' of save" in str(cause)
        world.gather("")


@pytest.mark.parametrize("hangs", ["in its work", "while it combines"])
def test_a_coordinator_that_comes_back_has_the_verdict_of_all(
    world: RankWorld, rank: int, hangs: str
) -> None:
    group = new_group(1.0)

    def slow(*_: object) -> None:
        if rank == 0:
            time.sleep(4)

    def other_failure() -> None:
        if rank == 2 and hangs == "in its work":
            raise ValueError("lost in the confusion")

    with team(group) as t:
        t.barrier("first")
        with fails("write") as seen:
            if hangs == "in its work":
                t.agree("write", slow if rank == 0 else other_failure)
            else:
                t.all_reduce("write", nothing, slow)
    ((failed, (cause, _)),) = seen[0].failures.items()
    assert failed == 0
    assert isinstance(cause, RankSilentError)
    assert len(set(world.gather(str(seen[0])))) == 1
    with team(group) as t:
        assert t.all_gather("again", lambda: rank) == [0, 1, 2]


def test_a_rank_that_never_comes_is_named(world: RankWorld, rank: int) -> None:
    group = new_group(SHORT_S)
    for coordinator in (0, 2):
        if rank != 2:
            with team(group, coordinator) as t, fails("meet") as seen:
                t.barrier("meet")
            assert isinstance(seen[0].failures[2][0], RankSilentError)
        world.barrier()


def test_a_coordinator_with_a_full_queue_is_waited_for(
    world: RankWorld, group: dist.ProcessGroup, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One peer fits into its queue; the connections of the other are not answered."""
    monkeypatch.setattr(idle_connections, "CONNECT_S", 0.2)
    if rank == 0:
        rendezvous.publish(group, 0)
        peer_listener()._listener.listen(0)
    world.barrier()
    try:
        if rank == 0:
            time.sleep(2.0)
        with team(group) as t:
            assert t.all_gather("first", lambda: rank) == [0, 1, 2]
    finally:
        if rank == 0:
            peer_listener()._listener.listen(BACKLOG)


def test_a_coordinator_that_may_open_too_few_descriptors_says_so_to_all(
    group: dist.ProcessGroup, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank == 0:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (FEW, FEW))
        monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with team(group) as t, fails("meet") as seen:
        t.barrier("meet")
    assert list(seen[0].failures) == [0]
    assert f"may have only {FEW} descriptors open: raise the hard limit" in str(seen[0])
    assert "`ulimit -n " in str(seen[0])
    monkeypatch.undo()
    with team(group) as t:
        assert t.all_gather("again", lambda: rank) == [0, 1, 2]


@each_coordinator
def test_a_rank_at_work_that_checks_is_not_silent(rank: int, coordinator: int) -> None:
    timeout_s = 1.0
    group = new_group(timeout_s)

    def slow() -> None:
        for _ in range(100):
            time.sleep(timeout_s / 50)
            t.check()

    with team(group, coordinator) as t:
        t.barrier("meet")
        t.agree("write", slow if rank == 1 else nothing)
        assert t.all_gather("after", lambda: rank) == [0, 1, 2]


def test_different_operations_fail_on_all_and_name_both(rank: int) -> None:
    with team(None, operation="load" if rank == 2 else "save") as t, fails("plan") as seen:
        t.agree("plan", nothing)
    ((failed, (cause, _)),) = seen[0].failures.items()
    assert failed == 2
    assert isinstance(cause, OutOfStepError)
    assert str(cause) == "rank 2 runs 'load' where the coordinator runs 'save'"


@each_coordinator
def test_different_steps_fail_on_all_and_name_both(rank: int, coordinator: int) -> None:
    with team(None, coordinator) as t:
        t.barrier("meet")
        with fails("read" if rank == 1 else "write") as seen:
            step = t.all_gather if rank == 1 else t.agree
            step("read" if rank == 1 else "write", nothing)
    for words in ("'read' (all_gather, number 2)", "'write' (agree, number 2)"):
        assert words in str(seen[0])


@each_coordinator
def test_a_rank_that_closes_early_is_named(rank: int, coordinator: int) -> None:
    with team(None, coordinator) as t:
        t.barrier("meet")
        if rank == 1:
            t.close()
        else:
            with fails("write") as seen:
                t.agree("write", nothing)
            assert isinstance(seen[0].failures[1][0], RankLeftError)


# After a failed operation.


@each_coordinator
def test_the_group_is_of_use_after_a_rank_was_silent(
    world: RankWorld, rank: int, coordinator: int
) -> None:
    group = new_group(SHORT_S)
    if rank != 2:
        with team(group, coordinator) as t, fails("meet"):
            t.barrier("meet")
    world.barrier()
    if rank == 2:  # too late for the first: no rank mixes the two operations
        with team(group, coordinator) as t, pytest.raises(StepError):
            t.barrier("meet")
    else:
        with team(group, coordinator) as t, pytest.raises(StepError):
            t.barrier("meet")
    for _ in range(2):
        with team(group, coordinator) as t:
            assert t.all_gather("again", lambda: rank) == [0, 1, 2]
    gathered: list[Any] = [None] * SIZE
    dist.all_gather_object(gathered, rank, group=group)
    assert gathered == [0, 1, 2]


def test_operations_leave_no_thread_and_no_descriptor(rank: int) -> None:
    def save() -> None:
        with team(None) as t, pytest.raises(StepError):
            t.agree("write", raiser(ValueError()) if rank == 1 else nothing)

    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    save()
    save()
    before = held()
    for _ in range(20):
        save()
    assert held() == before


def sockets() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself
            found += stat.S_ISSOCK(os.fstat(int(fd)).st_mode)
    return found


def test_one_connection_for_each_rank_serves_all_operations(
    world: RankWorld, group: dist.ProcessGroup, rank: int
) -> None:
    if rank == 0:
        peer_listener()
    before = sockets()
    for _ in range(3):
        with team(group) as t:
            t.barrier("meet")
            assert sockets() - before == (SIZE - 1 if rank == 0 else 1)
            world.barrier()  # some are done later than others
    thread = threading.Thread(target=lambda: steps_of("save", group))
    thread.start()
    steps_of("load", group)
    thread.join()
    steps_of("save", group)
    assert sockets() - before == (SIZE - 1 if rank == 0 else 1)


def steps_of(operation: str, group: dist.ProcessGroup) -> None:
    with team(group, operation=operation) as t:
        for n in range(20):
            t.barrier(f"step {n}")


def test_a_group_that_is_gone_holds_no_connection() -> None:
    def use_a_group() -> int:
        group = new_group(60)
        steps_of("save", group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        return sockets()

    first = use_a_group()
    assert [use_a_group() for _ in range(3)] == [first] * 3


def test_a_group_can_be_destroyed_and_made_again_after_a_failure(rank: int) -> None:
    for _ in range(2):
        group = new_group(60)
        with team(group) as t, fails("write"):
            t.agree("write", raiser(ValueError()) if rank == 1 else nothing)
        dist.destroy_process_group(group)

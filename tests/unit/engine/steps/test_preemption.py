"""A signal to stop, in one process: noted, passed on, waited for no longer than the grace."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.steps.run_lock import RunLock
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp.checkpoint import CheckpointManager, SaveAbandonedError
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType
from pytest_dcp.faults import FaultyStorage, Hang, NoSpace, Slow
from support.forks import forked
from support.runs import blank, save_steps, state_of, whole_steps

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of the session, put back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def manager_of(root: Path, on_signal: Any = signal.SIGTERM, **keywords: Any) -> CheckpointManager:
    return CheckpointManager(root, no_dist=True, on_signal=on_signal, **keywords)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def large_state(step: int) -> dict[str, Any]:
    """Of many blocks of bytes."""
    return {f"w{n}": torch.full((50_000,), float(step)) for n in range(60)}


# The signal.


def test_a_signal_is_noted_and_the_loop_ends_with_a_last_save(root: Path) -> None:
    with manager_of(root) as manager:
        for step in range(1, 10):
            if step == 4:
                send()
            stopping = manager.should_stop()
            assert manager.is_preempted is stopping is (step == 4)
            if stopping or step % 2 == 0:
                manager.async_save(step, state_of(step))
            if stopping:
                break
    assert whole_steps(save_steps(root)) == [2, 4]


def test_several_signals_may_ask_for_the_stop(root: Path) -> None:
    with manager_of(root, (signal.SIGUSR1, signal.SIGTERM)) as manager:
        assert not manager.should_stop()
        send(signal.SIGUSR1)
        assert manager.should_stop()


def test_a_second_signal_does_not_prolong_the_grace(root: Path) -> None:
    with manager_of(root, grace_s=1000.0) as manager:
        send()
        stop = manager._run.stop
        first = stop.seconds_left
        time.sleep(0.05)
        send()
        assert stop.seconds_left < first - 0.04


def test_without_on_signal_handlers_are_left_alone(root: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with manager_of(root, None) as manager:
        assert signal.getsignal(signal.SIGTERM) is before
        assert not manager.should_stop()


def test_the_earlier_handler_is_called_and_put_back(root: Path) -> None:
    calls = []

    def earlier(number: int, frame: Any) -> None:
        calls.append(number)

    signal.signal(signal.SIGTERM, earlier)
    with manager_of(root) as manager:
        send()
        assert manager.should_stop()
    assert calls == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_two_managers_both_see_the_signal(root: Path) -> None:
    with manager_of(root) as one, manager_of(root / "other") as other:
        send()
        assert one.should_stop()
        assert other.should_stop()


def test_a_handler_that_came_later_stays_and_may_still_call_ours(root: Path) -> None:
    manager = manager_of(root)
    ours: Any = signal.getsignal(signal.SIGTERM)

    def later(number: int, frame: Any) -> None:
        ours(number, frame)

    signal.signal(signal.SIGTERM, later)
    manager.close()
    assert signal.getsignal(signal.SIGTERM) is later
    send()
    assert not manager.is_preempted


@pytest.mark.parametrize("number", [signal.SIGKILL, 0, 10_000])
def test_a_signal_that_cannot_be_handled_is_refused(root: Path, number: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="on_signal= takes signals that can be handled"):
        manager_of(root, [signal.SIGTERM, number])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("grace_s", "kind"), [(-1, ValueError), (float("nan"), ValueError), ("9", TypeError)]
)
def test_a_wrong_grace_is_refused(root: Path, grace_s: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="grace_s= takes seconds"):
        manager_of(root, grace_s=grace_s)


def test_another_thread_cannot_wait_for_signals(root: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="needs the main thread"):
        pool.submit(manager_of, root).result()


def test_a_child_process_ends_by_the_signal_as_without_a_manager(root: Path) -> None:
    """As a worker of a data loader must."""
    with manager_of(root) as manager:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, b"!")  # a signal during the fork itself is lost by Python
            time.sleep(LIMIT_S)
            os._exit(0)
        os.read(reading, 1)
        os.close(reading)
        os.close(writing)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not manager.should_stop()


def test_a_pickled_manager_waits_for_no_signal(root: Path) -> None:
    def again(_: Any) -> bool:
        manager = pickle.loads(pickle.dumps(manager_of(root)))
        send()
        return bool(manager.is_preempted)

    assert forked(again) is False


# The grace.


@pytest.mark.parametrize("kind", AsyncCheckpointerType)
def test_a_running_save_ends_within_the_grace(root: Path, kind: AsyncCheckpointerType) -> None:
    with manager_of(root, grace_s=LIMIT_S) as manager:
        manager.async_save(1, state_of(1), async_checkpointer_type=kind)
        send()
        assert manager.should_stop()
    assert whole_steps(save_steps(root)) == [1]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_on_slow_storage_is_given_up_and_leaves_the_step_before(
    checkpoint_dir: Path, faulty_storage: FaultyStorage, in_background: bool
) -> None:
    root = checkpoint_dir / "run"
    manager = manager_of(root, grace_s=0.5)
    manager.save(1, state_of(1))
    faulty_storage.inject(Slow(0.15), on="write", path="*step-00000002/*.distcp", sticky=True)
    given_up = pytest.raises(SaveAbandonedError, match=r"save of step 2 was given up.* 0.5 s")
    if in_background:
        manager.async_save(2, large_state(2))
        send()
        with given_up:
            manager.wait()
    else:
        send()
        with given_up:
            manager.save(2, large_state(2))
    manager.close()
    assert_only_the_first_step_remains(root)


def assert_only_the_first_step_remains(root: Path) -> None:
    """Of the second there are its notes, and perhaps a file that is still being removed."""
    until_s = time.monotonic() + LIMIT_S
    while list((root / "step-00000002").glob("*.distcp*")) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert [path.name for path in (root / "step-00000002").iterdir()] == ["step.json"]
    again = save_steps(root)
    with pytest.warns(UserWarning, match="step 2 in .* is not whole"):
        loaded = again.load_latest(blank())
    assert loaded is not None
    assert loaded.number == 1
    again.save(2, state_of(2))
    assert whole_steps(again) == [1, 2]


def test_a_wait_for_storage_that_hangs_ends_with_the_grace(
    checkpoint_dir: Path, faulty_storage: FaultyStorage
) -> None:
    root = checkpoint_dir / "run"
    manager = manager_of(root, grace_s=0.3)
    manager.save(1, state_of(1))
    hung = faulty_storage.inject(Hang(), on="write", path="*step-00000002/*.distcp")
    manager.async_save(2, state_of(2))
    hung.wait_until_fired()
    send()
    with pytest.raises(SaveAbandonedError, match="save of step 2 was given up"):
        manager.close()
    with pytest.raises(dcp.CheckpointError, match="another run saves in"):
        save_steps(root, 2)  # the thread may yet write
    hung.release()  # the thread goes on, sees that the time is over, and removes its file
    wait_for_lock(root)
    assert_only_the_first_step_remains(root)


def wait_for_lock(root: Path) -> None:
    lock = RunLock()
    until_s = time.monotonic() + LIMIT_S
    while True:
        try:
            lock.take(RunPlace(root).open_folders())
        except dcp.CheckpointError:
            assert time.monotonic() < until_s
            time.sleep(0.02)
        else:
            return lock.release()


def test_a_background_process_is_given_up_too(root: Path) -> None:
    manager = manager_of(root, grace_s=0.2)
    process = AsyncCheckpointerType.PROCESS
    manager.async_save(1, state_of(1), async_checkpointer_type=process)
    manager.wait()
    manager.async_save(
        2,
        large_state(2),
        async_checkpointer_type=process,
        storage_writer=SlowWriter(root / "step-00000002"),
    )
    send()
    with pytest.raises(SaveAbandonedError, match="save of step 2 was given up"):
        manager.close()
    assert whole_steps(save_steps(root)) == [1]
    (root / "release").touch()  # the process ends its work, and is free for the next test
    wait_for_lock(root)


class SlowWriter(dcp.FileSystemWriter):
    """Writes its data once there is a file `release` beside its folder."""

    def write_data(self, *arguments: Any, **keywords: Any) -> Any:
        until_s = time.monotonic() + LIMIT_S
        while not (Path(self.path).parent / "release").exists() and time.monotonic() < until_s:
            time.sleep(0.05)
        return super().write_data(*arguments, **keywords)


# How far a save is.


def test_the_running_save_is_seen_from_plan_to_end(
    checkpoint_dir: Path, faulty_storage: FaultyStorage
) -> None:
    root = checkpoint_dir / "run"
    manager = manager_of(root, None)
    assert manager.running_save is None
    hung = faulty_storage.inject(Hang(), on="write", path="*.distcp", nth=2)
    manager.async_save(7, large_state(7))
    hung.wait_until_fired()
    status = manager.running_save
    assert status is not None
    assert (status.step, status.phase, status.error) == (7, "write", None)
    assert 0 <= status.done_bytes < status.total_bytes
    assert status.total_bytes == 60 * 50_000 * 4
    hung.release()
    ended = wait_for_phase(manager, "ended")
    assert ended.done_bytes == ended.total_bytes == status.total_bytes
    elapsed_s = ended.elapsed_s
    time.sleep(0.02)
    assert manager.running_save is not None
    assert manager.running_save.elapsed_s == elapsed_s
    manager.wait()
    assert manager.running_save is None


def wait_for_phase(manager: CheckpointManager, phase: str) -> dcp.SaveStatus:
    until_s = time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        status = manager.running_save
        assert status is not None
        if status.phase == phase:
            return status
        time.sleep(0.01)
    raise AssertionError(f"the save is not in phase {phase}: {status}")


def test_a_failed_save_shows_its_error_until_the_next_call_raises_it(
    checkpoint_dir: Path, faulty_storage: FaultyStorage
) -> None:
    manager = manager_of(checkpoint_dir / "run", None)
    faulty_storage.inject(NoSpace(), on="write", path="*.distcp")
    manager.async_save(3, state_of(3))
    failed = wait_for_phase(manager, "failed")
    assert failed.step == 3
    assert "No space left" in str(failed.error)
    with pytest.raises(dcp.CheckpointException, match=r"(?s)save of step 3 .*No space left"):
        manager.save(4, state_of(4))
    assert manager.running_save is None
    manager.save(4, state_of(4))


def test_a_save_in_the_foreground_is_seen_by_another_thread(root: Path) -> None:
    manager = manager_of(root, None)
    seen = []

    def look(_: dcp.Progress) -> None:
        thread = threading.Thread(target=lambda: seen.append(manager.running_save))
        thread.start()
        thread.join()

    manager.save(1, state_of(1), progress=look)
    assert {status.step for status in seen if status is not None} == {1}
    assert {status.phase for status in seen if status is not None} <= {"write", "commit"}
    assert manager.running_save is None


def test_the_progress_of_a_background_process_arrives(root: Path) -> None:
    manager = manager_of(root, None)
    states: list[dcp.Progress] = []
    manager.async_save(
        1,
        large_state(1),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        storage_writer=WaitingWriter(root / "step-00000001"),
        progress=states.append,
    )
    manager.wait()
    assert states
    assert states[-1].total_bytes == 60 * 50_000 * 4


class WaitingWriter(dcp.FileSystemWriter):
    """Waits after its data for some signs of life."""

    def write_data(self, *arguments: Any, **keywords: Any) -> Any:
        written = super().write_data(*arguments, **keywords)
        time.sleep(1.0)
        return written

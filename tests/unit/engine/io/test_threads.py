import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.io.threads import StopFlag, Stopped, run_all
from support.tilings import fewer


def running() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dcp-io")]


@given(st.lists(st.integers(), max_size=6), st.integers(0, 4))
@fewer(4)
def test_results_come_in_the_order_of_the_jobs(values, threads):
    jobs = [lambda stop, value=value: (stop.check(), value)[1] for value in values]
    assert run_all(jobs, threads) == values
    assert running() == []


@pytest.mark.parametrize(("jobs", "threads"), [(1, 4), (4, 1), (4, 0)])
def test_one_job_or_one_thread_runs_in_the_callers(jobs, threads):
    assert set(run_all([lambda stop: threading.get_ident()] * jobs, threads)) == {
        threading.get_ident()
    }


def test_no_more_threads_than_asked_for_run_at_a_time():
    lock, at_once, most = threading.Lock(), [0], [0]

    def job(stop: StopFlag) -> None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.002)
        with lock:
            at_once[0] -= 1

    run_all([job] * 9, 3)
    assert 1 < most[0] <= 3


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt("first")])
def test_the_first_failure_in_time_wins_and_every_thread_is_joined(error):
    failed = threading.Event()

    def late(stop: StopFlag) -> None:
        failed.wait(10)
        raise RuntimeError("second")

    def early(stop: StopFlag) -> None:
        try:
            raise error
        finally:
            # The late one goes on once this one's failure has been noted.
            threading.Timer(0.05, failed.set).start()

    with pytest.raises(type(error), match="first"):
        run_all([late, early, late], 3)
    assert running() == []


def test_the_others_are_asked_to_stop_and_pending_ones_never_begin():
    begun: list[str] = []
    both = threading.Barrier(2, timeout=10)

    def works(stop: StopFlag) -> None:
        begun.append("works")
        both.wait()
        for _ in range(10_000):
            stop.check()
            time.sleep(0.001)
        begun.append("came to its end")

    def fails(stop: StopFlag) -> None:
        begun.append("fails")
        both.wait()
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        run_all([works, fails, *[lambda stop: begun.append("never")] * 20], 2)
    assert sorted(begun) == ["fails", "works"]
    assert running() == []


def test_a_failure_in_the_callers_thread_ends_the_jobs_after_it():
    begun: list[int] = []

    def job(n: int):
        def run(stop: StopFlag) -> None:
            begun.append(n)
            if n == 1:
                raise ValueError("here")

        return run

    with pytest.raises(ValueError, match="here"):
        run_all([job(n) for n in range(3)], 1)
    assert begun == [0, 1]


def test_an_interrupted_caller_stops_and_joins_the_threads(monkeypatch):
    from concurrent.futures import Future

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    ended: list[bool] = []

    def works(stop: StopFlag) -> None:
        try:
            while True:
                stop.check()
                time.sleep(0.001)
        finally:
            ended.append(True)

    monkeypatch.setattr(Future, "exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([works, works], 2)
    assert ended == [True, True]
    assert running() == []


def test_a_flag_is_raised_once_and_for_all():
    stop = StopFlag()
    stop.check()
    stop.set()
    with pytest.raises(Stopped):
        stop.check()

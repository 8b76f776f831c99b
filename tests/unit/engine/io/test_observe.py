import threading

import pytest

from pytest_dcp._engine.io.progress_observer import Observer, Progress, observe_with, observer


def test_bytes_of_every_thread_are_counted():
    seen: list[Progress] = []
    watcher = Observer("save", 3, progress=seen.append, every_s=0)
    watcher.expect(400)
    threads = [
        threading.Thread(target=lambda: [watcher.advance(1) for _ in range(100)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watcher.done_bytes == 400
    assert [p.done_bytes for p in seen] == list(range(401))
    assert seen[-1] == Progress("save", 3, 400, 400)


def test_progress_is_reported_no_more_often_than_asked_but_always_at_the_end():
    seen: list[int] = []
    watcher = Observer("load", progress=lambda p: seen.append(p.done_bytes), every_s=3600)
    watcher.expect(10)
    for _ in range(10):
        watcher.advance(1)
    assert seen == [0, 1, 10]


def test_the_check_may_stop_the_work_before_it_is_counted():
    def stopped() -> None:
        raise ConnectionError("rank 2 has failed")

    watcher = Observer("load", check=stopped)
    with pytest.raises(ConnectionError):
        watcher.advance(1)
    assert watcher.done_bytes == 0


def test_storages_find_the_observer_of_the_work_that_they_are_called_in():
    outer, inner = Observer("save"), Observer("load")
    with observe_with(outer):
        assert observer("save") is outer
        with observe_with(inner):
            assert observer("save") is inner
        with pytest.raises(ZeroDivisionError), observe_with(inner):
            raise ZeroDivisionError
        assert observer("load") is outer
    assert observer("load") is not outer
    assert observer("load").operation == "load"

import gc
import threading

import pytest

from pytest_dcp.garbage_collection import collector_paused, frozen_imports


@pytest.fixture(autouse=True)
def _collector_on():
    gc.enable()
    yield
    gc.enable()


def test_the_collector_rests_inside_and_works_again_after():
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with collector_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_the_collector_works_again_after_a_failure():
    with pytest.raises(ZeroDivisionError), collector_paused():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_the_last_thread_to_leave_switches_it_on():
    entered, leave = threading.Event(), threading.Event()

    def holds() -> None:
        with collector_paused():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=holds)
    with collector_paused():
        thread.start()
        entered.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_objects_of_an_import_are_never_looked_at_again():
    frozen = gc.get_freeze_count()
    try:
        with frozen_imports():
            assert not gc.isenabled()
            made: list[object] = []
            made.append(made)
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
        assert not any(one is made for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_an_import_that_fails_leaves_the_collector_as_it_was():
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), frozen_imports():
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen

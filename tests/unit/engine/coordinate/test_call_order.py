"""The order of a group's operations, and which peers belong to which."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from pytest_dcp._engine.coordinate.admission import RACE_S, Admission, admit
from pytest_dcp._engine.coordinate.hello import Hello
from pytest_dcp._engine.coordinate.operation_order import (
    CallOrder,
    OperationPlace,
    Subject,
    kind_of,
    wait_for_turn,
)

A, B = Subject("/a", "/a"), Subject("/b", "/b")


def in_a_thread(order: CallOrder, kind: str, subject: Subject | None = None) -> OperationPlace:
    """A place that another thread takes."""
    taken: list[OperationPlace] = []
    thread = threading.Thread(target=lambda: taken.append(order.take(kind, subject)))
    thread.start()
    thread.join()
    return taken[0]


def test_numbers_follow_the_calls_of_all_kinds() -> None:
    order = CallOrder()
    assert [order.take(kind, None).number for kind in ("save", "load", "save")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "kind"), [("save", "save"), ("async_save", "save"), ("load step_1", "load")]
)
def test_the_kind_is_the_first_word(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("earlier", "background", "later", "waits"),
    [
        (("save", A), True, ("save", B), True),
        (("save", A), True, ("load", A), True),
        (("save", A), True, ("load", B), False),
        (("load", A), True, ("save", A), False),
        (("load", A), True, ("load", A), False),
        (("save", A), False, ("save", A), False),  # the same thread: a hook's
    ],
)
def test_which_operation_waits_for_which(
    earlier: tuple[str, Subject], background: bool, later: tuple[str, Subject], waits: bool
) -> None:
    order = CallOrder()
    first = order.take(*earlier, background=background)
    assert order.take(*later).waits_for == ((first,) if waits else ())


def test_a_save_waits_for_another_threads_but_a_load_does_not() -> None:
    order = CallOrder()
    first = in_a_thread(order, "save", A)
    assert order.take("save", A).waits_for == (first,)
    assert order.take("load", A).waits_for == ()


def test_alone_saves_wait_for_those_to_the_same_folder() -> None:
    order = CallOrder(one_folder_at_a_time=True)
    first = order.take("save", A, background=True)
    assert order.take("save", B, background=True).waits_for == ()
    assert order.take("save", A).waits_for == (first,)


def test_a_turn_comes_when_those_before_are_over() -> None:
    order = CallOrder()
    first = order.take("save", A, background=True)
    second = order.take("save", A, background=True)
    thread = threading.Thread(target=wait_for_turn, args=(second,))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    order.finish(first)
    thread.join(10)
    assert not thread.is_alive()


def test_only_calls_beside_another_threads_are_unordered() -> None:
    order = CallOrder()
    order.take("save", A, background=True)
    assert not order.take("load", B).unordered
    in_a_thread(order, "load")
    assert order.take("load", B).unordered


def test_a_new_epoch_drops_earlier_calls() -> None:
    order = CallOrder()
    old = order.take("save", A)
    order.restart(1, ["why"])
    assert order.is_dropped(old)
    new = order.take("save", A)
    assert (new.epoch, new.number, order.causes) == (1, 1, ["why"])
    order.restart(1, ["again"])
    assert not order.is_dropped(new)
    assert order.causes == ["why"]


def test_finished_operations_are_counted_without_gaps() -> None:
    order = CallOrder()
    places = [order.take("load", None) for _ in range(3)]
    assert order.finished_up_to() == 0
    order.finish(places[1])
    assert order.finished_up_to() == 0
    order.finish(places[0])
    assert order.finished_up_to() == 2
    order.finish(places[2])
    assert order.finished_up_to() == 3


HELLO = Hello("group", "save", 3, 1, epoch=0, finished_up_to=2)


@pytest.mark.parametrize(
    ("hello", "left", "waited_s", "expected"),
    [
        (HELLO, False, 0.0, Admission.JOIN),
        (HELLO, True, 0.0, Admission.JOIN),
        (replace(HELLO, operation="async_save"), False, 0.0, Admission.JOIN),
        (replace(HELLO, operation="load"), False, 0.0, Admission.LATER),
        (replace(HELLO, operation="load"), False, RACE_S, Admission.ASTRAY),
        (replace(HELLO, number=4), False, 99.0, Admission.LATER),
        (replace(HELLO, number=4, operation="load"), False, 99.0, Admission.LATER),
        (replace(HELLO, number=4, finished_up_to=3), False, 0.0, Admission.OUT_OF_COUNT),
        (replace(HELLO, number=4, unordered=True), False, 0.0, Admission.JOIN),
        (replace(HELLO, number=2), False, 0.0, Admission.OUT_OF_COUNT),
        (replace(HELLO, number=2), True, 0.0, Admission.STALE),
        (replace(HELLO, number=1, operation="load"), False, 0.0, Admission.LATER),
        (replace(HELLO, epoch=1), False, 0.0, Admission.OUT_OF_COUNT),
        (replace(HELLO, epoch=1), True, 0.0, Admission.STALE),
    ],
)
def test_a_peer_is_admitted_by_its_number_and_kind(
    hello: Hello, left: bool, waited_s: float, expected: Admission
) -> None:
    """The coordinator is in its third operation, a save; its first, a load, goes on."""
    order = CallOrder()
    order.take("load", None, background=True)
    order.finish(order.take("save", None))
    mine = order.take("save", None)
    assert admit(hello, mine, order, has_left=left, waited_s=waited_s) is expected

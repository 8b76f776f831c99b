"""A rank's interrupts: raised in a phase's work, once, and never in the middle of a message."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pytest_dcp._harness.protocol.launcher import INTERRUPT_SIGNAL
from pytest_dcp._harness.rank.rank_interrupts import RankInterrupts


class Fixture:
    """A rank's interrupts, and how often they were said."""

    def __init__(self) -> None:
        self.said = 0
        self.interrupts = RankInterrupts()
        self.interrupts.install(self._say)

    def _say(self) -> None:
        self.said += 1


@pytest.fixture
def rank() -> Iterator[Fixture]:
    before = signal.getsignal(INTERRUPT_SIGNAL)
    yield Fixture()
    signal.signal(INTERRUPT_SIGNAL, before)


def send() -> None:
    os.kill(os.getpid(), INTERRUPT_SIGNAL)


def test_work_is_interrupted_once(rank: Fixture) -> None:
    ended = []
    with pytest.raises(KeyboardInterrupt), rank.interrupts.heard():  # noqa: PT012 - where it raises
        try:
            send()
            pytest.fail("not interrupted")
        finally:
            send()
            ended.append("the test's own end")
    assert (rank.said, rank.interrupts.came, len(ended)) == (1, True, 1)
    with pytest.raises(KeyboardInterrupt), rank.interrupts.heard():  # of the next phase
        send()


def test_a_rank_that_does_not_work_is_not_interrupted(rank: Fixture) -> None:
    send()
    with rank.interrupts.heard(), rank.interrupts.unheard():
        send()
    send()
    assert (rank.said, rank.interrupts.came) == (0, False)


def test_work_goes_on_to_be_interrupted_after_an_answer(rank: Fixture) -> None:
    with pytest.raises(KeyboardInterrupt), rank.interrupts.heard():  # noqa: PT012 - where it raises
        with rank.interrupts.unheard():
            send()
        send()


def test_a_message_is_not_interrupted_in_the_middle(rank: Fixture) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), rank.interrupts.heard():  # noqa: PT012 - where it raises
        with rank.interrupts.held():
            send()
            done.append("the message")
        done.append("behind")
    assert done == ["the message"]


def test_a_message_of_another_thread_holds_nothing_up(rank: Fixture) -> None:
    inside, leave = threading.Event(), threading.Event()

    def talk() -> None:
        with rank.interrupts.held():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(KeyboardInterrupt), rank.interrupts.heard():
            send()
    finally:
        leave.set()
        thread.join()

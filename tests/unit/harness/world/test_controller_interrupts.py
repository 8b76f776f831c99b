"""Signals of the controller: handlers raise where it waits, never in the middle of an action."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pytest_dcp._harness.world.controller_interrupts import Interrupts


class Rang(BaseException):
    """Raised by the handler of these tests."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    def ring(signum: int, frame: object) -> None:
        raise Rang(signum)

    before = signal.signal(signal.SIGUSR2, ring)
    yield
    signal.signal(signal.SIGUSR2, before)


def send(signum: int = signal.SIGUSR2) -> None:
    os.kill(os.getpid(), signum)


def test_a_handler_raises_at_once_where_nothing_is_held() -> None:
    with pytest.raises(Rang), Interrupts().relayed():  # noqa: PT012 - where it raises
        send()
        pytest.fail("not interrupted")


def test_a_handler_waits_for_the_end_of_the_held_block() -> None:
    interrupts = Interrupts()
    done = []
    with pytest.raises(Rang), interrupts.relayed():  # noqa: PT012 - where it raises
        with interrupts.held():
            with interrupts.held():
                send()
            done.append("inner")
        done.append("behind")
    assert done == ["inner"]


def test_an_error_in_the_held_block_leaves_the_handler_for_the_next_wait() -> None:
    interrupts = Interrupts()
    with interrupts.relayed():
        with pytest.raises(ValueError, match="of its own"), interrupts.held():  # noqa: PT012 - where it raises
            send()
            raise ValueError("of its own")
        with pytest.raises(Rang), interrupts.held():
            pass


def test_handlers_are_as_before_at_the_end_of_the_outermost_block() -> None:
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGINT)
    with interrupts.relayed():
        with interrupts.relayed():
            pass
        assert signal.getsignal(signal.SIGUSR2) != before[0]
    assert (signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_is_ignored_while_it_is_a_debuggers() -> None:
    interrupts = Interrupts()
    with interrupts.relayed():
        interrupts.ignored = True
        send(signal.SIGINT)
        interrupts.ignored = False
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)

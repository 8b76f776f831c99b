"""Whether a rank's process has ended, as its machine can tell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pytest_dcp.checkpoint.coordinate.presence import Presence, _stat_of


def test_this_process_is_there() -> None:
    own = Presence.own()
    assert own.pid == os.getpid()
    assert own.started
    assert not own.has_ended()
    assert Presence.decode(own.encode().encode()) == own


@pytest.fixture
def child() -> Iterator[Presence]:
    """A process that has ended and waits to be reaped; it is when the test is over."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as process:
        _, started = _stat_of(process.pid) or ("", "")
        presence = replace(Presence.own(), pid=process.pid, started=started)
        assert not presence.has_ended()
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield presence


def test_a_zombie_has_ended(child: Presence) -> None:
    assert child.has_ended()


def test_one_that_was_reaped_has_ended(child: Presence) -> None:
    os.waitpid(child.pid, 0)
    assert child.has_ended()


def test_another_process_of_the_same_pid_is_not_the_rank() -> None:
    assert replace(Presence.own(), started="1").has_ended()


@pytest.mark.parametrize("other", [{"scope": "another machine"}, {"started": ""}])
def test_nothing_is_said_of_what_cannot_be_seen(other: dict[str, str], child: Presence) -> None:
    assert not replace(child, **other).has_ended()

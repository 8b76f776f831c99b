"""Whether a rank's process has ended, as its machine can tell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_dcp._engine.coordinate.presence import Presence, _stat_of


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
def test_a_process_that_cannot_be_seen_is_not_called_ended(
    other: dict[str, str], child: Presence
) -> None:
    assert not replace(child, **other).has_ended()


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    return file


@pytest.mark.parametrize(
    "text",
    [
        '{"message": {"message": "ValueError: boom\\nmore", "extraInfo": {}}}',
        '{"message": "ValueError: boom"}',
    ],
)
def test_torchruns_error_file_shows_that_a_worker_failed(error_file: Path, text: str) -> None:
    elsewhere = replace(Presence.own(), scope="another machine")
    assert elsewhere.how_ended() is None
    error_file.write_text(text)
    assert elsewhere.how_ended() == f"its process {os.getpid()} has ended: ValueError: boom"


@pytest.mark.parametrize("text", ["", '{"message"', "[]", '{"message": null', "\0"])
def test_an_error_file_that_is_not_whole_says_nothing(error_file: Path, text: str) -> None:
    own = Presence.own()
    error_file.write_text(text)
    assert own.how_ended() is None


def test_an_error_file_of_an_earlier_worker_says_nothing(error_file: Path) -> None:
    error_file.write_text('{"message": "ValueError: before"}')
    assert Presence.own().how_ended() is None


def test_only_numeric_addresses_are_left_for_other_machines() -> None:
    own = Presence.own(["10.0.0.1", "node-1", "fe80::1"], 29500)
    elsewhere = replace(own, scope="another machine")
    assert Presence.decode(elsewhere.encode().encode()) == elsewhere
    assert elsewhere.listens_at() == ("10.0.0.1", 29500)
    assert own.listens_at() == ("127.0.0.1", 29500)
    assert replace(elsewhere, hosts=()).listens_at() is None
    assert Presence.own(["10.0.0.1"]).listens_at() is None

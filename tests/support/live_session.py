"""A session at a terminal of its own, watched and disturbed while it runs.

Enters: a suite of `sample_session` and a command line. Leaves: the text on the terminal, the
processes at any moment, and in the end the same `SessionResult`. The session's process group is the
terminal's foreground group, as if it had been started from a shell.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import termios
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pexpect
import psutil
from pexpect import fdpexpect

from support.session_server import ForkedSession, start_session

if TYPE_CHECKING:
    from support.sample_session import SessionResult, Suite

_OTHERS = r"(?:rank \d is done|\s)*"
PROMPT = rf"\({_OTHERS}P{_OTHERS}d{_OTHERS}b{_OTHERS}\) "
"""A debugger's. Readline writes it in pieces, and all ranks share the terminal: lines that another
rank of samples/debugged.py prints, or their ends, may come in between."""
ROWS_AND_COLUMNS = (50, 200)
ANSWER_S = 60.0
"""Bounds a wait for something to happen that takes some five seconds on an idle machine."""
GONE_S = 3.0
"""Processes that end with the session, or with the killed process, are gone after this time."""
LISTEN_S = 0.02
"""Between two polls while waiting."""


class LiveSession:
    """One running session; see `live`."""

    def __init__(self, suite: Suite, args: tuple[str, ...]) -> None:
        self._run = suite.prepare()
        self._output = (self._run.private / "output").open("w")
        self._started = time.monotonic()
        self._session, here = self._start(["--color=no", *args])
        self.terminal = fdpexpect.fdspawn(
            here, timeout=ANSWER_S, encoding="utf-8", codec_errors="replace"
        )
        self.terminal.delaybeforesend = None
        self.terminal.logfile_read = self._output
        self.pid = self._session.pid

    def _start(self, args: Sequence[str]) -> tuple[ForkedSession, int]:
        """The session, and our end of its terminal."""
        here, there = pty.openpty()
        termios.tcsetwinsize(there, ROWS_AND_COLUMNS)
        try:
            return start_session(args, self._run.cwd, self._run.env, there, terminal=True), here
        except BaseException:
            os.close(here)
            raise
        finally:
            os.close(there)

    # The terminal.

    def prompt(self) -> str:
        """Wait for a debugger's prompt; returns the terminal's text before it."""
        return self.shown_until(PROMPT)

    def shown_until(self, pattern: str) -> str:
        """Wait for a pattern on the terminal; returns the text before it."""
        self.terminal.expect(pattern)
        return str(self.terminal.before)

    def ask(self, command: str) -> str:
        """The answer to a command at a debugger's prompt."""
        self.terminal.sendline(command)
        return self.prompt().replace(command, "", 1).strip()

    def tell(self, command: str) -> None:
        """A command that leaves the debugger's prompt."""
        self.terminal.sendline(command)

    def prompts_again(self) -> bool:
        """Whether a debugger's prompt comes before the session's end."""
        return bool(self.terminal.expect([pexpect.EOF, PROMPT]))

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.terminal.send("\x03")

    # The processes.

    def notes(self, about: str) -> list[dict[str, Any]]:
        """The suite's notes so far."""
        record = self._run.private / "record"
        lines = record.read_text().splitlines() if record.exists() else []
        return [note for line in lines if (note := json.loads(line)).get("about") == about]

    def wait_for_note(self, about: str, times: int = 1) -> list[dict[str, Any]]:
        """Wait until the suite has noted `about` this many times."""
        deadline = time.monotonic() + ANSWER_S
        while len(found := self.notes(about)) < times:
            if time.monotonic() > deadline:
                raise AssertionError(f"no note of {about!r} in {ANSWER_S:g} s:\n{self.output()}")
            self._listen()
        return found

    def wait_until_gone(
        self, processes: Iterable[psutil.Process], within_s: float = GONE_S
    ) -> None:
        """Wait for their ends; AssertionError when one is late."""
        deadline = time.monotonic() + within_s
        while running := [process for process in processes if _runs(process)]:
            if time.monotonic() > deadline:
                raise AssertionError(f"after {within_s:g} s there were still {running}")
            self._listen()

    def _listen(self) -> None:
        """Read from the terminal for a moment, so that the session does not block on it."""
        with contextlib.suppress(pexpect.TIMEOUT):
            self.terminal.expect(pexpect.EOF, timeout=LISTEN_S)
            time.sleep(LISTEN_S)

    def output(self) -> str:
        """All that stood on the terminal."""
        self._output.flush()
        return self._run.output()

    # The end.

    def end(self, within_s: float = ANSWER_S) -> SessionResult:
        """Wait for the session's end; AssertionError when it is late."""
        deadline = time.monotonic() + within_s
        while (code := self._session.poll()) is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"no end in {within_s:g} s:\n{self.output()[-5000:]}")
            self._listen()
        elapsed_s = time.monotonic() - self._started
        self._listen()
        self._output.flush()
        return self._run.result(code, elapsed_s)

    def close(self) -> None:
        """Kill all processes that are left."""
        self._run.kill_left()
        self._session.wait(GONE_S)
        self.terminal.close()
        self._output.close()


@contextlib.contextmanager
def live(suite: Suite, *args: str) -> Iterator[LiveSession]:
    """`pytest *args` at a terminal until the block ends."""
    session = LiveSession(suite, args)
    try:
        yield session
    finally:
        session.close()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

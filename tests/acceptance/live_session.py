"""A session at a terminal of its own, watched and disturbed while it runs.

Enters: a suite of `sample_session` and a command line. Leaves: what stood on the terminal, the
processes at any moment, and in the end the same `SessionResult`. The session leads its process group and the
terminal's foreground group, as one that was started from a shell does.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pexpect

if TYPE_CHECKING:
    from sample_session import SessionResult, Suite

PROMPT = r"\(Pdb\) "
ANSWER_S = 60.0
"""Bounds a wait for something to happen that takes some five seconds on an idle machine."""
GONE_S = 3.0
"""What is to go with the session, or with the process that was killed, is gone so long after."""


class LiveSession:
    """One running session; see `started`."""

    def __init__(self, suite: Suite, args: tuple[str, ...], cwd: str) -> None:
        self._run = suite.prepare(cwd=cwd)
        self._output = (self._run.private / "output").open("w")
        self._started = time.monotonic()
        self.terminal = pexpect.spawn(
            sys.executable,
            ["-m", "pytest", "--color=no", *args],
            cwd=str(self._run.cwd),
            env=self._run.env,
            encoding="utf-8",
            codec_errors="replace",
            timeout=ANSWER_S,
            dimensions=(50, 200),
        )
        self.terminal.logfile_read = self._output
        self.pid: int = self.terminal.pid

    # The terminal.

    def prompt(self) -> str:
        """Wait for a debugger's prompt; what stood on the terminal before it."""
        return self.shown_until(PROMPT)

    def shown_until(self, pattern: str) -> str:
        """Wait for a pattern on the terminal; what stood on the terminal before it."""
        self.terminal.expect(pattern)
        return str(self.terminal.before)

    def ask(self, command: str) -> str:
        """The answer to a command at a debugger's prompt."""
        self.terminal.sendline(command)
        return self.prompt().replace(command, "", 1).strip()

    def tell(self, command: str) -> None:
        """A command that leaves the debugger's prompt."""
        self.terminal.sendline(command)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.terminal.sendintr()

    # The processes.

    def notes(self, about: str) -> list[dict[str, Any]]:
        """What the suite noted so far."""
        record = self._run.private / "record"
        lines = record.read_text().splitlines() if record.exists() else []
        return [note for line in lines if (note := json.loads(line)).get("about") == about]

    def wait_for_note(self, about: str, times: int = 1) -> list[dict[str, Any]]:
        """Wait until the suite has noted it so many times."""
        deadline = time.monotonic() + ANSWER_S
        while len(found := self.notes(about)) < times:
            if time.monotonic() > deadline:
                raise AssertionError(f"no note of {about!r} in {ANSWER_S:g} s:\n{self.output()}")
            with contextlib.suppress(pexpect.TIMEOUT, pexpect.EOF):
                self.terminal.expect(pexpect.EOF, timeout=0.05)
        return found

    def processes(self) -> set[int]:
        """Ids of the session's processes, the controller among them."""
        return {process.pid for process in self._run.left() if process.is_running()}

    def output(self) -> str:
        """All that stood on the terminal."""
        self._output.flush()
        return self._run.output()

    # The end.

    def end(self, within_s: float = ANSWER_S) -> SessionResult:
        """Wait for the session's end; AssertionError when it comes late."""
        try:
            self.terminal.expect(pexpect.EOF, timeout=within_s)
        except pexpect.TIMEOUT as exc:
            raise AssertionError(f"no end in {within_s:g} s:\n{self.output()[-5000:]}") from exc
        ended = time.monotonic()
        self.terminal.wait()
        self._output.flush()
        status = self.terminal.exitstatus
        code = -self.terminal.signalstatus if status is None else status
        return self._run.result(code, ended - self._started)

    def close(self) -> None:
        """End whatever is left."""
        self._run.kill_left()
        self.terminal.close(force=True)
        self._output.close()


@contextlib.contextmanager
def live(suite: Suite, *args: str, cwd: str = ".") -> Iterator[LiveSession]:
    """`pytest *args` at a terminal until the block ends."""
    session = LiveSession(suite, args, cwd)
    try:
        yield session
    finally:
        session.close()

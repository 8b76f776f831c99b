"""A debugger in a rank: the controller grants the terminal to one rank at a time.

Enters: pytest's own debugger, taken over at the one place through which every way into it leads.
Leaves: questions to the controller (`DebugAsk`), which stops every clock while a rank has the
terminal.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pytest_dcp._harness.protocol.messages import DebugAnswer, DebugAsk, DebugDone
from pytest_dcp._harness.rank.this_rank import Rank
from pytest_dcp._pytest_internals import (
    global_capture_of,
    has_started,
    init_pdb,
    redirect_writer,
    set_init_pdb,
    writer_of,
)


class RankTerminal:
    """The terminal as a rank sees it: closed, until the rank is granted it for a debugger.

    A rank is not in the terminal's foreground process group, so reading from it would stop the
    process; and only rank 0 writes plugins' output during a test (--setup-show, live logs).
    """

    def __init__(self, config: pytest.Config, tty: str) -> None:
        self._tty = tty
        self._null = os.open(os.devnull, os.O_RDWR)
        self._nowhere = os.fdopen(os.dup(self._null), "w")
        self._writer, self._file = writer_of(config)
        capture: Any = config.pluginmanager.getplugin("capturemanager")
        self._stdin_is_captured = capture is not None and capture.is_globally_capturing()
        self._capturing = global_capture_of(config)
        self._stdin = -1

    def shut(self, *, muted: bool) -> None:
        """Do not read the terminal, and if `muted` do not write to it either."""
        if muted:
            redirect_writer(self._writer, self._nowhere)
        if not self._stdin_is_captured:
            if self._stdin < 0:
                self._stdin = os.dup(0)
            os.dup2(self._null, 0)

    def open(self) -> None:
        """Let this process read and write it from now on."""
        redirect_writer(self._writer, self._file)
        if self._tty:
            self._take(self._tty)
        elif self._stdin >= 0:
            os.dup2(self._stdin, 0)

    def name_rank(self, rank: int, size: int) -> None:
        """Say whose debugger it is, below the debugger's own heading."""
        if self._writer is not None:
            self._writer.sep(">", f"rank {rank} of {size} has the terminal")

    def _take(self, path: str) -> None:
        """Replace the standard files by the terminal, also the ones that capture saved."""
        with contextlib.suppress(OSError):  # there is none: the debugger reads an end of file
            tty = os.open(path, os.O_RDWR)
            for fd, name in enumerate(("in_", "out", "err")):
                stream: Any = getattr(self._capturing, name, None)
                os.dup2(tty, getattr(stream, "targetfd_save", fd))
                if not has_started(stream):
                    os.dup2(tty, fd)
            os.close(tty)


class RankDebugger:
    """A plugin of the rank's session: pytest's debugger, once the controller has agreed."""

    rank: Rank

    def __init__(self, config: pytest.Config, terminal: RankTerminal) -> None:
        self.config = config
        self._terminal = terminal
        self._pdb_invoke: Any = None
        self._debugging = False

    def join(self, rank: Rank) -> None:
        """This process is that rank from here on."""
        self.rank = rank
        self._terminal.shut(muted=rank.order.rank != 0)

    def take_over_pdb(self) -> None:
        """Have pytest's debugger ask the controller for the terminal first."""
        self._pdb_invoke = self.config.pluginmanager.unregister(name="pdbinvoke")
        # A spawned rank that is kept warm calls this for every test.
        original = init_pdb()

        @functools.wraps(original)
        def ask_and_init(method: str, *args: Any, **kwargs: Any) -> Any:
            if not self._debugging and not self._ask_for_terminal(method):
                return NoPdb()
            pdb = original(method, *args, **kwargs)
            # From here on nothing captures what the writer writes.
            self._terminal.name_rank(self.rank.order.rank, self.rank.order.size)
            pdb.setup = self._wrap_setup(pdb.setup)
            return pdb

        set_init_pdb(ask_and_init)

    def _wrap_setup(self, setup: Callable[..., Any]) -> Callable[..., Any]:
        """Pdb's `setup`, which begins each of its prompts: at a later breakpoint the terminal is
        gone."""

        def ask_and_setup(*args: Any) -> Any:
            if not self._debugging:
                self._ask_for_terminal("breakpoint")
            return setup(*args)

        return ask_and_setup

    def _ask_for_terminal(self, reason: str) -> bool:
        answer = self.rank.channel.ask(DebugAsk(reason), DebugAnswer)
        if answer.error:
            pytest.fail(f"rank {self.rank.order.rank}: {answer.error}", pytrace=False)
        if answer.granted:
            self._debugging = True
            # Reading a terminal from a background process group stops the process.
            with contextlib.suppress(OSError):
                os.setpgid(0, answer.group)
            self._terminal.open()
        return answer.granted

    def give_back(self, *, tracing: bool = False) -> None:
        """At the latest when a phase ends; a debugger that is to stop again asks again."""
        if self._debugging:
            self._debugging = False
            if not tracing:  # a user who stepped to the end of a test left the tracing on
                sys.settrace(None)
            self._terminal.shut(muted=self.rank.order.rank != 0)
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)
            self.rank.channel.send(DebugDone())

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        """--pdb: post mortem in the rank that gets the terminal."""
        if self._pdb_invoke is None or self.rank.interrupts.came:
            return
        if not self._ask_for_terminal("post_mortem"):
            return
        try:
            self._pdb_invoke.pytest_exception_interact(node=node, call=call, report=report)
        finally:
            self.give_back()

    def pytest_leave_pdb(self) -> None:
        """`continue` at a breakpoint."""
        self.give_back(tracing=True)


class NoPdb:
    """The debugger of a rank without the terminal: does nothing."""

    def set_trace(self, frame: object = None) -> None:
        """Go on."""

    def runcall(self, function: Callable[[], object]) -> object:
        """Just call it."""
        return function()

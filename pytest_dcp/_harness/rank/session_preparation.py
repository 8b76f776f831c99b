"""Makes a collected session one that ranks run: before the fork, and in each rank after it.

Its reporting plugins are taken out (`silence`): a rank reports only to the controller.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_dcp._harness.rank import junit_state
from pytest_dcp._harness.rank.captured_output import C_STREAMS, CStreams
from pytest_dcp._harness.rank.debugger import RankDebugger, RankTerminal
from pytest_dcp._harness.rank.junit_state import JunitState
from pytest_dcp._harness.rank.main import ItemRunner
from pytest_dcp._harness.rank.pytest_plugin import RankPlugin
from pytest_dcp._harness.rank.this_rank import Rank
from pytest_dcp._pytest_internals import global_capture_of, remove_hooks_of, set_base_of_tmp_path


def silence(config: pytest.Config) -> None:
    """Take the reporting hooks out of a session that ranks will run.

    Plugins that get reports and warnings write them somewhere: to the terminal, a file, xdist's
    channel. The session itself still counts, for --maxfail among subtests, and captured logging
    still works.
    """
    manager = config.pluginmanager
    logging_plugin = manager.getplugin("logging-plugin")
    for hook in (manager.hook.pytest_runtest_logreport, manager.hook.pytest_warning_recorded):
        for impl in hook.get_hookimpls():
            if not isinstance(impl.plugin, pytest.Session) and impl.plugin is not logging_plugin:
                remove_hooks_of(hook, impl.plugin)


def prepare(session: pytest.Session, *, tty: str = "") -> RankPlugin:
    """Prepare a session for ranks, as far as possible before the fork.

    `tty` names the terminal where this process did not inherit it.
    """
    silence(session.config)
    _record_for_junit(session.config)
    debugger = RankDebugger(session.config, RankTerminal(session.config, tty))
    debugger.take_over_pdb()
    plugin = RankPlugin(session, debugger)
    session.config.pluginmanager.register(debugger, "pytest_dcp.debugger")
    session.config.pluginmanager.register(plugin, "pytest_dcp.rank")
    if not session.config.pluginmanager.has_plugin(C_STREAMS):
        session.config.pluginmanager.register(CStreams(), C_STREAMS)
    if "hypothesis" in sys.modules:
        from pytest_dcp._harness.lockstep import hypothesis_version

        plugin.follows = hypothesis_version.make_ready()
    return plugin


def _record_for_junit(config: pytest.Config) -> None:
    state: Any = config.pluginmanager.getplugin(junit_state.NAME)
    if state is None:  # a spawned rank has a session of its own
        state = JunitState()
        config.pluginmanager.register(state, junit_state.NAME)
    state.record(config)


def enlist(rank: Rank, plugin: RankPlugin) -> ItemRunner:
    """Make the session this rank's. Returns the runner of its items."""
    config = plugin.config
    rank.capture = plugin.capturing
    if plugin.follows:
        from pytest_dcp._harness.rank import example_runner

        example_runner.install(rank, plugin)
    _redirect_capture(config, rank)
    set_base_of_tmp_path(config, Path(rank.order.basetemp))
    plugin.join(rank)
    if rank.order.isolation == "module":
        from pytest_dcp._harness.rank.state_keeper import StateKeeper

        plugin.keeper = StateKeeper(plugin.session)
        config.pluginmanager.register(plugin.keeper, "pytest_dcp.state")
    return plugin


def _redirect_capture(config: pytest.Config, rank: Rank) -> None:
    """Let the rank's capture write to its own memfds: the inherited files share their offset."""
    capturing = global_capture_of(config)
    for name, fd in (("out", rank.fds.out), ("err", rank.fds.err)):
        stream = getattr(capturing, name, None)
        file: Any = getattr(stream, "tmpfile", None)
        with contextlib.suppress(OSError, AttributeError):  # sys capture has no descriptor
            os.dup2(fd, file.fileno(), inheritable=False)

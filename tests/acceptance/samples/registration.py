"""Copied as conftest.py: the parts of the plugin that are registered, and their cost."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from session_recorder import note

STARTS = frozenset(
    {"os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen"}
)
"""Audit events of a process that starts another."""
started: list[str] = []


def notice(event: str, args: object) -> None:
    if event in STARTS:
        started.append(event)


sys.addaudithook(notice)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    names = (name for name, plugin in config.pluginmanager.list_name_plugin() if plugin)
    options = [option for group in config._parser._groups for option in group.options]
    note(
        "registration",
        plugins=sorted(name for name in names if "dcp" in name),
        options=sum("--dcp-marker" in option.names() for option in options),
        markers=sum("fresh world" in line for line in config.getini("markers")),
        torch="torch" in sys.modules,
        started=started,
        children=Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    )

"""A plugin for sample sessions: records the reports of a pytest session as JSON lines.

Enters: pytest's hooks, in any process. Leaves: one line per event in the file that
SESSION_RECORD names, each with the id of the process that wrote it: a rank that reports on its own
shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from typing import Any

import psutil
import pytest


def _record(kind: str, **facts: object) -> None:
    line = json.dumps({"kind": kind, "pid": os.getpid(), **facts}, default=repr) + "\n"
    # One write of one line to a file opened for appending does not mix with others.
    fd = os.open(os.environ["SESSION_RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)


def note(about: str, **facts: object) -> None:
    """Record facts that a test of the suite observed, in any process."""
    _record("note", about=about, **facts)


def _children() -> int:
    return len(psutil.Process().children(recursive=True))


class SessionRecorder:
    """Notes every report with the category that the terminal shows it under."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        _record("collected", nodeids=[item.nodeid for item in session.items])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        try:
            return (yield)
        finally:
            _record("loop", children=_children())

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        _record("finish", children=_children())

    def pytest_warning_recorded(self, warning_message: Any, nodeid: str) -> None:
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        _record("warning", nodeid=nodeid, text=text)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        status: Any = self._config.hook.pytest_report_teststatus(report=report, config=self._config)
        longrepr: Any = report.longrepr
        crash = getattr(longrepr, "reprcrash", None)
        _record(
            "report",
            nodeid=report.nodeid,
            when=report.when,
            category=status[0] if status else report.outcome,  # without the terminal plugin
            text=longrepr[2] if isinstance(longrepr, tuple) else report.longreprtext,
            path=longrepr[0] if isinstance(longrepr, tuple) else getattr(crash, "path", ""),
            message=getattr(crash, "message", ""),
            xfail=getattr(report, "wasxfail", None),
            sections=report.sections,
            properties=report.user_properties,
            duration_s=report.duration,
            subtest=hasattr(report, "context"),
            children=_children() if report.when == "setup" else None,
        )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's controller gets its workers' reports
        config.pluginmanager.register(SessionRecorder(config), "session_recorder.events")

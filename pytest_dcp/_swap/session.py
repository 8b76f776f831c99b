"""A pytest session whose tests, conftests, workers and ranks run on our engine."""

from __future__ import annotations

import os
import shutil

import pytest

from pytest_dcp._swap.children import VARIABLES, extend_environment
from pytest_dcp._swap.fallbacks import report_fallbacks
from pytest_dcp._swap.import_hook import install


class EngineSession:
    """State that the session has to restore, and messages for its end."""

    def __init__(self) -> None:
        self._before = {name: os.environ.get(name) for name in VARIABLES}
        self._notes = extend_environment(os.environ)
        """None in an xdist worker, whose controller reports for all."""
        self._leftovers = install()

    def pytest_report_header(self) -> list[str]:
        """Report the engine in the header: results depend on it."""
        lines = ["engine: torch.distributed.checkpoint gives pytest_dcp.checkpoint"]
        return [*lines, f"engine: {self._leftovers}"] if self._leftovers else lines

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the imported modules that only torch's engine has."""
        if self._notes is not None and (text := report_fallbacks(self._notes)):
            terminalreporter.section("engine")
            terminalreporter.write_line(text)

    def pytest_unconfigure(self) -> None:
        """Restore the environment, and remove the notes."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if self._notes is not None:
            shutil.rmtree(self._notes, ignore_errors=True)


def begin(config: pytest.Config) -> None:
    """Swap engines for this session."""
    config.pluginmanager.register(EngineSession(), "pytest_dcp.engine")

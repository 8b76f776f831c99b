"""A pytest session whose tests, conftests, workers and ranks run on our engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pytest_dcp._swap.children import extend_environment
from pytest_dcp._swap.fallbacks import FOLDER_VARIABLE, fallback_text, noted_fallbacks
from pytest_dcp._swap.import_hook import install


class EngineSession:
    """State that the session has to restore, and messages for its end."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._owns_notes = FOLDER_VARIABLE not in os.environ
        """False in an xdist worker, whose controller reports for all."""
        extend_environment(os.environ)
        install()

    def pytest_report_header(self) -> str:
        """Report the engine in the header: results depend on it."""
        return "engine: torch.distributed.checkpoint gives pytest_dcp.checkpoint"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the imported modules that only torch's engine has."""
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder and (text := fallback_text(noted_fallbacks(Path(folder)))):
            terminalreporter.section("engine")
            terminalreporter.write_line(text)

    def pytest_unconfigure(self) -> None:
        """Restore the environment, and remove the notes."""
        folder = os.environ.get(FOLDER_VARIABLE)
        os.environ.clear()
        os.environ.update(self._environment)
        if folder and self._owns_notes:
            shutil.rmtree(folder, ignore_errors=True)


def begin(config: pytest.Config) -> None:
    """Swap engines for this session."""
    config.pluginmanager.register(EngineSession(), "pytest_dcp.engine")

"""pytest's capture of logging, left in place from one phase of a marked test to the next.

For each phase pytest adds its two handlers to the root logger and to every logger that does not
propagate, and removes them again; torch has some forty of those. This module leaves them there,
deaf between phases; a phase only checks that they are still on the loggers that pytest would
choose.

Takes the place of `catching_logs` in `_pytest.logging`, where the logging plugin looks it up for
each phase, and for the plugin's two handlers only; another pytest than 9.2's kind is left alone.
Can go when pytest leaves its handlers in place itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import pytest

from pytest_dcp._harness.rank import logger_changes
from pytest_dcp._pytest_internals import pytest_logging

HANDLERS = ("caplog_handler", "report_handler")
DEAF = sys.maxsize
"""A level that no record has."""


def leave_out_call_events(config: pytest.Config) -> None:
    """Keep torch's events of calls out of the captured log, unless the user has set a log level.

    torch's loggers `c10d-...` hold a dict at DEBUG when a save, a load or a collective begins, and
    one when it ends, for handlers that count them; some twenty for each checkpoint test that fails.
    `caplog` still has them.
    """
    plugin: Any = config.pluginmanager.getplugin("logging-plugin")
    handler: Any = getattr(plugin, "report_handler", None)
    if handler is not None and getattr(plugin, "log_level", None) is None:
        handler.addFilter(_is_no_call_event)


def _is_no_call_event(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.INFO or not record.name.startswith("c10d-")


def log_without_debug(config: pytest.Config) -> tuple[int, str]:
    """How many records below INFO the last phase has logged, and its captured log without them.

    (0, "") when it has logged none, and when the user has set a log level: then they are wanted.
    """
    plugin: Any = config.pluginmanager.getplugin("logging-plugin")
    handler: Any = getattr(plugin, "report_handler", None)
    if handler is None or getattr(plugin, "log_level", None) is not None:
        return 0, ""
    records = [record for record in handler.records if record.levelno >= logging.INFO]
    if (left_out := len(handler.records) - len(records)) == 0:
        return 0, ""
    return left_out, "\n".join(handler.format(record) for record in records)


class HandlerPlaces:
    """The loggers that have the handlers."""

    def __init__(self, handlers: Sequence[logging.Handler]) -> None:
        self._in_order = handlers
        self._handlers = frozenset(handlers)
        self._loggers: list[logging.Logger] = []
        self._changes_by_then = -1
        """How many changes of loggers there had been when the handlers hung as they should."""

    def hang(self) -> None:
        """Put the handlers on the loggers that pytest would choose now."""
        # In a process that was just forked, a look at hundreds of loggers copies their pages.
        if self._changes_by_then == logger_changes.count() and self._hung_on(logging.root):
            return
        self._hang_anew()
        self._changes_by_then = logger_changes.count()

    def _hung_on(self, logger: logging.Logger) -> bool:
        return self._handlers.issubset(logger.handlers)

    def _hang_anew(self) -> None:
        loggers = [logging.getLogger()]
        for one in logging.Logger.manager.loggerDict.values():
            if isinstance(one, logging.Logger) and not one.propagate:
                loggers.append(one)
        if loggers == self._loggers and all(map(self._hung_on, loggers)):
            return
        self.take_off()
        for one in loggers:
            for handler in self._in_order:
                one.addHandler(handler)
        self._loggers = loggers

    def take_off(self) -> None:
        """Leave no handler behind."""
        for one in self._loggers:
            for handler in self._handlers:
                one.removeHandler(handler)
        self._loggers = []
        self._changes_by_then = -1


class _Catcher:
    """`catching_logs` of one handler that hangs already, for any number of phases."""

    def __init__(self, handler: logging.Handler) -> None:
        self.handler = handler
        self.level: int | None = None
        self._own_level = handler.level
        self._root_level = logging.NOTSET

    def __enter__(self) -> logging.Handler:
        self.handler.setLevel(self._own_level if self.level is None else self.level)
        if self.level is not None:
            root = logging.getLogger()
            self._root_level = root.level
            root.setLevel(min(root.level, self.level))
        return self.handler

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.level is not None:
            logging.getLogger().setLevel(self._root_level)
        self.deafen()

    def deafen(self) -> None:
        """Until the next phase, log records are assigned to no phase."""
        self._own_level = self.handler.level
        self.handler.setLevel(DEAF)

    def undeafen(self) -> None:
        """Inverse of `deafen`."""
        self.handler.setLevel(self._own_level)


class SteadyLogs:
    """Both handlers of a session; none where this pytest hangs them otherwise."""

    def __init__(self, config: pytest.Config) -> None:
        self._pytests: Any = getattr(pytest_logging, "catching_logs", None)
        is_supported = "attached_loggers" in getattr(self._pytests, "__slots__", ())  # pytest 9.2
        plugin = config.pluginmanager.getplugin("logging-plugin") if is_supported else None
        handlers = [getattr(plugin, name) for name in HANDLERS if hasattr(plugin, name)]
        self._place = HandlerPlaces(handlers)
        self._catchers = {handler: _Catcher(handler) for handler in handlers}

    def __call__(
        self, handler: logging.Handler, level: int | None = None
    ) -> AbstractContextManager[logging.Handler]:
        """The result of `catching_logs`."""
        catcher = self._catchers.get(handler)
        if catcher is None:
            caught: AbstractContextManager[logging.Handler] = self._pytests(handler, level)
            return caught
        if handler is next(iter(self._catchers)):  # a phase's first: once for both
            self._place.hang()
        catcher.level = level
        return catcher

    def install(self) -> None:
        """From here on, in this process and its forks."""
        self._place.hang()
        for catcher in self._catchers.values():
            catcher.deafen()
        self._use(self)

    @contextmanager
    def during_an_item(self) -> Iterator[None]:
        """For one item; the handlers still hang afterwards, as pytest has them in a phase."""
        for catcher in self._catchers.values():
            catcher.deafen()
        self._use(self)
        try:
            yield
        finally:
            self._use(self._pytests)
            for catcher in self._catchers.values():
                catcher.undeafen()

    def take_off(self) -> None:
        """Leave no handler behind."""
        self._place.take_off()

    def _use(self, catching: Any) -> None:
        if self._catchers:
            pytest_logging.catching_logs = catching  # type: ignore[misc]  # a class there

"""Tells torch's `dcp_logger` of calls: when one starts, ends or raises.

A tool that watches checkpoints registers a handler for this logger. It receives a dict as each
record's message: `func_name`, `event` ("start", "end" or "exception"), `checkpoint_id`, `uuid` (the
same for all events of one call), `time` and, at the end, `times_spent` (both ns), the classes of
storage and planner, and the name, size and ranks of the process group. Functions and steps have
torch's names. Unlike torch's, an event is a dict of its own: a handler may keep it.

Without a handler nothing is built: such a call costs less than a microsecond.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from uuid import uuid4

from pytest_dcp._engine.plan.storage_capabilities import place_of
from pytest_dcp._torch_internals.call_logger import _dcp_logger, group_fields

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self

P = ParamSpec("P")
R = TypeVar("R")


class CallEvents:
    """Logs the start of a call when it is entered, and its end or its exception when it is left."""

    __slots__ = ("_arguments", "_fields", "_function", "_log_exceptions", "_start_ns")

    def __init__(
        self, function: str, arguments: Mapping[str, Any], *, log_exceptions: bool = False
    ) -> None:
        """arguments: those of the call; of these, checkpoint_id, storage_writer, storage_reader,
        planner and process_group are logged.
        """
        self._function = function
        self._log_exceptions = log_exceptions
        self._arguments = arguments
        self._fields: dict[str, Any] | None = None
        self._start_ns = 0

    def __enter__(self) -> Self:
        if is_heard():
            self._fields = {
                **describe_call(self._arguments),
                **_fields_of_group(self._function, self._arguments.get("process_group")),
                "log_exceptions": self._log_exceptions,
            }
            self._start_ns = time.time_ns()
            _dcp_logger.debug({**self._fields, "event": "start", "time": self._start_ns})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._fields is None:
            return
        now_ns = time.time_ns()
        if error is None:
            spent_ns = now_ns - self._start_ns
            end = {"event": "end", "time": now_ns, "times_spent": spent_ns}
            _dcp_logger.debug({**self._fields, **end})
        elif self._log_exceptions:
            failed = {"event": "exception", "error": f"{error}", "time": now_ns}
            _dcp_logger.error({**self._fields, **failed})


def is_heard() -> bool:
    """Whether anyone listens: torch itself gives the logger a handler that drops everything."""
    return (
        _dcp_logger.propagate
        or bool(_dcp_logger.filters)
        or any(type(handler) is not logging.NullHandler for handler in _dcp_logger.handlers)
    )


def describe_call(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's id, the classes of storage and planner, and a new id of the call."""
    checkpoint_id = arguments.get("checkpoint_id")
    storage = arguments.get("storage_writer") or arguments.get("storage_reader")
    if not checkpoint_id and storage:
        checkpoint_id = place_of(storage)
    fields: dict[str, Any] = {
        "checkpoint_id": None if checkpoint_id is None else str(checkpoint_id),
        "uuid": str(uuid4().int),
    }
    for name in ("storage_writer", "storage_reader", "planner"):
        if arguments.get(name):
            fields[name] = type(arguments[name]).__name__
    return fields


def _fields_of_group(function: str, group: Any) -> dict[str, Any]:
    try:
        return group_fields(function, group)
    except (
        RuntimeError,
        ValueError,
    ):  # A destroyed group, or another's: the call itself reports it.
        return {"func_name": function}


def log_calls(
    log_exceptions: bool = False, **wrapper_kwargs: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator whose function tells `dcp_logger` of its calls (torch's `_dcp_method_logger`).

    log_exceptions: whether to log exceptions, too. wrapper_kwargs: arguments to log where the call
        itself has none of that name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            logged_kwargs = {**wrapper_kwargs, **kwargs}
            with CallEvents(function.__name__, logged_kwargs, log_exceptions=log_exceptions):
                return function(*args, **kwargs)

        return called

    return decorate

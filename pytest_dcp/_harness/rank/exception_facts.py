"""A rank's description of an exception: its class, text, traceback and meaning."""

from __future__ import annotations

from types import TracebackType

from pytest_dcp._harness.protocol.messages import RankOutcome
from pytest_dcp.errors import DivergedError
from pytest_dcp.tracebacks import format_error

TEXT_CHARS = 2000
"""Of an exception's text in headings and messages; its traceback has all of it."""


def traceback_text(error: BaseException, *, skip_file: str = "") -> str:
    """The traceback without frames of ours that add nothing, and of `skip_file` at its top."""
    tb: TracebackType | None = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename == skip_file:
        tb = tb.tb_next
    return format_error(error, tb)


def outcome_of(error: BaseException) -> RankOutcome:
    """By the names that pytest gives its control-flow exceptions."""
    names: dict[str, RankOutcome] = {
        "Skipped": "skipped",
        "SkipTest": "skipped",
        "XFailed": "xfailed",
        "Exit": "exit",
        "KeyboardInterrupt": "interrupt",
    }
    return names.get(type(error).__name__, "failed")


def is_echo(error: BaseException | None) -> bool:
    """Whether an error says itself that a peer caused it."""
    return isinstance(error, DivergedError) and error.is_echo


def class_of(error: BaseException) -> tuple[str, str]:
    return type(error).__module__, type(error).__qualname__


def lines_of(error: BaseException) -> str:
    """`Type: text`, in the text's own lines, even when the exception's own `__str__` is broken."""
    try:
        text = str(error)
    except Exception as exc:  # noqa: BLE001 - user code: whatever it raises is only text here
        text = f"<its __str__ raised {type(exc).__name__}>"
    name = type(error).__name__
    return f"{name}: {text.strip()[:TEXT_CHARS]}" if text.strip() else name

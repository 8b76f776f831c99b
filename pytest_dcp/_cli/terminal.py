"""Characters that a terminal or a pipe can show, and Ctrl-C before a command has begun."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def escape_unprintable() -> None:
    """From now on characters that stdout's encoding lacks are printed as escapes, as stderr's are;
    they would be errors."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def ending_at_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once inside, without a traceback, as nothing has begun: imports
    take seconds, and a library that is interrupted in its own may raise any error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def can_print(text: str) -> bool:
    """Whether stdout's encoding has all of these characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True

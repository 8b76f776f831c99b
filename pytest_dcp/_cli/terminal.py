"""Characters that a terminal or a pipe can show: names of checkpoints have any characters."""

from __future__ import annotations

import io
import sys


def escape_unprintable() -> None:
    """From now on characters that stdout's encoding lacks are printed as escapes, as stderr's are;
    they would be errors."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def can_print(text: str) -> bool:
    """Whether stdout's encoding has all of these characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True

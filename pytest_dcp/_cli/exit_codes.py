"""How a command ends: its exit code, and one line on stderr for each refusal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

FINE = 0
FOUND = 1
"""`diff` found differences, `verify` problems."""
NO_STEP = 1
"""`bisect` found no step, as grep reports that no line matches."""
REFUSED = 2
"""Wrong arguments, no checkpoint, a damaged one, a full disk: one line on stderr says what."""
INTERRUPTED = 130
"""Ctrl-C, as shells report it."""


@contextmanager
def report_refusals() -> Iterator[None]:
    """End with code 2 and one line for errors of the input or the system; Ctrl-C ends with 130."""
    from pytest_dcp.errors import CheckpointError

    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # `pytest-dcp ls ... | head`: click ends without a word
        raise
    except (CheckpointError, OSError, ValueError, TypeError, ImportError) as error:
        text = str(error).strip() or type(error).__name__
        print(f"pytest-dcp: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(REFUSED) from None

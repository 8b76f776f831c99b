"""Pauses the cyclic garbage collector while many small objects are made.

Planning makes tens of thousands of tuples and no cycle. Each of the collector's full passes over a
process that has torch loaded takes longer than the planning itself.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_depth = 0
_was_enabled = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """Switch the collector off inside, in every thread; the last thread to leave switches it on
    again."""
    global _depth, _was_enabled
    with _lock:
        if not _depth:
            _was_enabled = gc.isenabled()
            gc.disable()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth and _was_enabled:
                gc.enable()

"""Counts the changes of loggers in this process: there are hundreds to compare.

Wraps the methods of `logging.Logger` by which code sets one up. A test that empties the list of
handlers of a logger, without a call of a method, is not seen.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

METHODS = ("__setattr__", "addHandler", "removeHandler", "addFilter", "removeFilter")

_count = 0
_is_counting = False


def count() -> int:
    """How many changes there were since the first call, which begins to count."""
    global _is_counting
    if not _is_counting:
        _is_counting = True
        for name in METHODS:
            setattr(logging.Logger, name, _count_calls(getattr(logging.Logger, name)))
    return _count


def _count_calls(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _count
        _count += 1
        return method(*args, **kwargs)

    return counted

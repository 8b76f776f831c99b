"""Futures that follow others."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from typing import Any


def wrap_future(original_result: Any) -> Future[None]:
    """A future that is done when the given one is, or at once for any other result.

    It has the other's exception, but not its value; a cancelled one gives CancelledError.
    """
    following: Future[None] = Future()
    if isinstance(original_result, Future):
        original_result.add_done_callback(lambda original: _follow(original, following))
    else:
        following.set_result(None)
    return following


def _follow(original: Future[Any], following: Future[None]) -> None:
    error = CancelledError() if original.cancelled() else original.exception()
    if error is None:
        following.set_result(None)
    else:
        following.set_exception(error)

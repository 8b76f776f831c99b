"""Copied as test_inherited_marker.py: a module's marker is for its test functions.

>>> documented()
7
"""

from __future__ import annotations

import pytest
from session_recorder import note

pytestmark = pytest.mark.world_size(2)


def documented() -> int:
    """An item that is no test function.

    >>> from pytest_dcp.api import current_rank
    >>> current_rank()
    >>> documented()
    7
    """
    return 7


class TestInClass:
    """In a class, too.

    >>> documented()
    7
    """

    def test_method(self, rank: int, world_size: int) -> None:
        note("ran", rank=rank, size=world_size)

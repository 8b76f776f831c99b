"""Which tests are adopted: all without a world of their own, but for marked and named ones.

Pure (no I/O).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import pytest

MARKER = "dcp_adopt"


def marker_problem(mark: pytest.Mark) -> str:
    """Why a `dcp_adopt` marker cannot be read; empty for a good one."""
    if len(mark.args) == 1 and isinstance(mark.args[0], bool) and not mark.kwargs:
        return ""
    arguments = ", ".join([*map(repr, mark.args), *(f"{k}={v!r}" for k, v in mark.kwargs.items())])
    return f"@pytest.mark.{MARKER} takes True or False, as in {MARKER}(False); got ({arguments})"


def is_chosen(item: pytest.Item, exceptions: Iterable[str]) -> bool:
    """Whether a test's processes become ranks: by its closest marker, else by the exceptions."""
    mark = item.get_closest_marker(MARKER)
    if mark is not None and not marker_problem(mark):
        return bool(mark.args[0])
    return not any(names(pattern, item.nodeid) for pattern in exceptions)


def names(pattern: str, nodeid: str) -> bool:
    """Whether a pattern names a test: as a whole, with wildcards, or as the beginning.

    >>> names("tests/test_elastic.py", "tests/test_elastic.py::TestPool::test_restart")
    True
    >>> names("*::TestPool::*", "tests/test_elastic.py::TestPool::test_restart")
    True
    >>> names("tests/test_el", "tests/test_elastic.py::test_restart")
    False
    """
    begins = nodeid.startswith((f"{pattern}::", f"{pattern}[", f"{pattern.rstrip('/')}/"))
    # Brackets are wildcards in a pattern, and those of a parametrised test in a node id.
    return begins or nodeid == pattern or fnmatchcase(nodeid, pattern)

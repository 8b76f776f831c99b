"""The pipe that `MultiProcessTestCase` gives each rank to ask it for its stacks: not needed here.

The supervisor takes stacks itself. A rank still gets a pipe to listen to, with both ends in itself.
"""

from __future__ import annotations

from typing import Any

from pytest_dcp._harness.rank.foreign_process import open_own_pipe


class RankPipe:
    """Pickles as a pipe that a rank opens itself."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return open_own_pipe, ()


class ParentEnd:
    """The end of the test's own process."""

    closed = False

    def close(self) -> None:
        """There is nothing to close."""
        self.closed = True

    def poll(self, timeout: float = 0.0) -> bool:
        """Nothing comes."""
        return False

    def send(self, value: object) -> None:
        """The rank does not listen to it."""

    def recv(self) -> object:
        """Nothing comes. Raises EOFError."""
        raise EOFError

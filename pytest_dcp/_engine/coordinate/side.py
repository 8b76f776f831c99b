"""One rank's side of an operation, as `Team` uses it.

The ranks form a star: the coordinator in the middle (`CoordinatorSide`), and every other rank
(`PeerSide`) with one connection to it. Each step is one exchange between them.
"""

from __future__ import annotations

from typing import Protocol

from pytest_dcp._engine.coordinate.failure import Cause
from pytest_dcp._engine.coordinate.frame import Head
from pytest_dcp._engine.coordinate.step_values import Combine, LocalResult, Result, StepVerdict

PARTING_S = 1.0
"""How long a rank that leaves waits for its peers to take the reason."""


class Side(Protocol):
    """One rank's side of an operation."""

    def join(self, head: Head) -> StepVerdict | None:
        """Connect to the other side; a verdict if that fails."""

    def exchange(self, head: Head, own: LocalResult, combine: Combine) -> Result | StepVerdict:
        """Give this rank's local result, and wait for the outcome of the step."""

    def trouble(self) -> str | None:
        """The first failure that a peer has reported, in one line; never waits."""

    def leave(self, head: Head, cause: Cause) -> None:
        """Tell the others why this rank leaves, within `PARTING_S`, and close."""

    def close(self) -> None:
        """Leave without a reason. A second call does nothing."""

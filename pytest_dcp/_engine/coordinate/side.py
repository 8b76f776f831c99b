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
        """Get in touch with the other side; a verdict when that is not to be had."""

    def exchange(self, head: Head, own: LocalResult, combine: Combine) -> Result | StepVerdict:
        """State how this rank's work ended, and wait for the outcome of the step."""

    def trouble(self) -> str | None:
        """The first failure that a peer has told of, in one line; never waits."""

    def leave(self, head: Head, cause: Cause) -> None:
        """Tell the others why this rank leaves, within `PARTING_S`, and close."""

    def close(self) -> None:
        """Leave with nothing to say. A second call does nothing."""

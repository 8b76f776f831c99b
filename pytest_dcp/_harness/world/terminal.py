"""Who may have the terminal for a debugger. Pure (no I/O)."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_dcp._harness.protocol.messages import DebugAnswer


@dataclass(slots=True)
class Terminal:
    """Who may have the terminal for a debugger."""

    missing: str = ""
    """Why there is none, for the user; empty when there is one."""
    group: int = 0
    """The process group that may read it."""
    rank: int | None = None
    """The rank that gets it; None: the first that asks, and then always that one."""

    def answer(self, rank: int) -> DebugAnswer:
        """The answer to a rank that asks for the terminal."""
        if self.rank is None:
            self.rank = rank
        if self.missing or self.rank != rank:
            return DebugAnswer(granted=False, error=self.missing)
        return DebugAnswer(granted=True, group=self.group)

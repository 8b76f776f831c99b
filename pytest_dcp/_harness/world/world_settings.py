"""The session's settings for all its worlds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_dcp._harness.protocol.launcher import Launcher
from pytest_dcp._harness.world.terminal import Terminal


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """The session's settings for all its worlds."""

    session: str
    """Unique among all sessions on the machine."""
    folder: Path
    """For rendezvous files and the ranks' tmp_path; on this machine."""
    grace_s: float
    output_limit_bytes: int
    terminal: Terminal
    launcher: Callable[[], Launcher]
    root: str = ""
    """The folder that files are named from."""

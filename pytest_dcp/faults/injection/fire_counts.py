"""State of one injection shared by all ranks of a world: how often it fired, and whether it is
released.

Kept as files in a folder that the ranks share, one appended byte per firing, so that the count is
right in every rank even after a rank was killed the moment it fired.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pytest_dcp.errors import FaultError

POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class FireCounts:
    """The files of one injection."""

    folder: Path
    key: str
    """Prefix of the files' names."""

    def begin(self, rank: int) -> None:
        """Discard this rank's counts from an earlier life, and start at zero."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("released", "overdue", f"fired-{rank}"):
            self._file(name).unlink(missing_ok=True)

    def add(self, rank: int) -> None:
        """Record that the fault fires."""
        fd = os.open(self._file(f"fired-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, b"!")
        finally:
            os.close(fd)

    def count_by_rank(self) -> dict[int, int]:
        """How often it fired in each rank, without ranks in which it did not."""
        files = sorted(self.folder.glob(f"{self.key}.fired-*"))
        return {int(file.name.rpartition("-")[2]): file.stat().st_size for file in files}

    def release(self) -> None:
        """Release every operation that hangs."""
        self._file("released").touch()

    def wait(self, limit_s: float) -> None:
        """Wait until it is released. Raises TimeoutError after the limit, and records that."""
        deadline = time.monotonic() + limit_s
        # A finished test has removed the folder, perhaps before this thread could look.
        while self.folder.is_dir() and not self._file("released").exists():
            if time.monotonic() > deadline:
                self._file("overdue").touch()
                raise TimeoutError(f"no rank released the hung operation within {limit_s:g} s")
            time.sleep(POLL_S)

    def await_firing(self, limit_s: float, what: str) -> None:
        """Wait until it has fired in some rank. Raises FaultError after the limit."""
        deadline = time.monotonic() + limit_s
        while not self.count_by_rank():
            if time.monotonic() > deadline:
                raise FaultError(f"{what} has not fired within {limit_s:g} s")
            time.sleep(POLL_S)

    def is_overdue(self) -> bool:
        """Whether a wait has reached its limit."""
        return self._file("overdue").exists()

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.key}.{name}"

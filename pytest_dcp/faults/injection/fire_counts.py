"""What all ranks of a world know of one injection: how often it fired, and whether it is released.

Files in a folder that the ranks share, so that it is right in every rank, also of one that was
killed the moment it fired: one byte a firing, appended.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pytest_dcp.errors import FaultError

POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Ledger:
    """The files of one injection."""

    folder: Path
    key: str
    """Begins the files' names."""

    def begin(self, rank: int) -> None:
        """Forget what this rank noted in an earlier life, and start with nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("released", "overdue", f"fired-{rank}"):
            self._file(name).unlink(missing_ok=True)

    def add(self, rank: int) -> None:
        """Note that the fault fires."""
        fd = os.open(self._file(f"fired-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, b"!")
        finally:
            os.close(fd)

    def fired(self) -> dict[int, int]:
        """How often it fired in each rank where it did."""
        files = sorted(self.folder.glob(f"{self.key}.fired-*"))
        return {int(file.name.rpartition("-")[2]): file.stat().st_size for file in files}

    def release(self) -> None:
        """Open the gate for all that hang."""
        self._file("released").touch()

    def wait(self, limit_s: float) -> None:
        """Return when it is released. Raises TimeoutError after the limit, and notes that."""
        deadline = time.monotonic() + limit_s
        # A test that is over has taken the folder away, perhaps before this thread could look.
        while self.folder.is_dir() and not self._file("released").exists():
            if time.monotonic() > deadline:
                self._file("overdue").touch()
                raise TimeoutError(f"nobody released the hung operation within {limit_s:g} s")
            time.sleep(POLL_S)

    def await_firing(self, limit_s: float, what: str) -> None:
        """Return when it has fired in some rank. Raises FaultError after the limit."""
        deadline = time.monotonic() + limit_s
        while not self.fired():
            if time.monotonic() > deadline:
                raise FaultError(f"{what} has not fired within {limit_s:g} s")
            time.sleep(POLL_S)

    def is_overdue(self) -> bool:
        """Whether a wait came to its limit."""
        return self._file("overdue").exists()

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.key}.{name}"

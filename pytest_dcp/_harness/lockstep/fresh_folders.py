"""The folders that the ranks of a world share; they are new for each example of a property."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def scratch_beside(checkpoint_dir: Path) -> Path:
    """The ranks' scratch folder, where faults keep their counts, for example."""
    return checkpoint_dir.with_name(f"{checkpoint_dir.name}-scratch")


def renew(checkpoint_dir: Path) -> None:
    """Empty the folders, which must not be in use."""
    for folder in (checkpoint_dir, scratch_beside(checkpoint_dir)):
        with contextlib.suppress(FileNotFoundError):
            with os.scandir(folder) as found:  # for each example: iterdir takes three times as long
                entries = list(found)
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)

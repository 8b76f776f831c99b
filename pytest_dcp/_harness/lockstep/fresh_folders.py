"""Folders that are new for each example of a property: those that the ranks of a world share."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def faults_beside(checkpoint_dir: Path) -> Path:
    """Where ranks keep the counts of injected faults."""
    return checkpoint_dir.with_name(f"{checkpoint_dir.name}-faults")


def renew(checkpoint_dir: Path) -> None:
    """Empty the folders, which must not be in use."""
    for folder in (checkpoint_dir, faults_beside(checkpoint_dir)):
        with contextlib.suppress(FileNotFoundError):
            with os.scandir(folder) as found:  # for each example: iterdir takes three times as long
                entries = list(found)
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)

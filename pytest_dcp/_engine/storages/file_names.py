"""How the data files of a save are named. Pure (no I/O)."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_dcp._torch_internals.checkpoint_classes import _StoragePrefix


@dataclass
class FileNames(_StoragePrefix):
    """How a rank's data files are named; the coordinator sends it in `SavePlan.storage_data`.

    A storage written for torch sees the prefix that torch's writer has there.
    """

    save: str = ""
    """Of this save alone."""


def names_of_rank(rank: int, save_id: str) -> FileNames:
    return FileNames(f"__{rank}_", save_id[:12])

"""How written files become a folder's checkpoint: they get new names, then the index, then a sweep.

One rename puts the index in place, and readers look there first. Since the new files' names differ
from the old ones', a reader finds the old checkpoint or the new one at every instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pytest_dcp._engine.huggingface.folder import leased_name, sweep
from pytest_dcp._engine.huggingface.saves import INDEX_NAME, final_names
from pytest_dcp._engine.io.commit import publish
from pytest_dcp._engine.io.disk import Disk


@contextmanager
def exclude_others(disk: Disk, folder: Any) -> Iterator[None]:
    """Keep other commits, and new readers, out of the folder inside."""
    with disk.locked(folder), disk.between_leases(folder, leased_name(disk, folder)):
        yield


def give_final_names(
    disk: Disk, folder: Any, temporary: Sequence[str], *, sync: bool
) -> dict[str, str]:
    """Give the files their final names; returns these by the temporary names."""
    finals = final_names(temporary, disk.names(folder))
    for name, final in finals.items():
        disk.replace(folder, name, final)
    if sync:
        disk.sync_folder(folder)
    return finals


def publish_index(
    disk: Disk, folder: Any, index: bytes, files: Iterable[str], save: str, *, sync: bool
) -> None:
    """Put the index in place, and remove files that it does not name, after waiting for readers."""
    publish(disk, folder, INDEX_NAME, [index], save, sync=sync, waits=False)
    sweep(disk, folder, files)

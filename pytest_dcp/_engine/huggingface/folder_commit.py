"""How written files become a folder's checkpoint: they get new names, then the index, then a sweep.

One rename puts the index in place, and readers look there first. Since the new files' names differ
from the old ones', a reader finds the old checkpoint or the new one at every instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pytest_dcp._engine.huggingface.file_names import INDEX_NAME, final_names
from pytest_dcp._engine.huggingface.folder import leased_name, sweep
from pytest_dcp._engine.io.commit import publish
from pytest_dcp._engine.io.folder import Folder


@contextmanager
def exclude_others(folder: Folder) -> Iterator[None]:
    """Keep other commits, and new readers, out of the folder inside."""
    with folder.locked(), folder.between_leases(leased_name(folder)):
        yield


def give_final_names(folder: Folder, temporary: Sequence[str], *, sync: bool) -> dict[str, str]:
    """Give the files their final names; returns these by the temporary names."""
    finals = final_names(temporary, folder.names())
    for name, final in finals.items():
        folder.replace(name, final)
    if sync:
        folder.sync()
    return finals


def publish_index(
    folder: Folder, index: bytes, files: Iterable[str], save: str, *, sync: bool
) -> None:
    """Put the index in place, and remove files that it does not name, after waiting for readers."""
    publish(folder, INDEX_NAME, [index], save, sync=sync, waits=False)
    sweep(folder, files)

"""Leftovers of crashed saves and removals in a run's folder: found, and removed at a wish.

Never touched: a folder with an index, whole or damaged, but for notes of a removal that a crash
ended before it began; files and folders that are not this package's; and all, if no step of the run
is whole, since a lost index might then be all that a user looks for.

Assumes that no job saves in the folder: a save that runs looks like one that has crashed. The
run's lock makes sure of it in local folders; an object store has none. There an incremental save
enters a ledger (`shared_files`), and is left alone, crashed or not: the next save ends it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pytest_dcp._engine.format.shared_names import SHARED_FOLDER
from pytest_dcp._engine.io.commit import LEFT_OVER, METADATA, OURS
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.known_steps import ASIDE, KnownSteps
from pytest_dcp._engine.steps.step_folders import LATEST, NOTES, REMOVAL, StepFolders
from pytest_dcp._engine.steps.step_names import step_name
from pytest_dcp._engine.steps.unnamed_files import find_unnamed_files, step_being_saved
from pytest_dcp.errors import CheckpointCorruptError

LeftoverKind = Literal["save", "removal", "quarantined", "file"]
OWN_FILES = frozenset(f"{name}{end}" for name in (NOTES, REMOVAL) for end in ("", ".tmp"))
STALE_NOTES = OWN_FILES - {NOTES}
"""In a folder with an index, of crashes."""
QUARANTINED = re.compile(r"step-\d{8,18}-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder or file of a run that is no part of a step."""

    name: str
    """Below the run's folder."""
    kind: LeftoverKind
    """Of a save or a removal that has not ended; a folder that a save moved aside; a file."""
    nbytes: int
    """Of its files; a file that whole steps share counts, too."""


def find_leftovers(steps: KnownSteps, *, quarantined: bool = False) -> list[Leftover]:
    """The leftovers of crashes; quarantined: and the folders that saves have moved aside."""
    return [leftover for leftover, _ in _search(steps, quarantined=quarantined)]


def remove_leftovers(steps: KnownSteps, *, quarantined: bool = False) -> list[Leftover]:
    """Remove what `find_leftovers` finds. The caller has the run's lock."""
    removed = []
    for leftover, remove in list(_search(steps, quarantined=quarantined)):
        remove()
        removed.append(leftover)
    return removed


def find_foreign_names(folder: Folder) -> list[str]:
    """Names in a step's folder that this package does not make."""
    return [name for name in folder.names() if not _is_own_name(name)]


def _is_own_name(name: str) -> bool:
    return bool(OURS.fullmatch(name) or LEFT_OVER.fullmatch(name)) or name in OWN_FILES


def _search(
    steps: KnownSteps, *, quarantined: bool
) -> Iterator[tuple[Leftover, Callable[[], object]]]:
    if steps.find_latest()[0] is None:
        return
    folders = steps.folders
    saved = step_being_saved(folders)
    for number in folders.numbers():
        folder = folders.folder(number)
        if folder.exists(METADATA):
            yield from _search_notes(folder, step_name(number))
            continue
        if number == saved or folders.is_gone(number) or find_foreign_names(folder):
            continue
        kind: LeftoverKind = "removal" if folder.exists(REMOVAL) else "save"
        leftover = Leftover(step_name(number), kind, _count_bytes(folder, folder.names()))
        yield leftover, partial(steps.remove, number)
    yield from _search_shared(folders)
    temporary = f"{LATEST}.tmp"
    if folders.root.exists(temporary):
        yield Leftover(temporary, "file", 0), partial(folders.root.remove, temporary)
    if quarantined and isinstance(folders.root.disk, LocalDisk):
        yield from _search_quarantine(folders.root)


def _search_notes(
    folder: Folder, folder_name: str
) -> Iterator[tuple[Leftover, Callable[[], object]]]:
    for name in folder.names():
        if name in STALE_NOTES:
            nbytes = _count_bytes(folder, [name])
            yield Leftover(f"{folder_name}/{name}", "file", nbytes), partial(folder.remove, name)


def _search_shared(folders: StepFolders) -> Iterator[tuple[Leftover, Callable[[], object]]]:
    shared = folders.root.below(SHARED_FOLDER)
    for name in find_unnamed_files(folders):
        leftover = Leftover(f"{SHARED_FOLDER}/{name}", "file", _count_bytes(shared, [name]))
        yield leftover, partial(shared.remove, name)


def _search_quarantine(root: Folder) -> Iterator[tuple[Leftover, Callable[[], object]]]:
    aside = Path(root.path) / ASIDE
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(aside.iterdir()):
            if QUARANTINED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                folder = Folder(root.disk, path)
                nbytes = _count_bytes(folder, folder.names())
                leftover = Leftover(f"{ASIDE}/{path.name}", "quarantined", nbytes)
                yield leftover, partial(shutil.rmtree, path)


def _count_bytes(folder: Folder, names: Iterable[str]) -> int:
    total = 0
    for name in names:
        with suppress(OSError, CheckpointCorruptError), folder.open(name) as file:
            total += file.size
    return total

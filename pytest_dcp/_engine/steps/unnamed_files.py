"""Shared files of a run that no step has: left by crashes, hidden by listings.

Changes nothing. The folder is listed before the ledger is read: a listed file was written by a save
that had entered the ledger before. So the files of a save under way are kept.
"""

from __future__ import annotations

from pytest_dcp._engine.format.shared_names import SHARED_FOLDER, save_part, shared_name
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.steps.shared_files import Ledger, Names, own_names, read_ledger
from pytest_dcp._engine.steps.step_folders import StepFolders
from pytest_dcp._engine.storages.folder_metadata import files_named
from pytest_dcp.errors import CheckpointError


def step_being_saved(folders: StepFolders) -> int | None:
    """The step of an incremental save that has not ended, by the ledger of the run's store."""
    ledger = read_ledger(folders.root)
    return None if ledger is None or ledger.saving is None else ledger.saving[0]


def find_unnamed_files(folders: StepFolders) -> list[str]:
    """The names of shared files that no step has; none if that cannot be known."""
    listed = own_names(map(shared_name, folders.root.below(SHARED_FOLDER).names()))
    ledger = read_ledger(folders.root) if listed else None
    if ledger is None:
        return []
    try:
        in_use = _files_in_use(folders, ledger)
    except CheckpointError:
        return []  # an index that cannot be read may name any of them
    save = None if ledger.saving is None else ledger.saving[1]
    return sorted(n for n in listed - in_use if save is None or save_part(shared_name(n)) != save)


def _files_in_use(folders: StepFolders, ledger: Ledger) -> Names:
    """The files of the steps that are there, or are being saved."""
    saving = None if ledger.saving is None else ledger.saving[0]
    in_use = Names()
    for step, names in ledger.files.items():
        if step == saving or folders.folder(step).exists(METADATA):
            in_use |= names
    # A ledger that was lost, and begun anew, lacks steps.
    for step in set(folders.numbers()) - set(ledger.files):
        folder = folders.folder(step)
        if folder.exists(METADATA):
            in_use |= own_names(files_named(folder, METADATA))
    return in_use

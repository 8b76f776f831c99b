"""The folders of a run's steps, on any disk: their names, their notes, their removal.

    run/step-00000100/.metadata, *.distcp    the checkpoint, as `commit` describes it
    run/step-00000100/step.json              its metrics and time, written before the save commits
    run/step-00000100/removal.json           its removal has begun, of these files
    run/latest.json                          the newest step that was saved
    run/shared-data/*.distcp                 data of incremental steps in a store: `shared_files`
    run/shared-data.metadata

A step is there from the moment at which its `.metadata` is, and gone when that is removed: nothing
else decides. A removal first writes `removal.json`, then removes `.metadata`, then the other files,
then the folder. So after a crash

    before `.metadata` is gone    the step is whole, as before
    after it                      the rest is no checkpoint; by the note the next removal knows that
                                  no save is going on here, and ends its work

A store's listing may be out of date: it may omit new objects for a while, and show old ones that
are gone. So `latest.json` names the newest step; it only adds a candidate, and its loss costs
nothing. A removal also takes the names of the files from the index, and notes them for the next.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.shared_files import SharedFiles
from pytest_dcp._engine.steps.small_files import read_small, write_small
from pytest_dcp._engine.steps.step_names import LAST_STEP, number_of, step_name
from pytest_dcp._engine.storages.folder_metadata import files_named
from pytest_dcp.errors import CheckpointError

NOTES = "step.json"
REMOVAL = "removal.json"
LATEST = "latest.json"
DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


@dataclass(frozen=True, slots=True)
class StepNotes:
    """`step.json`."""

    metrics: Mapping[str, float]
    saved_at: datetime | None = None
    """When its save began, by the coordinator's clock. Nothing is decided by it."""

    def to_bytes(self) -> bytes:
        """As JSON; numbers that JSON lacks are text."""
        metrics = {k: v if math.isfinite(v) else str(v) for k, v in self.metrics.items()}
        saved_at = None if self.saved_at is None else self.saved_at.isoformat()
        return json.dumps({"metrics": metrics, "saved_at": saved_at}).encode()

    @staticmethod
    def from_bytes(data: bytes) -> StepNotes:
        """Inverse of `to_bytes`; anything else than such notes is left out."""
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            raw = json.loads(data)
            metrics = {}
            for name, value in dict(raw.get("metrics") or {}).items():
                with suppress(ValueError, TypeError, OverflowError):
                    metrics[str(name)] = float(value)
            saved_at = None
            with suppress(ValueError, TypeError):
                saved_at = datetime.fromisoformat(raw.get("saved_at"))
            return StepNotes(metrics, saved_at)
        return StepNotes({})


class StepFolders:
    """The folders of one run."""

    def __init__(self, root: Folder, checkpoint_id: Any) -> None:
        """checkpoint_id: the run's folder as a caller names it: a Path or a URL."""
        self.root = root
        self._checkpoint_id = checkpoint_id
        self._own_steps: set[int] = set()
        """Steps that this process has saved; a store's listing may lack them."""

    def __str__(self) -> str:
        return str(self._checkpoint_id)

    def checkpoint_id(self, step: int) -> Any:
        """The step's folder, as the verbs take it."""
        return self.path_of(step_name(step))

    def path_of(self, name: str) -> Any:
        """A folder of the run, as the verbs take it."""
        if isinstance(self._checkpoint_id, Path):
            return self._checkpoint_id / name
        return f"{str(self._checkpoint_id).rstrip('/')}/{name}"

    def folder(self, step: int) -> Folder:
        """The step's folder."""
        return self.root.below(step_name(step))

    def shared_files(self, step: int) -> SharedFiles:
        """The files that the step may share with others, in an object store."""
        return SharedFiles(self.root, step)

    def numbers(self) -> list[int]:
        """All steps of which there is a folder, ascending: whole or not."""
        numbers = map(number_of, self.folder_names())
        listed = {step for step in numbers if step is not None}
        unlisted = (self._own_steps | self._latest()) - listed
        return sorted(listed | {n for n in unlisted if self.folder(n).exists(METADATA)})

    def note_start(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's notes, before its save. An earlier removal of the step ends here."""
        folder = self.folder(step)
        folder.make()
        folder.remove(REMOVAL)
        notes = StepNotes(metrics, datetime.now(timezone.utc))
        write_small(folder, NOTES, notes.to_bytes())

    def note_end(self, step: int) -> None:
        """Remember a step that was saved."""
        self._own_steps.add(step)
        write_small(self.root, LATEST, json.dumps({"step": step}).encode())

    def notes(self, step: int) -> StepNotes:
        """A step's notes; empty ones if it has none."""
        return StepNotes.from_bytes(read_small(self.folder(step), NOTES))

    def is_half_removed(self, step: int) -> bool:
        """Whether the step's removal has begun, and it is no checkpoint any more."""
        folder = self.folder(step)
        return folder.exists(REMOVAL) and not folder.exists(METADATA)

    def is_gone(self, step: int) -> bool:
        """Whether there is nothing of the step, though a listing may have shown it."""
        folder = self.folder(step)
        if isinstance(folder.disk, LocalDisk):
            return not Path(folder.path).exists()
        return not (folder.exists(METADATA) or folder.exists(NOTES))

    def remove(self, step: int) -> None:
        """Remove a step; readers that have opened its files go on reading, where files can."""
        folder = self.folder(step)
        self._own_steps.discard(step)
        if folder.exists(METADATA):
            unlisted = _files_of_index(folder)
            _note_removal(folder, unlisted)
            with folder.between_leases(METADATA):
                folder.remove(METADATA)
            folder.sync()
        else:
            unlisted = _files_of_removal(folder)
        self.shared_files(step).remove_step()
        for name in sorted({*folder.names(), *unlisted} - {REMOVAL}):
            folder.remove(name)
        folder.remove(REMOVAL)
        if isinstance(folder.disk, LocalDisk):
            with suppress(OSError):  # a stranger's folder in it, or another job is there already
                _remove_folder(Path(folder.path))
        self.root.sync()

    def _latest(self) -> set[int]:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            step = json.loads(read_small(self.root, LATEST))["step"]
            return {step} if isinstance(step, int) and 0 <= step <= LAST_STEP else set()
        return set()

    def folder_names(self) -> list[str]:
        """All folders in the run's folder; none if it is missing."""
        disk, path = self.root.disk, self.root.path
        if isinstance(disk, LocalDisk):
            with suppress(FileNotFoundError):
                return [entry.name for entry in Path(path).iterdir() if entry.is_dir()]
            return []
        fs: Any = getattr(disk, "fs", None)
        with suppress(FileNotFoundError):
            fs.invalidate_cache(path)
            entries = fs.ls(path, detail=True)
            names = [str(one["name"]) for one in entries if one["type"] == "directory"]
            return [name.rstrip("/").rpartition("/")[2] for name in names]
        return []


def _note_removal(folder: Folder, unlisted: list[str]) -> None:
    """Note that a removal begins. A full disk may have no room for it; the removal makes some.

    A crash then leaves what a crashed save leaves.
    """
    try:
        write_small(folder, REMOVAL, json.dumps({"files": unlisted}).encode())
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise


def _remove_folder(path: Path) -> None:
    """Remove an empty folder, or the link to one: the folder elsewhere stays."""
    if path.is_symlink() and not any(path.iterdir()):
        path.unlink()
    else:
        path.rmdir()


def _files_of_index(folder: Folder) -> list[str]:
    """The files of a step that a store's listing may lack."""
    if isinstance(folder.disk, LocalDisk):
        return []
    with suppress(CheckpointError, FileNotFoundError):
        return [NOTES, *filter(_is_plain_name, files_named(folder, METADATA))]
    return [NOTES]


def _files_of_removal(folder: Folder) -> list[str]:
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        names = list(json.loads(read_small(folder, REMOVAL))["files"])
        return [name for name in names if isinstance(name, str) and _is_plain_name(name)]
    return []


def _is_plain_name(name: str) -> bool:
    """Whether a file of this name is in the folder itself."""
    return name not in ("", ".", "..") and "/" not in name

"""The begin of an incremental save: to which earlier step it may refer, and by which hash.

The coordinator decides (`Increments.begin`) and sends the plan to all ranks, each of which makes
its writer by it (`Increments.writer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_dcp._engine.format.block_hashes import BlockHashes
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.block_hash import BEST_HASH, HASH_MAKERS
from pytest_dcp._engine.steps.earlier_blocks import EarlierStep
from pytest_dcp._engine.steps.file_sharing import FileSharing, Linking, Referring
from pytest_dcp._engine.steps.incremental_writer import IncrementalWriter
from pytest_dcp._engine.steps.known_steps import KnownSteps
from pytest_dcp._engine.steps.link_files import drop_links
from pytest_dcp._engine.steps.retention import require_count
from pytest_dcp._engine.steps.shared_files import own_names, read_ledger
from pytest_dcp._engine.storages.folder_metadata import read_catalog, save_of
from pytest_dcp.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class IncrementPlan:
    """The coordinator's decision for one save."""

    hash_name: str
    earlier: int | None = None
    """The step to refer to; None: this save is a full one."""
    save_id: str = ""
    """Of that step."""
    since_full: int = 0
    """Incremental saves up to that step since one that was written in full."""


@dataclass(frozen=True, slots=True)
class Increments:
    """The rules of one run's incremental saves."""

    full_every: int | None = None
    """At least each save of this number is full; None: only where nothing can be referred to."""

    def __post_init__(self) -> None:
        if self.full_every is not None:
            require_count("full_every=", self.full_every, least=1)

    def begin(self, steps: KnownSteps, step: int) -> IncrementPlan:
        """The plan of a save of this step, before its folder is made. The coordinator's alone."""
        if is_local(steps):
            drop_links(steps.folders.folder(step))
        earlier, problems = steps.find_latest()
        # A step with an index is damaged, not unfinished. An earlier one may have the same file,
        # and may have been read before the damage: referring to it would pass the damage on.
        if earlier is None or any(map(steps.has_index, problems)):
            return IncrementPlan(BEST_HASH)
        try:
            catalog = read_catalog(steps.folders.folder(earlier.number), METADATA)
        except (OSError, CheckpointError):
            return IncrementPlan(BEST_HASH)
        hashes, save_id = BlockHashes.of_catalog(catalog), save_of(catalog.storage_meta)
        if hashes is None or save_id is None or hashes.hash_name not in HASH_MAKERS:
            return IncrementPlan(BEST_HASH)
        if not is_local(steps) and not _is_in_ledger(steps, earlier.number, catalog):
            return IncrementPlan(hashes.hash_name)
        if self.full_every is not None and hashes.since_full + 1 >= self.full_every:
            return IncrementPlan(hashes.hash_name)
        return IncrementPlan(hashes.hash_name, earlier.number, save_id, hashes.since_full)

    @staticmethod
    def writer(steps: KnownSteps, step: int, plan: IncrementPlan) -> IncrementalWriter:
        """This rank's writer of the step."""
        folders, earlier, source = steps.folders, None, None
        if plan.earlier is not None:
            source = folders.folder(plan.earlier)
            earlier = EarlierStep(source, plan.save_id, plan.since_full)
        sharing: FileSharing = Referring(folders.shared_files(step), plan.earlier)
        if is_local(steps):
            sharing = Linking(source, folders.folder(step))
        path, options = folders.checkpoint_id(step), steps.place.options
        return IncrementalWriter(path, plan.hash_name, earlier, sharing, options)

    @staticmethod
    def end(steps: KnownSteps, step: int) -> None:
        """After the save. The coordinator's alone."""
        if not is_local(steps):
            steps.folders.shared_files(step).end_save()


def is_local(steps: KnownSteps) -> bool:
    """Whether the run is in a local folder, where its steps share files by hard links."""
    return isinstance(steps.folders.root.disk, LocalDisk)


def _is_in_ledger(steps: KnownSteps, step: int, catalog: Catalog) -> bool:
    """Whether the ledger has all files of a step that another might share."""
    ledger = read_ledger(steps.folders.root)
    entered = None if ledger is None else ledger.files.get(step)
    return entered is not None and own_names(catalog.places.files) <= entered


def require_no_writer(keywords: Mapping[str, Any]) -> None:
    """Raise ValueError if a save is given a storage of its own."""
    if keywords.get("storage_writer") is not None:
        raise ValueError(
            "storage_writer= cannot be given with incremental=True, which writes by a storage of "
            "its own"
        )

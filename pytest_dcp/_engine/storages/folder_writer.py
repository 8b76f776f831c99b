"""The writer of checkpoints in folders."""

from __future__ import annotations

import dataclasses
import os
import queue
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemBase, SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.catalog_checks import check_catalog
from pytest_dcp._engine.format.write_results import (
    WriteColumns,
    WriteResults,
    join_results,
    places_and_more,
)
from pytest_dcp._engine.io.commit import (
    RANK_METADATA,
    data_name,
    publish,
    sweep,
)
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import observer
from pytest_dcp._engine.io.transforms import StorageWriterTransforms, extensions_of, own_way_of
from pytest_dcp._engine.io.write_files import (
    FileJob,
    Settings,
    Source,
    WriteRequest,
    balance_by_bytes,
    write_files,
)
from pytest_dcp._engine.io.write_safetensors import write_safetensors
from pytest_dcp._engine.plan.capabilities import compares_replicas, gives_data
from pytest_dcp._engine.plan.columns import BYTES, WriteItems
from pytest_dcp._engine.plan.hooks import overridden
from pytest_dcp._engine.plan.index import copy_metadata
from pytest_dcp._engine.planners.save_planner import plain_data
from pytest_dcp._engine.staging.stager import BlockingAsyncStager
from pytest_dcp._engine.staging.unstaged_tensors import unstaged_tensors
from pytest_dcp._engine.storages.file_names import names_of_rank
from pytest_dcp._engine.storages.folder_cleanup import FolderCleanup
from pytest_dcp._engine.storages.folder_metadata import new_id, split_path
from pytest_dcp._engine.storages.local_filesystem import FileSystem
from pytest_dcp._torch_internals.checkpoint_classes import StreamTransformExtension
from pytest_dcp.errors import CheckpointCorruptError, CheckpointExistsError
from pytest_dcp.tracebacks import warn_caller

CURRENT_DCP_VERSION = "1.0.0"
"""torch 2.13's entry in the metadata."""
STAGING_HOOKS = ("stage", "synchronize_staging", "should_synchronize_after_execute")


def _ignore() -> None:
    """Nothing waits for rows."""


class FileSystemWriter(FolderCleanup, StorageWriter, BlockingAsyncStager):
    """Writes a checkpoint to a folder, and makes it the folder's checkpoint atomically.

    The data files' names are unique to the save; an old checkpoint stays whole and loadable until
    the new one has replaced it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[StreamTransformExtension] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
    ) -> None:
        """As torch's. path: the checkpoint's folder; created if missing.
        single_file_per_rank: one file for each rank and thread, instead of one for each item.
        sync_files: wait for stable storage, of files and folder, before the save is committed.
        thread_count: files of a rank that are written at the same time.
        per_thread_copy_ahead: bytes of a tensor outside flat CPU memory that are copied at a time.
        cache_staged_state_dict: keep the memory of `stage` for the next save of the same state.
        overwrite: whether an existing checkpoint may be replaced; if not, the save raises
            CheckpointExistsError and changes nothing.
        """
        StorageWriter.__init__(self)
        BlockingAsyncStager.__init__(self, cache_staged_state_dict)
        self.fs: FileSystemBase = FileSystem()
        self.path = self.fs.init_path(path)
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.thread_count = thread_count
        self.per_thread_copy_ahead = per_thread_copy_ahead
        self.overwrite = overwrite
        self.transforms = StorageWriterTransforms(_extensions)
        self.serialization_format = serialization_format
        self.save_id = new_id()
        self._used = False
        self._created_files = {}
        self._cleaned_for = None
        self._parent_dirs_to_sync: Sequence[Any] = ()
        """The parents of the folder whose new names may not be synced yet."""
        self.rank = None
        self.use_collectives = True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, to the given folder or the same one."""
        if checkpoint_id:
            self._point_at(checkpoint_id)
        self.new_save_id()

    def _point_at(self, checkpoint_id: str | os.PathLike[str]) -> None:
        self.path = self.fs.init_path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Set this rank's number, and whether all ranks commit together."""
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan, after making the folder and checking that it may be written to."""
        self._make_folder()
        if self._metadata_exists():
            if not self.overwrite:
                raise CheckpointExistsError(
                    f"Checkpoint already exists and self.overwrite=False: {self.path}"
                )
            warn_caller(
                f"Detected an existing checkpoint in {self.path}, overwriting since "
                "self.overwrite=True: it stays whole until the new one has replaced it.",
            )
        if self.rank is not None and not self.use_collectives:
            plan = dataclasses.replace(plan, storage_data=names_of_rank(self.rank, self.save_id))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans, each with the names of its files; removes leftovers of dead saves first."""
        self.remove_leftovers()
        return [
            plan
            if plan.storage_data is not None
            else dataclasses.replace(plan, storage_data=names_of_rank(rank, self.save_id))
            for rank, plan in enumerate(plans)
        ]

    def _metadata_exists(self) -> bool:
        """Whether the folder has a checkpoint that this save would replace: torch's hook."""
        disk = self._disk()
        folder, name = self._metadata_place(disk, None)
        if folder.exists(name):
            return True
        if self.use_collectives:
            return any(map(RANK_METADATA.fullmatch, self._folder().names()))
        # Only this rank's: other ranks may have just committed theirs.
        folder, name = self._metadata_place(disk, self.rank)
        return folder.exists(name)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items; finished when it returns the future."""
        items = plan.items
        table = WriteItems.of(items)
        size_bytes = table.size_bytes()
        if self.single_file_per_rank:
            groups = balance_by_bytes(size_bytes, self.thread_count)
        else:
            groups = [[row] for row in range(len(items))]
        data = np.where(table.kind == BYTES, 0, size_bytes)
        name = self._data_namer(plan.storage_data)
        jobs = [
            FileJob(name(number), rows, int(data[rows].sum())) for number, rows in enumerate(groups)
        ]
        self._used = True
        jobs, done = self._write_unstaged_first(jobs, table, planner)
        return _done(self._write_jobs(self._registering_folder(), jobs, items, planner, done))

    def _write_unstaged_first(
        self, jobs: list[FileJob], items: WriteItems, planner: SavePlanner
    ) -> tuple[list[FileJob], Callable[[], None]]:
        """The jobs, with the rows first whose memory the caller of the save waits for.

        The function is called by each of these jobs when it has written those rows.
        """
        unstaged = unstaged_tensors(self)
        in_order = self.serialization_format == SerializationFormat.TORCH_SAVE
        if unstaged is None or not in_order or overridden(self, FileSystemWriter, ("write_data",)):
            return jobs, _ignore
        lookup = planner.lookup(items) if compares_replicas(planner) else None
        if lookup is None:
            return jobs, _ignore
        awaited = [unstaged.hold(lookup(row)) for row in range(len(items))]
        jobs = [
            dataclasses.replace(
                job,
                rows=sorted(job.rows, key=lambda row: not awaited[row]),
                awaited=sum(awaited[row] for row in job.rows),
            )
            for job in jobs
        ]
        pending = [job.name for job in jobs if job.awaited]
        if not pending:
            unstaged.finish_writing()

        def done() -> None:
            pending.pop()  # atomic: each job takes one
            if not pending:
                unstaged.finish_writing()

        return jobs, done

    def _data_namer(self, storage_data: Any) -> Callable[[int], str]:
        """The name of the n-th file, from the plan, or from this writer if the plan was made by
        hand."""
        prefix = getattr(storage_data, "prefix", f"__{self.rank or 0}_")
        save = getattr(storage_data, "save", "") or self.save_id[:12]
        return lambda number: data_name(prefix, number, save)

    def _write_jobs(
        self,
        folder: Folder,
        jobs: Sequence[FileJob],
        items: Sequence[WriteItem],
        planner: SavePlanner,
        awaited_rows_done: Callable[[], None] = _ignore,
    ) -> WriteResults:
        """Write the items to these files; returns where each went."""
        watcher = observer("save")
        watcher.expect(sum(job.nbytes for job in jobs))
        settings = Settings(
            sync=self.sync_files,
            threads=self.thread_count,
            copy_ahead_bytes=self.per_thread_copy_ahead,
            transforms=extensions_of(self.transforms),
            through=own_way_of(self.transforms, items),
        )
        source = source_of(planner, items)
        request = WriteRequest(folder, jobs, source, settings, watcher, awaited_rows_done)
        written = self._write_request(request, items)
        self._sync_parent_dirs()
        return WriteResults(items, written)

    def _write_request(self, request: WriteRequest, items: Sequence[WriteItem]) -> WriteColumns:
        """Write the files, in the save's format; returns where every row is."""
        if self.serialization_format == SerializationFormat.SAFETENSORS:
            return write_safetensors(request, items)
        return write_files(request)

    def _write_data(
        self, planner: SavePlanner, file_queue: queue.Queue[Any]
    ) -> Future[list[WriteResult]]:
        """Write the files of a queue: torch's hook, which a `write_data` of a subclass calls.

        file_queue: for each file its path, its name in the metadata, and its items. The caller
        chooses the names: a save over another one with the same names has no old checkpoint to fall
        back to.
        """
        parts: list[WriteResults] = []
        self._used = True
        while not file_queue.empty():
            path, name, items = file_queue.get_nowait()
            table = WriteItems.of(items)
            folder, own_name = split_path(path)
            target = self._registering_folder(folder)
            nbytes = int(np.where(table.kind == BYTES, 0, table.size_bytes()).sum())
            job = FileJob(own_name, range(len(table)), nbytes)
            part = self._write_jobs(target, [job], items, planner)
            results = dataclasses.replace(part.written, files=(name,))
            parts.append(WriteResults(part.items, results))
        return _done(join_results(parts))

    def _make_folder(self) -> None:
        """Make the folder; sync the folders that have new folders' names. See
        `_sync_parent_dirs`."""
        above = self._folder().make()
        self._parent_dirs_to_sync = above[:1]
        self._sync(above[1:])

    def _sync_parent_dirs(self) -> None:
        """Make the folder's name durable, after the files, whose sync has done most of the work."""
        self._sync(self._parent_dirs_to_sync)

    def _sync(self, paths: Sequence[Any]) -> None:
        """Sync these folders, if `sync_files` is set."""
        if self.sync_files:
            disk = self._disk()
            for path in paths:
                disk.sync_folder(path)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: from here on the folder's checkpoint is this save's."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_meta = self._meta()
        catalog = Catalog.of(copy_metadata(metadata, storage_data=None))
        own = self._registering_folder()
        places, beside = places_and_more(catalog.index, results)
        if beside:
            # Their files are also part of the checkpoint, and are not swept.
            present = set(own.names()) - set(places.files)
            beside_names = {place.relative_path for place in beside.values()}
            places = dataclasses.replace(
                places, files=(*places.files, *sorted(present & beside_names))
            )
        catalog = dataclasses.replace(catalog, places=places, beside=beside)
        check_catalog(catalog)
        metadata.storage_data = catalog.metadata().storage_data
        alone = self.rank if not self.use_collectives else None
        folder, name = self._metadata_place(own.disk, alone)
        content = metadata_file.encode(catalog)
        with own.locked():
            self._check_written(own, catalog)
            publish(folder, name, content, self.save_id[:12], sync=self.sync_files)
            self._clean(partial(sweep, rank=alone))

    def storage_meta(self) -> StorageMeta | None:
        """The place and id of the current save."""
        if self._used:
            # Another save of the same writer must not reuse the file names of the last one.
            self.new_save_id()
        return self._meta()

    def new_save_id(self) -> str:
        """A new id for the next save."""
        self.set_save_id(new_id())
        return self.save_id

    def set_save_id(self, save_id: str) -> None:
        """Set the id of the next save."""
        self.save_id, self._used, self._created_files = save_id, False, {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state dict on the CPU, which can be written without copying again."""
        self.skip_stage()
        return super().stage(state_dict)

    def must_stage(self) -> bool:
        """Whether `async_save` must copy by `stage`: it is overridden, or an option asks for it."""
        return (
            self.cache_staged_state_dict
            or overridden(self, FileSystemWriter, STAGING_HOOKS)
            or self.should_synchronize_after_execute
        )

    def skip_stage(self) -> None:
        """Prepare to write a state that is all in CPU memory: nothing is copied again."""
        self.per_thread_copy_ahead = 0

    @property
    def metadata_path(self) -> str | os.PathLike[str]:
        """The metadata file of the whole checkpoint, under the name of torch before 2.7."""
        return self._get_metadata_path()

    def _meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    def _check_written(self, folder: Folder, catalog: Catalog) -> None:
        """Raise unless every file that the metadata will name exists."""
        present = set(folder.names())
        missing = [name for name in catalog.places.files if present and name not in present]
        # A store's listing may be out of date.
        absent = [name for name in missing if not folder.exists(name)]
        if absent:
            raise CheckpointCorruptError(
                "a data file of this save is gone before the commit: does another save write to "
                "the same folder?",
                file=absent[0],
            )


def source_of(planner: SavePlanner, items: Sequence[Any]) -> Source:
    """A function that gives the data of an item: the planner's `source`, or its hook."""
    if gives_data(planner):
        return planner.source(items)

    def resolved(row: int) -> torch.Tensor | bytes:
        return plain_data(items[row].index.fqn, planner.resolve_data(items[row]))

    return resolved


def _done(results: list[WriteResult]) -> Future[list[WriteResult]]:
    future: Future[list[WriteResult]] = Future()
    future.set_result(results)
    return future

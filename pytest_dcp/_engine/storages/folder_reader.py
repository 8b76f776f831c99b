"""The reader of checkpoints in folders."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.memory_limit import MemoryLimit
from pytest_dcp._engine.io.checked_ranges import Verify
from pytest_dcp._engine.io.commit import metadata_name
from pytest_dcp._engine.io.disk import Disk, is_remote
from pytest_dcp._engine.io.entry_places import (
    LocatedEntries,
)
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.open_files import OpenFiles
from pytest_dcp._engine.io.plan_entries import files_of
from pytest_dcp._engine.io.progress_observer import observer
from pytest_dcp._engine.io.read_copies import BYTES_PER_THREAD, ReadSettings
from pytest_dcp._engine.io.read_streams import Streams, read_streams
from pytest_dcp._engine.io.stored_items import ItemSource
from pytest_dcp._engine.io.transforms import FileSlice, StorageReaderTransforms
from pytest_dcp._engine.plan.capabilities import LoadPlannerCapabilities
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.hooks import is_overridden
from pytest_dcp._engine.plan.index import copy_metadata
from pytest_dcp._engine.planners.load_capabilities import ask_load_planner
from pytest_dcp._engine.storages import local_filesystem
from pytest_dcp._engine.storages.folder_metadata import (
    FolderOfCheckpoint,
    new_id,
    read_catalog,
    save_of,
)
from pytest_dcp._engine.storages.load_into_targets import LoadedBytes, Work, resolve
from pytest_dcp._engine.storages.local_filesystem import FileSystem
from pytest_dcp._engine.storages.reads_for_others import ReadsForOthers
from pytest_dcp._torch_internals.checkpoint_classes import ExtensionRegistry
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointFileMissingError,
    CheckpointReplacedError,
)


class FileSystemReader(FolderOfCheckpoint, ReadsForOthers, StorageReader):
    """Reads checkpoints from folders, by this engine or by torch 2.0 to 2.13."""

    verify: Verify = "auto"
    filled = LoadedBytes()
    """What the last `read_data` read."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: ExtensionRegistry | None = None,
        *,
        verify: Verify = "auto",
        thread_count: int | None = None,
        max_decoded_bytes: int | None = None,
        follow_links: bool = False,
    ) -> None:
        """Like torch's, and:

        verify: "auto" checks every block of 64 KiB that is read whole, "full" reads blocks whole
            so that every byte is checked, "off" checks nothing. Only our own checkpoints have
            checksums.
        thread_count: threads that read; None: as many as there are cores for this rank, at most 4,
            and on a local disk only as many as pay for the bytes to read.
        max_decoded_bytes: the most memory that reading `.metadata` or a compressed value may take;
            None: 64 MiB, plus 20 bytes for each byte stored. Raise it for a checkpoint that you
            trust.
        follow_links: whether a file of the checkpoint may be a symbolic link to a plain file
            outside the folder, for folders whose maker you trust.
        """
        super().__init__()
        self.follow_links = follow_links
        self.fs: FileSystemBase = FileSystem(follow_links=follow_links)
        self.path = self.fs.init_path(path)
        self.verify = checked_verify(verify)
        self.thread_count = thread_count
        self.memory = MemoryLimit(max_decoded_bytes)
        self.transforms = StorageReaderTransforms(_extension_registry)
        self.storage_data: Any = {}
        """Where the entries are: from the metadata, unless it was set."""
        self.load_id = new_id()
        self.rank: int | None = None
        self.use_collectives = True
        self._metadata: Metadata | None = None
        self._places: EntryPlaces | None = None
        """Of the metadata read last."""
        self._open_files: OpenFiles | None = None
        self._prepared: tuple[LoadPlan, Work] | None = None
        """The result of `prepare_data`, for the plan passed to it."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load, from the given folder or the same one."""
        if checkpoint_id:
            self._point_at(checkpoint_id)
        self.load_id = new_id()
        self._metadata, self.storage_data = None, {}
        self._prepared = self._offered = None
        self._places = None
        self.close_files()

    def _point_at(self, checkpoint_id: str | os.PathLike[str]) -> None:
        self.path = self.fs.init_path(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the whole checkpoint, or of `rank` if each rank saved on its own.

        Raises FileNotFoundError if there is none, CheckpointCorruptError if it is damaged.
        """
        folder, name = self._metadata_place(self._disk(), kwargs.get("rank"))
        catalog = read_catalog(folder, name, self.memory)
        self._places = catalog.places
        metadata = catalog.metadata()
        meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta = copy.copy(meta)
        metadata.storage_meta.load_id = self.load_id
        return metadata

    @property
    def has_manifest(self) -> bool:
        """Whether the metadata read last was written by this engine."""
        return self._places is not None and bool((self._places.data_start >= 0).any())

    @property
    def may_hold_wrappers(self) -> bool:
        """Whether entries of the metadata read last must be parsed."""
        places = self._places
        if places is None:
            return False
        return bool(((places.data_start < 0) & (places.file >= 0)).any())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Set the metadata from which plans will be made."""
        if metadata.storage_data is None:
            raise ValueError("the metadata has no storage_data: it does not say where anything is")
        self._metadata, self.storage_data = metadata, metadata.storage_data
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    @property
    def ignores_plans(self) -> bool:
        """Whether the plans of all ranks need not be gathered: unless a subclass wants them."""
        return not is_overridden(self, FileSystemReader, "prepare_global_plan")

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def leased(self, rank: int) -> AbstractContextManager[None]:
        """Hold off the next save's commit for some seconds, if the storage can do that."""
        disk = self._disk()
        folder, name = self._metadata_place(disk, None)
        if not folder.exists(name):
            folder, name = self._metadata_place(disk, rank)
        return folder.leased(name)

    def keep_files(self) -> None:
        """Keep files that are opened from now on open until `close_files`.

        Does nothing if a subclass reads in its own way.
        """
        disk = self._disk()
        self.close_files()
        if isinstance(disk, LocalDisk) and not self._overrides_read_data():
            self._open_files = OpenFiles(disk, self.path)

    def open_files(self, plan: LoadPlan) -> bool:
        """Open the files of the plan, so that they can be read even if another save removes them.

        Returns whether all are open now, so that no save can disturb the plan. Raises
        CheckpointReplacedError if another save has removed one already. Any other file that cannot
        be opened is left to `read_data`.
        """
        files = self._open_files
        if self._metadata is None or files is None:
            return False
        for name in files_of(self._catalog_of(self._metadata), ReadItems.of(plan.items)):
            try:
                files.keep(name)
            except FileNotFoundError as error:
                files.complete = False
                if self._is_replaced(self._metadata):
                    raise self._replaced_error() from error
            except (OSError, CheckpointCorruptError):
                files.complete = False
        return files.complete

    def close_files(self) -> None:
        """Close files kept open."""
        if self._open_files is not None:
            self._open_files.close()
            self._open_files = None

    def _forget_files(self) -> None:
        """Close the files kept open, if any, and begin again."""
        if self._open_files is not None:
            self.keep_files()

    def _disk(self) -> Disk:
        return local_filesystem.disk_of(self.fs)

    def _folder(self) -> Folder:
        """The folder, using the files kept open if there are any."""
        return Folder(self._open_files or self._disk(), self.path)

    def _overrides_read_data(self) -> bool:
        return self._overrides_streams() or is_overridden(self, FileSystemReader, "read_data")

    def _replaced_error(self) -> CheckpointReplacedError:
        return CheckpointReplacedError(
            f"the checkpoint in {self.path} was replaced while it was being loaded, and "
            "its files are gone: load again"
        )

    def prepares(self) -> bool:
        """Whether `read_data` continues from `prepare_data`: not if a subclass overrides it."""
        return not is_overridden(self, FileSystemReader, "read_data")

    def prepare_data(
        self, plan: LoadPlan, planner: LoadPlanner, capabilities: LoadPlannerCapabilities
    ) -> None:
        """Read and check values that may not fit their target, and change nothing; `read_data`
        continues.

        capabilities: of the planner, as they were when the load began.

        Raises CheckpointMismatchError, naming every key, for values that do not fit.
        """
        if self._metadata is not None and not self._overrides_streams():
            with self._noticing_a_replacement():
                work = self._take_offered(plan)
                if work is None:
                    catalog = self._catalog_of(self._metadata)
                    work = self._work_of(catalog, plan, planner, capabilities)
                work.judge()
                self._prepared = plan, work

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into the planner's targets; finished when it returns the
        future."""
        prepared, self._prepared = self._prepared, None
        with self._noticing_a_replacement():
            if prepared is not None and prepared[0] is plan:
                self.filled = prepared[1].run()
            elif (offered := self._take_offered(plan)) is not None:
                offered.judge()
                self.filled = offered.run()
            elif self._metadata is None or self._overrides_streams():
                self.filled = self._read_streams(plan, planner)
            else:
                self.filled = self._fill(self._catalog_of(self._metadata), plan, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @contextmanager
    def _noticing_a_replacement(self) -> Iterator[None]:
        """Raise a clearer error if a data file is missing because another save replaced the
        checkpoint."""
        try:
            yield
        except CheckpointFileMissingError as error:
            if self._metadata is not None and self._is_replaced(self._metadata):
                raise self._replaced_error() from error
            raise

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """An entry within its file: torch's hook, for subclasses."""
        return cast(IO[bytes], FileSlice(file, sinfo.offset, sinfo.length))

    def _catalog_of(self, metadata: Metadata) -> Catalog:
        """The catalog of the metadata, with the current places of `storage_data`."""
        return Catalog.of(copy_metadata(metadata, storage_data=self.storage_data))

    def _fill(self, catalog: Catalog, plan: LoadPlan, planner: LoadPlanner) -> LoadedBytes:
        work = self._work_of(catalog, plan, planner, ask_load_planner(planner))
        work.judge()
        return work.run()

    def _work_of(
        self,
        catalog: Catalog,
        plan: LoadPlan,
        planner: LoadPlanner,
        capabilities: LoadPlannerCapabilities,
        located: Sequence[LocatedEntries] = (),
    ) -> Work:
        source = ItemSource(
            self._folder(),
            catalog,
            read_settings(self._folder(), self.verify, self.thread_count, self.memory),
            self.transforms.extension_registry,
            observer("load"),
            located,
        )
        return resolve(source, ReadItems.of(plan.items), planner, capabilities)

    def _overrides_streams(self) -> bool:
        """Whether a subclass's hook is called between a file and its entries."""
        return type(self.transforms) is not StorageReaderTransforms or is_overridden(
            self, FileSystemReader, "_slice_file"
        )

    def _read_streams(self, plan: LoadPlan, planner: LoadPlanner) -> LoadedBytes:
        streams = Streams(
            lambda name: self.fs.create_stream(self.fs.concat_path(self.path, name), "rb"),
            self._slice_file,
            self.transforms.transform_load_stream,
        )
        watcher, places = observer("load"), self.storage_data
        nbytes = read_streams(streams, plan.items, places, planner, watcher, self.memory)
        return LoadedBytes(nbytes, nbytes, 0)

    def _is_replaced(self, metadata: Metadata) -> bool:
        """Whether the folder's checkpoint is from a different save than the metadata."""
        disk = self._disk()
        folder, name = self._metadata_place(disk, None if self.use_collectives else self.rank)
        try:
            now = read_catalog(folder, name, self.memory)
        except FileNotFoundError:
            # A save with one metadata file was replaced by one with a file per rank, or the
            # reverse.
            other = metadata_name(0 if self.use_collectives else None)
            return disk.exists(self.path, other)
        return save_of(now.storage_meta) != save_of(metadata.storage_meta)


def checked_verify(verify: str) -> Verify:
    """The setting; raises ValueError if it is invalid."""
    if verify not in ("auto", "full", "off"):
        raise ValueError(f"verify must be 'auto', 'full' or 'off', got {verify!r}")
    return cast(Verify, verify)


def read_settings(
    folder: Folder, verify: Verify, thread_count: int | None, memory: MemoryLimit
) -> ReadSettings:
    """How to read this folder's data; thread_count: as for FileSystemReader."""
    # Over a network a thread waits more than it copies: all of them, however few the bytes.
    use_all = thread_count is not None or is_remote(folder.disk, folder.path)
    return ReadSettings(
        verify,
        thread_count or reader_threads(),
        bytes_per_thread=0 if use_all else BYTES_PER_THREAD,
        memory=memory,
    )


def reader_threads() -> int:
    """Reader threads for this rank: its share of the cores that it may use, at most 4."""
    cores = operating_system.usable_cores()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(1, min(4, cores // max(ranks, 1)))

"""Checkpoints as Hugging Face keeps them: safetensors files and `model.safetensors.index.json`.

Names, arguments and files are those of `torch.distributed.checkpoint.hf_storage`; what a folder
must be to be one checkpoint is in `huggingface.folder`, and how a save becomes it in
`huggingface.saves`.
"""

from __future__ import annotations

import dataclasses
import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.catalog_checks import checked_path
from pytest_dcp._engine.format.write_results import WriteResults, whole_places_of
from pytest_dcp._engine.huggingface.consolidate import Shards, consolidate
from pytest_dcp._engine.huggingface.folder import (
    encode_index,
    files_in_force,
    is_replaceable,
    leased_name,
    look_of,
    next_number,
    read_files,
    read_folder,
    remove_leftovers,
    save_named_in,
    sweep,
)
from pytest_dcp._engine.huggingface.safetensors_file import SafetensorsFile
from pytest_dcp._engine.huggingface.saves import (
    FILES_KEY,
    INDEX_NAME,
    LEFT_OVER,
    NUMBER_KEY,
    SAVE_KEY,
    SUFFIX,
    data_name,
    final_names,
    is_temporary,
    save_of,
    temporary_name,
)
from pytest_dcp._engine.io.commit import publish
from pytest_dcp._engine.io.disk import Disk
from pytest_dcp._engine.io.file_queue import FileQueue
from pytest_dcp._engine.io.load_into_targets import Filled
from pytest_dcp._engine.io.progress_observer import observer
from pytest_dcp._engine.io.read_streams import items_by_file
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.io.write_files import FileJob, Settings
from pytest_dcp._engine.io.write_safetensors import write_safetensors
from pytest_dcp._engine.plan.columns import BYTES, WriteItems
from pytest_dcp._engine.plan.hooks import is_overridden, overridden
from pytest_dcp._engine.plan.index import copy_metadata
from pytest_dcp._engine.storages.folder_reader import FileSystemReader
from pytest_dcp._engine.storages.folder_writer import (
    CURRENT_DCP_VERSION,
    FileSystemWriter,
    source_of,
)
from pytest_dcp._engine.storages.local_filesystem import disk_of
from pytest_dcp._engine.storages.local_filesystem import save_of as save_of_meta
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointReplacedError,
    PlanError,
)

__all__ = ["HuggingFaceStorageWriter", "HuggingFaceStorageReader"]

SHARDED_FOLDER = "sharded"
FORMAT = {"DCP_VERSION": "1.0", "format": "pt"}
"""What torch 2.13 writes into each file; other libraries ask for the format."""
SHOWN = 10


class HuggingFaceStorageWriter(FileSystemWriter):
    """Writes a state dict of tensors to safetensors files."""

    def __init__(
        self,
        path: str,
        fqn_to_index_mapping: dict[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
    ) -> None:
        """As torch's.

        path: the checkpoint's folder.
        fqn_to_index_mapping: the number, from 1, of the file that each tensor goes to; None: all
            to one.
        thread_count: files of a rank that are written at the same time.
        save_distributed: every rank writes its shards to files of its own. If not, the tensors must
            be whole, and an index says where each is.
        enable_consolidation: write the shards to `path/sharded`, and from them files of full
            tensors, with an index, to `path`.
        thread_count_consolidation: full files that are written at the same time.
        """
        super().__init__(
            path=path,
            serialization_format=SerializationFormat.SAFETENSORS,
            thread_count=thread_count,
        )
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.consolidated_output_path: str | None = None
        self.thread_count_consolidation = thread_count_consolidation
        self._layout = _FolderLayout([], 1)
        self._place(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, to the given folder or the same."""
        super().reset()
        if checkpoint_id:
            self._place(checkpoint_id)

    def _place(self, folder: str | os.PathLike[str]) -> None:
        self.path = self.fs.init_path(folder)
        if self.enable_consolidation:
            self.consolidated_output_path = str(self.path)
            self.path = self.fs.concat_path(self.path, SHARDED_FOLDER)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan; the folder is there."""
        if not self.use_collectives:
            raise ValueError(
                "a folder of safetensors files is one checkpoint of all ranks: "
                "save it with use_collectives=True"
            )
        self._make_folder(self._disk())
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans, each with what its rank must know to name its files.

        Raises PlanError naming what such files cannot hold or what no file is meant for, and
        CheckpointExistsError where the folder holds files that the shards would mix with.
        """
        if all(plan.usable for plan in plans):
            tables = [WriteItems.of(plan.items) for plan in plans]
            _check(tables, self.fqn_to_index_mapping, whole=not self.save_distributed)
            self._layout = _layout(tables, self.fqn_to_index_mapping, self.save_distributed)
        self.remove_leftovers()
        if self.save_distributed:
            self._refuse_strangers()
        shared: dict[str, Any] = {
            "save_id": self.save_id[:12],
            "highest": self._layout.highest,
            "number": next_number(self._disk(), self.path),
        }
        if self.fqn_to_index_mapping is not None:
            shared["fqn_to_index_mapping"] = self.fqn_to_index_mapping
        told = []
        for rank, plan in enumerate(plans):
            own: dict[str, Any] = {"numbers": self._layout.numbers[rank]}
            if self.save_distributed:
                own = {**own, "shard_index": rank + 1, "ranks": len(plans)}
            told.append(dataclasses.replace(plan, storage_data=shared | own))
        counts = [
            _count_files(plan, self._split(plan.items, plan.storage_data))
            for plan in told
            if len(plan.items)
        ]
        shared = {"files": sum(counts)}
        return [dataclasses.replace(p, storage_data=p.storage_data | shared) for p in told]

    def _remove_leftovers(self, disk: Disk) -> None:
        if any(map(LEFT_OVER.fullmatch, disk.names(self.path))):
            with disk.locked(self.path):
                remove_leftovers(disk, self.path)

    def _committed(self, disk: Disk, folder: Any) -> set[str]:
        return files_in_force(disk, folder)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors, under temporary names; done when the future is returned."""
        future: Future[list[WriteResult]] = Future()
        disk = self._registering_disk()
        if not len(plan.items):
            self._sync_name(disk)
            future.set_result([])
            return future
        said: Mapping[str, Any] = plan.storage_data or {}
        table = WriteItems.of(plan.items)
        save_id = said.get("save_id")
        # Only a plan of `prepare_global_plan` says how to tell a whole save from others.
        jobs = [
            FileJob(name if save_id is None else temporary_name(name, save_id), rows)
            for name, rows in _files(table.fqns, said, self._split(plan.items, said)).items()
        ]
        watcher = observer("save")
        watcher.expect(int(table.size_bytes().sum()))
        settings = Settings(self.sync_files, self.thread_count, self.per_thread_copy_ahead)
        written = write_safetensors(
            disk,
            self.path,
            jobs,
            source_of(planner, plan.items),
            settings,
            watcher,
            table,
            {SAVE_KEY: save_id or self.save_id[:12], **_stated_save(said), **FORMAT},
        )
        self._sync_name(disk)
        results: Any = WriteResults(plan.items, written)
        future.set_result(results)
        return future

    def _split_by_storage_plan(
        self, storage_plan: dict[str, int] | None, items: list[WriteItem]
    ) -> dict[int, list[WriteItem]]:
        """The items of each file, by its number from 1: torch's hook, for subclasses.

        storage_plan: the number of each tensor's file; None: all go to the first.
        """
        if storage_plan is None:
            return {1: items}
        files: dict[int, list[WriteItem]] = {}
        for item in items:
            if item.index.fqn not in storage_plan:
                raise PlanError(f"{item.index.fqn!r} is not in fqn_to_index_mapping")
            files.setdefault(storage_plan[item.index.fqn], []).append(item)
        return files

    def _split(self, items: Sequence[WriteItem], said: Mapping[str, Any]) -> list[int] | None:
        """The number of each item's file, where a subclass says it; None: as the mapping says."""
        if not is_overridden(self, HuggingFaceStorageWriter, "_split_by_storage_plan"):
            return None
        known = list(items)
        split = self._split_by_storage_plan(said.get("fqn_to_index_mapping"), known)
        number = {item.index: at for at, some in split.items() for item in some}
        if lost := [item.index.fqn for item in known if item.index not in number]:
            raise PlanError(
                f"{len(lost)} item(s) are in no file of {type(self).__name__}."
                f"_split_by_storage_plan: {lost[:SHOWN]}"
            )
        return [number[item.index] for item in known]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Give the files their names, consolidate if asked to, write the index, remove the old."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_meta = StorageMeta(self.checkpoint_id, self.save_id)
        catalog = Catalog.of(copy_metadata(metadata, storage_data=None))
        results = [some for some in results if len(some)]
        catalog = _data_only(
            dataclasses.replace(catalog, places=whole_places_of(catalog.index, results))
        )
        disk = self._registering_disk()
        # A planner that remembers plans may have given the ranks those of an earlier save.
        whose = (save_of(name) for name in catalog.places.files if is_temporary(name))
        save_id: str | None = next(whose, self.save_id[:12])
        files = catalog.places.files
        if files and not any(map(is_temporary, files)):
            # Of results made by hand: the files may be another program's, or not there yet.
            save_id = save_named_in(disk, self.path, files)
        with self._replacing(disk, self.path):
            catalog = self._renamed(disk, self.path, catalog)
            metadata.storage_data = catalog.metadata().storage_data
            files = catalog.places.files
            if self.save_distributed:
                self._commit_shards(disk, files)
            else:
                nbytes = int(catalog.places.data_nbytes.sum())
                index = encode_index(_files_of_tensors(catalog), nbytes, save_id)
                self._publish(disk, self.path, index, files)
        if self.save_distributed and self.enable_consolidation:
            self._consolidate(disk, catalog, save_id or self.save_id[:12])

    @contextmanager
    def _replacing(self, disk: Disk, folder: Any) -> Iterator[None]:
        """Keep other commits, and new readers, out of the folder inside."""
        with disk.locked(folder), disk.between_leases(folder, leased_name(disk, folder)):
            yield

    def _commit_shards(self, disk: Disk, files: Iterable[str]) -> None:
        """The files have their names: they are the checkpoint, unless an index names others."""
        if disk.exists(self.path, INDEX_NAME):
            disk.remove(self.path, INDEX_NAME)
            if self.sync_files:
                disk.sync_folder(self.path)
        sweep(disk, self.path, files)

    @property
    def metadata_path(self) -> str:
        """The name of the index."""
        return INDEX_NAME

    def _consolidate(self, disk: Disk, catalog: Catalog, save_id: str) -> None:
        folder = self.fs.init_path(self.consolidated_output_path or self.path)
        self._sync(disk, disk.make_folder(folder))
        mapping = self.fqn_to_index_mapping
        highest = max(mapping.values(), default=1) if mapping else 1
        files: dict[str, list[str]] = {}
        for fqn in catalog.index.fqns:
            name = data_name(1 if mapping is None else mapping[fqn], highest)
            files.setdefault(name, []).append(fqn)
        temporary = {temporary_name(name, save_id): fqns for name, fqns in files.items()}
        stated = _stated_save({"files": len(files), "number": next_number(disk, folder)})
        total = consolidate(
            Shards(disk, self.path, catalog),
            folder,
            temporary,
            {SAVE_KEY: save_id, **stated, **FORMAT},
            threads=self.thread_count_consolidation,
            sync=self.sync_files,
        )
        with self._replacing(disk, folder):
            finals = self._give_names(disk, folder, list(temporary))
            where = {fqn: finals[name] for name, fqns in temporary.items() for fqn in fqns}
            self._publish(disk, folder, encode_index(where, total, save_id), finals.values())

    def _renamed(self, disk: Disk, folder: Any, catalog: Catalog) -> Catalog:
        """The catalog with the files' own names, which they now have.

        Only temporary names are looked for and taken away: others are a caller's own, who may write
        the files later.
        """
        places = catalog.places
        temporary = [name for name in places.files if is_temporary(name)]
        present = set(disk.names(folder))
        for name in temporary:
            if present and name not in present:
                raise CheckpointCorruptError(
                    "a data file of this save is gone before the commit: does another save write "
                    "to the same folder?",
                    file=name,
                )
        finals = self._give_names(disk, folder, temporary)
        names = tuple(finals.get(name, name) for name in places.files)
        return dataclasses.replace(catalog, places=dataclasses.replace(places, files=names))

    def _give_names(self, disk: Disk, folder: Any, temporary: Sequence[str]) -> dict[str, str]:
        """The files' own names, which they now have."""
        finals = final_names(temporary, disk.names(folder))
        for name, final in finals.items():
            disk.replace(folder, name, final)
        if self.sync_files:
            disk.sync_folder(folder)
        return finals

    def _publish(self, disk: Disk, folder: Any, index: bytes, files: Iterable[str]) -> None:
        save, sync = self.save_id[:12], self.sync_files
        publish(disk, folder, INDEX_NAME, [index], save, sync=sync, waits=False)
        sweep(disk, folder, files)

    def _refuse_strangers(self) -> None:
        disk = self._disk()
        strangers = [
            name
            for name in disk.names(self.path)
            if name.endswith(SUFFIX) and not is_replaceable(disk, self.path, name)
        ]
        if strangers:
            raise CheckpointExistsError(
                f"{self.path} holds {strangers[:SHOWN]}, which are no shards, and without an index "
                "nobody could tell them from the shards: choose another folder"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class _FolderLayout:
    """The files of a save."""

    numbers: list[dict[int, int]]
    """For each rank, the number of the file for each index of the mapping."""
    highest: int


def _check(tables: Sequence[WriteItems], mapping: Mapping[str, int] | None, *, whole: bool) -> None:
    """Nothing, where every item can be stored and has a file. Raises PlanError naming the rest."""
    problems: dict[str, str] = {}
    for table in {id(table.fqns): table for table in tables}.values() if mapping else ():
        for fqn in table.fqns:
            if mapping is not None and fqn not in mapping:
                problems[fqn] = "is not in fqn_to_index_mapping"
    for table in tables:
        for row in np.flatnonzero(table.kind == BYTES).tolist():
            problems[table.fqns[row]] = "is no tensor: safetensors files hold tensors only"
        parts = (table.shape != table.size).any(axis=1) & (table.kind != BYTES)
        for row in np.flatnonzero(parts).tolist() if whole else ():
            problems[table.fqns[row]] = "is a part of a tensor: pass save_distributed=True"
    if problems:
        listed = [f"{fqn!r} {problem}" for fqn, problem in list(problems.items())[:SHOWN]]
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise PlanError(f"{len(problems)} value(s) have no place:\n" + "\n".join(listed) + more)


def _layout(
    tables: Sequence[WriteItems], mapping: Mapping[str, int] | None, distributed: bool
) -> _FolderLayout:
    """The files: numbered as the mapping says, or in order where ranks would share a file."""
    highest = max(mapping.values(), default=1) if mapping else 1
    used = [
        sorted({1 if mapping is None else mapping[fqn] for fqn in set(table.fqns)})
        for table in tables
    ]
    numbers = [{index: index for index in indices} for indices in used]
    if distributed or len({i for indices in used for i in indices}) == sum(map(len, used)):
        return _FolderLayout(numbers, highest)
    pairs = sorted((index, rank) for rank, indices in enumerate(used) for index in indices)
    for number, (index, rank) in enumerate(pairs, start=1):
        numbers[rank][index] = number
    return _FolderLayout(numbers, len(pairs))


def _files(
    fqns: Sequence[str], said: Mapping[str, Any], split: Sequence[int] | None
) -> dict[str, list[int]]:
    """The names of a rank's files, and the rows of each. split: the number of each row's file.

    A tensor's second part on the rank goes to another file, with a shard number that no rank has:
    a file has one tensor of a name, and readers take the name for the tensor's.
    """
    mapping: Mapping[str, int] | None = said.get("fqn_to_index_mapping")
    shard: int | None = said.get("shard_index")
    highest = said.get("highest") or max((mapping or {}).values(), default=1)
    highest = max([highest, *(split or ())])
    seen: dict[str, int] = {}
    files: dict[str, list[int]] = {}
    for row, fqn in enumerate(fqns):
        nth = seen[fqn] = seen.get(fqn, -1) + 1
        own = 1 if mapping is None else mapping[fqn]
        number = own if split is None else split[row]
        number = said.get("numbers", {}).get(number, number)
        shard_number = None if shard is None else shard + nth * said.get("ranks", 1)
        files.setdefault(data_name(number, highest, shard_number), []).append(row)
    return files


def _count_files(plan: SavePlan, split: Sequence[int] | None) -> int:
    """How many files a rank writes. split: see `_files`."""
    table, said = WriteItems.of(plan.items), plan.storage_data
    if split is None and len(set(table.fqns)) == len(table.fqns):
        return len(said["numbers"])
    return len(_files(table.fqns, said, split))


def _stated_save(said: Mapping[str, Any]) -> dict[str, str]:
    """What a file says of its save, where that is known."""
    keys = {FILES_KEY: "files", NUMBER_KEY: "number"}
    return {key: str(said[name]) for key, name in keys.items() if name in said}


def _files_of_tensors(catalog: Catalog) -> dict[str, str]:
    """The file of each tensor, for an index."""
    file, files = catalog.places.file.tolist(), catalog.places.files
    keys = catalog.index.key_of.tolist()
    return {catalog.index.fqns[k]: files[n] for k, n in zip(keys, file, strict=True) if n >= 0}


def _data_only(catalog: Catalog) -> Catalog:
    """The catalog with data at the start of each entry, as it is in safetensors files."""
    places = catalog.places
    if (places.data_start == places.start).all():
        return catalog
    places = dataclasses.replace(places, data_start=places.start, data_nbytes=places.length)
    return dataclasses.replace(catalog, places=places)


class HuggingFaceStorageReader(FileSystemReader):
    """Reads safetensors checkpoints: whole tensors, and shards that DCP saved."""

    def __init__(
        self,
        path: str,
        thread_count: int = 1,
        *,
        max_decoded_bytes: int | None = None,
        follow_links: bool = True,
    ) -> None:
        """As torch's.

        path: the checkpoint's folder. thread_count: threads that read. max_decoded_bytes: as
        FileSystemReader's, for each header and the index. follow_links: whether its files may be
        links to plain files elsewhere, as in a cache of the Hugging Face hub.
        """
        super().__init__(
            path=path,
            thread_count=thread_count,
            max_decoded_bytes=max_decoded_bytes,
            follow_links=follow_links,
        )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the folder's checkpoint, from the headers of its files.

        Raises FileNotFoundError where there is none; CheckpointCorruptError, naming the file, where
        one is damaged or files are of different saves.
        """
        catalog = self._read_catalog()
        metadata = catalog.metadata()
        meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta = StorageMeta(self.checkpoint_id, meta.save_id, self.load_id)
        return metadata

    def _catalog_of(self, metadata: Metadata) -> Catalog:
        # A planner that changed the metadata, or a pickle of it, has lost where data starts.
        return _data_only(super()._catalog_of(metadata))

    def _read_catalog(self) -> Catalog:
        return self._read_settled(self._reading_disk)

    def _read_settled(self, disk: Callable[[], Disk]) -> Catalog:
        """The folder's catalog; read again, as long as saves change the folder meanwhile."""
        look: object = None
        while True:
            try:
                return read_folder(disk(), self.path, self.memory)
            except (CheckpointCorruptError, FileNotFoundError, CheckpointReplacedError):
                before, look = look, look_of(disk_of(self.fs), self.path)
                if before == look:
                    raise
                self._forget_files()

    def leased(self, rank: int) -> AbstractContextManager[None]:
        """Hold off the next save's commit, for some seconds, where the storage can do that."""
        disk = disk_of(self.fs)
        return disk.leased(self.path, leased_name(disk, self.path))

    def _is_replaced(self, metadata: Metadata) -> bool:
        meta = metadata.storage_meta or StorageMeta()
        try:
            now = self._read_settled(lambda: disk_of(self.fs)).storage_meta
        except (CheckpointCorruptError, FileNotFoundError):
            return False
        return save_of_meta(now) != meta.save_id

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        """Fill one item from its open file: torch's hook, for subclasses.

        f: as `safetensors.safe_open` gives it, with `get_slice` and `get_tensor`. Raises ValueError
        where the planner's tensor has another size.
        """
        box = tuple(
            slice(at, at + n) for at, n in zip(req.storage_offsets, req.lengths, strict=True)
        )
        tensor = f.get_slice(req.storage_index.fqn)[box]
        target = planner.resolve_tensor(req).detach()
        if target.size() != tensor.size():
            raise ValueError(
                f"req {req.storage_index} mismatch sizes {target.size()} vs {tensor.size()}"
            )
        target.copy_(tensor)
        planner.commit_tensor(req, target)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's items into the planner's targets; done when the future is returned."""
        if not self._has_requests_of_its_own():
            return super().read_data(plan, planner)
        self.filled = self._read_requests(plan, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _has_requests_of_its_own(self) -> bool:
        """Whether a subclass makes the values of an item itself, or opens the files."""
        hooks = ("_process_read_request", "_read_files_from_queue")
        return overridden(self, HuggingFaceStorageReader, hooks)

    def _read_requests(self, plan: LoadPlan, planner: LoadPlanner) -> Filled:
        """Hand each item to the hook, files by several threads."""
        by_file = items_by_file(list(plan.items), self.storage_data)
        paths = ((self._full_path(name), items) for name, items in by_file.items())
        files, done = FileQueue(paths, observer("load")), queue.Queue[Any]()

        def job(stop: StopFlag) -> None:
            files.stop = stop
            self._read_files_from_queue(files, done, planner)

        threads = self.thread_count or 1
        run_all([job] * min(threads, len(by_file)), threads)
        if done.qsize() != len(by_file):
            raise CheckpointError(f"{done.qsize()} of {len(by_file)} files of the plan were read")
        return Filled(files.bytes_read, files.bytes_read, 0)

    def _full_path(self, name: str) -> str:
        return name if os.path.isabs(name) else str(self.fs.concat_path(self.path, name))

    def _read_files_from_queue(
        self, file_queue: queue.Queue[Any], result_queue: queue.Queue[Any], planner: LoadPlanner
    ) -> None:
        """Read files until their queue is empty: torch's hook, run by each thread.

        file_queue: of each file its path and its items. result_queue: gets True for each.
        """
        disk = self._reading_disk()
        own = file_queue if isinstance(file_queue, FileQueue) else None
        advance = observer("load").advance if own is None else own.advance
        while True:
            try:
                path, items = file_queue.get_nowait()
            except queue.Empty:
                return
            inside = os.path.relpath(path, self.path) if os.path.isabs(path) else path
            with disk.open(self.path, checked_path(inside)) as file:
                opened = SafetensorsFile(file, inside, self.memory, advance)
                for item in items:
                    self._process_read_request(opened, item, planner)
            result_queue.put(True)

    def _reads_its_own_way(self) -> bool:
        return is_overridden(self, HuggingFaceStorageReader, "read_data")

    def _has_streams_of_its_own(self) -> bool:
        """Never: tensors lie in the files as they are."""
        return False

    def _read_streams(self, plan: LoadPlan, planner: LoadPlanner) -> Filled:
        """Read from the files that `storage_data` names, where that is all that is known."""
        names = {str(place.relative_path) for place in self.storage_data.values()}
        inside = {os.path.relpath(n, self.path) if os.path.isabs(n) else n for n in names}
        catalog = read_files(self._reading_disk(), self.path, sorted(inside), self.memory)
        return self._fill(catalog, plan, planner)

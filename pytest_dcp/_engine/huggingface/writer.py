"""Writes checkpoints as Hugging Face keeps them: safetensors files and their index.

Names, arguments and files are those of `torch.distributed.checkpoint.hf_storage`. See `file_layout`
for which tensor goes to which file, `folder` for which files are one checkpoint, and `file_names`
for how a save becomes it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.write_results import WriteResults, whole_places_of
from pytest_dcp._engine.huggingface.consolidate import Shards
from pytest_dcp._engine.huggingface.consolidated_folder import ConsolidatedFolder, assign_files
from pytest_dcp._engine.huggingface.file_layout import (
    FORMAT,
    SHOWN,
    FolderLayout,
    check_items,
    count_files,
    describe_save,
    files_of_tensors,
    layout_files,
    name_files,
    with_data_at_start,
)
from pytest_dcp._engine.huggingface.file_names import (
    INDEX_NAME,
    LEFT_OVER,
    SAVE_KEY,
    SUFFIX,
    is_temporary,
    save_of,
    temporary_name,
)
from pytest_dcp._engine.huggingface.folder import (
    files_in_force,
    is_replaceable,
    next_number,
    remove_leftovers,
    save_named_in,
    sweep,
)
from pytest_dcp._engine.huggingface.folder_commit import (
    exclude_others,
    give_final_names,
    publish_index,
)
from pytest_dcp._engine.huggingface.weight_index import encode_index
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import observer
from pytest_dcp._engine.io.write_files import FileJob, Settings, WriteRequest
from pytest_dcp._engine.io.write_safetensors import write_safetensors
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.hooks import is_overridden
from pytest_dcp._engine.plan.index import copy_metadata
from pytest_dcp._engine.storages.folder_writer import (
    CURRENT_DCP_VERSION,
    FileSystemWriter,
    source_of,
)
from pytest_dcp.errors import CheckpointCorruptError, CheckpointExistsError, PlanError

__all__ = ["HuggingFaceStorageWriter"]

SHARDED_FOLDER = "sharded"


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
        fqn_to_index_mapping: the number, from 1, of each tensor's file; None: all go to one file.
        thread_count: files of a rank that are written at the same time.
        save_distributed: every rank writes its shards to its own files. Otherwise the tensors must
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
        self._layout = FolderLayout([], 1)
        self._place(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, to the given folder or the same one."""
        super().reset()
        if checkpoint_id:
            self._place(checkpoint_id)

    def _place(self, folder: str | os.PathLike[str]) -> None:
        self.path = self.fs.init_path(folder)
        if self.enable_consolidation:
            self.consolidated_output_path = str(self.path)
            self.path = self.fs.concat_path(self.path, SHARDED_FOLDER)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan, after making the folder."""
        if not self.use_collectives:
            raise ValueError(
                "a folder of safetensors files is one checkpoint of all ranks: "
                "save it with use_collectives=True"
            )
        self._make_folder()
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans, each with the data that its rank needs to name its files.

        Raises PlanError naming entries that such files cannot hold or that no file is assigned to,
        and CheckpointExistsError where the folder holds files that the shards would mix with.
        """
        if all(plan.usable for plan in plans):
            tables = [WriteItems.of(plan.items) for plan in plans]
            check_items(tables, self.fqn_to_index_mapping, whole=not self.save_distributed)
            self._layout = layout_files(tables, self.fqn_to_index_mapping, self.save_distributed)
        self.remove_leftovers()
        if self.save_distributed:
            self._refuse_strangers()
        shared: dict[str, Any] = {
            "save_id": self.save_id[:12],
            "highest": self._layout.highest,
            "number": next_number(self._folder()),
        }
        if self.fqn_to_index_mapping is not None:
            shared["fqn_to_index_mapping"] = self.fqn_to_index_mapping
        rank_plans = []
        for rank, plan in enumerate(plans):
            own: dict[str, Any] = {"numbers": self._layout.numbers[rank]}
            if self.save_distributed:
                own = {**own, "shard_index": rank + 1, "ranks": len(plans)}
            rank_plans.append(dataclasses.replace(plan, storage_data=shared | own))
        counts = [
            count_files(plan, self._split(plan.items, plan.storage_data))
            for plan in rank_plans
            if len(plan.items)
        ]
        shared = {"files": sum(counts)}
        return [dataclasses.replace(p, storage_data=p.storage_data | shared) for p in rank_plans]

    def _remove_leftovers(self, folder: Folder) -> None:
        if any(map(LEFT_OVER.fullmatch, folder.names())):
            with folder.locked():
                remove_leftovers(folder)

    def _committed_files(self, folder: Folder) -> set[str]:
        return files_in_force(folder)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors under temporary names; finished when it returns the future."""
        future: Future[list[WriteResult]] = Future()
        if not len(plan.items):
            self._sync_parent_dirs()
            future.set_result([])
            return future
        storage_data: Mapping[str, Any] = plan.storage_data or {}
        table = WriteItems.of(plan.items)
        save_id = storage_data.get("save_id")
        # Only a plan of `prepare_global_plan` says how to tell a whole save from others.
        jobs = [
            FileJob(name if save_id is None else temporary_name(name, save_id), rows)
            for name, rows in name_files(
                table.fqns, storage_data, self._split(plan.items, storage_data)
            ).items()
        ]
        watcher = observer("save")
        watcher.expect(int(table.size_bytes().sum()))
        settings = Settings(self.sync_files, self.thread_count, self.per_thread_copy_ahead)
        source = source_of(planner, plan.items)
        request = WriteRequest(self._registering_folder(), jobs, source, settings, watcher)
        written = write_safetensors(
            request,
            table,
            {SAVE_KEY: save_id or self.save_id[:12], **describe_save(storage_data), **FORMAT},
        )
        self._sync_parent_dirs()
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

    def _split(
        self, items: Sequence[WriteItem], storage_data: Mapping[str, Any]
    ) -> list[int] | None:
        """The number of each item's file, if a subclass chooses it; None: from the mapping."""
        if not is_overridden(self, HuggingFaceStorageWriter, "_split_by_storage_plan"):
            return None
        item_list = list(items)
        split = self._split_by_storage_plan(storage_data.get("fqn_to_index_mapping"), item_list)
        number = {item.index: at for at, some in split.items() for item in some}
        if lost := [item.index.fqn for item in item_list if item.index not in number]:
            raise PlanError(
                f"{len(lost)} item(s) are in no file of {type(self).__name__}."
                f"_split_by_storage_plan: {lost[:SHOWN]}"
            )
        return [number[item.index] for item in item_list]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Give the files their names, consolidate if asked to, write the index, remove the old."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_meta = StorageMeta(self.checkpoint_id, self.save_id)
        catalog = Catalog.of(copy_metadata(metadata, storage_data=None))
        results = [some for some in results if len(some)]
        catalog = with_data_at_start(
            dataclasses.replace(catalog, places=whole_places_of(catalog.index, results))
        )
        folder = self._registering_folder()
        # A planner that remembers plans may have given the ranks plans of an earlier save.
        whose = (save_of(name) for name in catalog.places.files if is_temporary(name))
        save_id: str | None = next(whose, self.save_id[:12])
        files = catalog.places.files
        if files and not any(map(is_temporary, files)):
            # For results made by hand: the files may be another program's, or may not exist yet.
            save_id = save_named_in(folder, files)
        with exclude_others(folder):
            catalog = self._rename_files(folder, catalog)
            metadata.storage_data = catalog.metadata().storage_data
            files = catalog.places.files
            if self.save_distributed:
                self._commit_shards(folder, files)
            else:
                nbytes = int(catalog.places.data_nbytes.sum())
                index = encode_index(files_of_tensors(catalog), nbytes, save_id)
                publish_index(folder, index, files, self.save_id[:12], sync=self.sync_files)
        if self.save_distributed and self.enable_consolidation:
            self._consolidate(folder, catalog, save_id or self.save_id[:12])

    def _commit_shards(self, folder: Folder, files: Iterable[str]) -> None:
        """The files have their final names: they are the checkpoint, unless an index names
        others."""
        if folder.exists(INDEX_NAME):
            folder.remove(INDEX_NAME)
            if self.sync_files:
                folder.sync()
        sweep(folder, files)

    @property
    def metadata_path(self) -> str:
        """The name of the index."""
        return INDEX_NAME

    def _consolidate(self, shards: Folder, catalog: Catalog, save_id: str) -> None:
        path = self.fs.init_path(self.consolidated_output_path or self.path)
        target = Folder(shards.disk, path)
        self._sync(target.make())
        files = assign_files(catalog.index.fqns, self.fqn_to_index_mapping)
        output = ConsolidatedFolder(target, files, save_id, sync=self.sync_files)
        nbytes = output.write(
            Shards(shards, catalog),
            output.files,
            number=next_number(target),
            threads=self.thread_count_consolidation,
        )
        output.commit(nbytes)

    def _rename_files(self, folder: Folder, catalog: Catalog) -> Catalog:
        """The catalog with the files' own names, which they now have.

        Only temporary names are replaced: other names were chosen by the caller, who may write the
        files later.
        """
        places = catalog.places
        temporary = [name for name in places.files if is_temporary(name)]
        present = set(folder.names())
        for name in temporary:
            if present and name not in present:
                raise CheckpointCorruptError(
                    "a data file of this save is gone before the commit: does another save write "
                    "to the same folder?",
                    file=name,
                )
        finals = give_final_names(folder, temporary, sync=self.sync_files)
        names = tuple(finals.get(name, name) for name in places.files)
        return dataclasses.replace(catalog, places=dataclasses.replace(places, files=names))

    def _refuse_strangers(self) -> None:
        folder = self._folder()
        strangers = [
            name
            for name in folder.names()
            if name.endswith(SUFFIX) and not is_replaceable(folder, name)
        ]
        if strangers:
            raise CheckpointExistsError(
                f"{self.path} holds {strangers[:SHOWN]}, which are no shards, and without an index "
                "they cannot be distinguished from the shards: choose another folder"
            )

"""Reads Hugging Face's checkpoints: safetensors files, with or without an index.

Names and arguments are those of `torch.distributed.checkpoint.hf_storage`; `folder` says which
files of a folder are one checkpoint.
"""

from __future__ import annotations

import itertools
import os
import queue
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.catalog_checks import checked_path
from pytest_dcp._engine.huggingface.file_layout import with_data_at_start
from pytest_dcp._engine.huggingface.folder import (
    leased_name,
    read_files,
    read_settled,
)
from pytest_dcp._engine.huggingface.safetensors_file import SafetensorsFile
from pytest_dcp._engine.io.file_queue import FileQueue
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.progress_observer import observer
from pytest_dcp._engine.io.read_streams import items_by_file
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.plan.hooks import is_overridden, overridden
from pytest_dcp._engine.storages.folder_metadata import save_of as save_of_meta
from pytest_dcp._engine.storages.folder_reader import FileSystemReader
from pytest_dcp._engine.storages.load_into_targets import LoadedBytes
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError


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

        path: the checkpoint's folder. thread_count: threads that read. max_decoded_bytes: as for
        FileSystemReader, for each header and the index. follow_links: whether its files may be
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

        Raises FileNotFoundError if there is none; CheckpointCorruptError, naming the file, if one
        is damaged or files are of different saves.
        """
        catalog = self._read_catalog()
        metadata = catalog.metadata()
        meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta = StorageMeta(self.checkpoint_id, meta.save_id, self.load_id)
        return metadata

    def _catalog_of(self, metadata: Metadata) -> Catalog:
        # If a planner changed the metadata, or it was pickled, it no longer says where data starts.
        return with_data_at_start(super()._catalog_of(metadata))

    def _read_catalog(self) -> Catalog:
        return self._read_settled(self._folder)

    def _read_settled(self, folder: Callable[[], Folder]) -> Catalog:
        """The folder's catalog; read again as long as saves change the folder meanwhile."""
        tries = itertools.count()

        def find_folder() -> Folder:
            if next(tries):
                self._forget_files()
            return folder()

        return read_settled(find_folder, self._unopened_folder(), self.memory)

    def leased(self, rank: int) -> AbstractContextManager[None]:
        """Hold off the next save's commit for some seconds, if the storage can do that."""
        folder = self._unopened_folder()
        return folder.leased(leased_name(folder))

    def _unopened_folder(self) -> Folder:
        """The folder as it is now, also where files of an earlier save are kept open."""
        return Folder(self._disk(), self.path)

    def _is_replaced(self, metadata: Metadata) -> bool:
        meta = metadata.storage_meta or StorageMeta()
        try:
            now = self._read_settled(self._unopened_folder).storage_meta
        except (CheckpointCorruptError, FileNotFoundError):
            return False
        return save_of_meta(now) != meta.save_id

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        """Fill one item from its open file: torch's hook, for subclasses.

        f: as `safetensors.safe_open` gives it, with `get_slice` and `get_tensor`. Raises ValueError
        if the planner's tensor has another size.
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
        """Read this rank's items into the planner's targets; finished when it returns the
        future."""
        if not self._has_requests_of_its_own():
            return super().read_data(plan, planner)
        self.filled = self._read_requests(plan, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _has_requests_of_its_own(self) -> bool:
        """Whether a subclass makes the values of an item or opens the files itself."""
        hooks = ("_process_read_request", "_read_files_from_queue")
        return overridden(self, HuggingFaceStorageReader, hooks)

    def _read_requests(self, plan: LoadPlan, planner: LoadPlanner) -> LoadedBytes:
        """Pass each item to the hook, reading files on several threads."""
        by_file = items_by_file(list(plan.items), self.storage_data)
        paths = ((self._full_path(name), items) for name, items in by_file.items())
        files, finished_files = FileQueue(paths, observer("load")), queue.Queue[Any]()

        def job(stop: StopFlag) -> None:
            files.stop = stop
            self._read_files_from_queue(files, finished_files, planner)

        threads = self.thread_count or 1
        run_all([job] * min(threads, len(by_file)), threads)
        if finished_files.qsize() != len(by_file):
            raise CheckpointError(
                f"{finished_files.qsize()} of {len(by_file)} files of the plan were read"
            )
        return LoadedBytes(files.bytes_read, files.bytes_read, 0)

    def _full_path(self, name: str) -> str:
        return name if os.path.isabs(name) else str(self.fs.concat_path(self.path, name))

    def _read_files_from_queue(
        self, file_queue: queue.Queue[Any], result_queue: queue.Queue[Any], planner: LoadPlanner
    ) -> None:
        """Read files until their queue is empty: torch's hook, run by each thread.

        file_queue: for each file its path and its items. result_queue: gets True for each file.
        """
        folder = self._folder()
        own = file_queue if isinstance(file_queue, FileQueue) else None
        advance = observer("load").advance if own is None else own.advance
        while True:
            try:
                path, items = file_queue.get_nowait()
            except queue.Empty:
                return
            inside = os.path.relpath(path, self.path) if os.path.isabs(path) else path
            with folder.open(checked_path(inside)) as file:
                opened = SafetensorsFile(file, inside, self.memory, advance)
                for item in items:
                    self._process_read_request(opened, item, planner)
            result_queue.put(True)

    def may_share_reads(self) -> bool:
        """Whether ranges of the files can be read for other ranks."""
        return super().may_share_reads() and not self._has_requests_of_its_own()

    def _overrides_read_data(self) -> bool:
        return is_overridden(self, HuggingFaceStorageReader, "read_data")

    def _overrides_streams(self) -> bool:
        """Never: the files hold tensors untransformed."""
        return False

    def _read_streams(self, plan: LoadPlan, planner: LoadPlanner) -> LoadedBytes:
        """Read from the files that `storage_data` names, if nothing else is known."""
        names = {str(place.relative_path) for place in self.storage_data.values()}
        inside = {os.path.relpath(n, self.path) if os.path.isabs(n) else n for n in names}
        catalog = read_files(self._folder(), sorted(inside), self.memory)
        return self._fill(catalog, plan, planner)

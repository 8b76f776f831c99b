"""The writer of an incremental step: files of an earlier step become part of it.

In an object store the new index names them where they are, and a ledger says which step has which:
see `file_sharing` and `shared_files`. The rest of this text is about a local file system, where a
step's folder stays a checkpoint of its own. Each data file of the earlier step that the new one
refers to gets a second name, a hard link, in the new folder, and the new index names it there. So

- torch, `cp -r` and every reader see an ordinary checkpoint, and need no other folder;
- the file system counts the names of a file, and frees it with the last one: a removal of a step
  cannot break another, at any crash.

The steps of a save, beside those of `io.commit`:

    coordinator   before anything is written: links the data files of the earlier step into the new
                  folder (names are unique to a save, so none can collide)
    every rank    reads the earlier index; finds the blocks that are as before (`earlier_blocks`);
                  decides which files to refer to; writes all other blocks, and hashes them
    coordinator   removes the links that no rank refers to; commits: syncs the folder, so that the
                  links last, and puts the index with the hashes in its place

A rank that does not see the earlier index or a link writes its blocks in full: nothing is lost but
space. A file system without hard links makes the save a full one, with a warning.

A crash before the commit leaves links in a folder without an index. They are no checkpoint, and
`drop_links` removes them when the step's number is saved again.

How much is kept: a file of which this rank would use less than half is not referred to; its
blocks that are as before go into a new file of their own, apart from changing ones. So no step
keeps more than twice its own bytes on disk, and frozen data is copied once at most. A step
refers to at most `MOST_FILES` of them for each rank, so a folder does not fill with small files.

Assumes that the state does not change while it is saved, as any save does. Every block is written,
without hashes, through stream transforms, in safetensors entries, in a commit by each rank alone,
and by a rank that lacks the coordinator's hash function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pytest_dcp._engine.format.block_hashes import ATTRIBUTE, BlockHashes
from pytest_dcp._engine.format.write_results import (
    WriteColumns,
    digests_of,
    files_of_results,
)
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.write_files import FileJob, WriteRequest
from pytest_dcp._engine.plan.index import index_of
from pytest_dcp._engine.steps.block_hash import HASH_MAKERS
from pytest_dcp._engine.steps.block_matches import (
    APART_FROM_BYTES,
    BlockMatches,
    choose_files,
    digest_table,
    find_matches,
    hash_source,
    join_columns,
    remaining_jobs,
)
from pytest_dcp._engine.steps.earlier_blocks import EarlierBlocks, EarlierStep, shareable_files
from pytest_dcp._engine.steps.file_sharing import FileSharing
from pytest_dcp._engine.steps.link_files import NoHardLinksError
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.storages.storage_options import is_url
from pytest_dcp.tracebacks import warn_caller


class IncrementalWriter(FileSystemWriter):
    """Writes a step that may share data files with an earlier one."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        hash_name: str,
        earlier: EarlierStep | None,
        sharing: FileSharing,
        storage_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """hash_name: the function to hash with, the coordinator's best: see `block_hash`.
        earlier: the step to refer to, hashed with it; None: every block is written.
        sharing: how its files become part of the new one.
        storage_options: of a URL's file system. options: of `FileSystemWriter`.
        """
        super().__init__(path, **options)
        self.storage_options = dict(storage_options or {})
        self._point_at(path)
        self.sharing = sharing
        self.hash_name = hash_name
        self.earlier = earlier
        self._linked_names: list[str] = []
        """Links that this rank, the coordinator, has made for this save."""
        self._spare_name = ""
        """The name of a file for blocks that are as before, but are written anew."""

    def _point_at(self, checkpoint_id: str | os.PathLike[str]) -> None:
        if not is_url(checkpoint_id):
            super()._point_at(checkpoint_id)
            return
        from pytest_dcp._engine.storages.fsspec import open_filesystem

        self.fs, self.path = open_filesystem(checkpoint_id, self.storage_options)

    # The coordinator's part, before and after the ranks have written.

    def _remove_leftovers(self, folder: Folder) -> None:
        super()._remove_leftovers(folder)
        self._linked_names = []
        if not self.use_collectives:
            return
        index = None if self.earlier is None else self.earlier.read_index()
        needed = {} if index is None else shareable_files(index[0].places, self.sharing)
        try:
            linked = self.sharing.begin_save(self._save_part, needed)
        except NoHardLinksError as error:
            warn_caller(f"{self.path} is saved in full: {error}")
            return
        self._linked_names = linked
        # Registered like files that it writes, so that a failed save removes them.
        self._created_files |= {(self.path, name): None for name in linked}

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, with the hashes in the index."""
        digests = digests_of(index_of(metadata), results)
        used = files_of_results(results)
        folder = self._registering_folder()
        # Before the commit: after it a crash could leave links that take space for good.
        for name in self._linked_names:
            if name not in used:
                folder.remove(name)
        self.sharing.before_commit(self._save_part, used)
        refers = any(self._save_part not in name for name in used)
        since_full = self.earlier.since_full + 1 if self.earlier is not None and refers else 0
        if digests.any():
            hashes = BlockHashes(self.hash_name, self.save_id, since_full, digests)
            setattr(metadata, ATTRIBUTE, hashes.to_attribute())
        try:
            super().finish(metadata, results)
        finally:
            # The other ranks get the metadata; they have no use for the hashes.
            vars(metadata).pop(ATTRIBUTE, None)

    @property
    def _save_part(self) -> str:
        """The part of the names of this save's files that no other save's have."""
        return self.save_id[:12]

    # Every rank's part.

    def _data_namer(self, storage_data: Any) -> Callable[[int], str]:
        name = super()._data_namer(storage_data)
        return lambda number: self.sharing.name_of(name(number))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's blocks, except blocks of an earlier step."""
        after_all = max(self.thread_count, len(plan.items))
        self._spare_name = self._data_namer(plan.storage_data)(after_all)
        return super().write_data(plan, planner)

    def _write_request(self, request: WriteRequest, items: Sequence[WriteItem]) -> WriteColumns:
        if not self._has_hashes(request):
            return super()._write_request(request, items)
        blocks = self._open_earlier(request.folder)
        matches = BlockMatches() if blocks is None else find_matches(request, blocks)
        used: dict[int, int] = {}
        jobs = request.jobs
        if blocks is not None:
            entries = blocks.entries_of(matches.earlier.values())
            used, again = choose_files(matches.earlier, entries, blocks.file_bytes)
            request.observer.advance(sum(blocks.tensor_bytes(row) for row in used.values()))
            nbytes = sum(blocks.tensor_bytes(matches.earlier[row]) for row in again)
            spare = FileJob(self._spare_name, [], nbytes)
            jobs = remaining_jobs(jobs, used, again if nbytes >= APART_FROM_BYTES else [], spare)
        source = hash_source(request, matches.digests, self.hash_name)
        written = super()._write_request(replace(request, jobs=jobs, source=source), items)
        rows = sorted(row for job in jobs for row in job.rows)
        whole = join_columns(written, rows, used, blocks)
        return replace(whole, digests=digest_table(matches.digests, len(items)))

    def _has_hashes(self, request: WriteRequest) -> bool:
        torch_save = self.serialization_format == SerializationFormat.TORCH_SAVE
        if not (torch_save and request.settings.is_plain and self.use_collectives):
            return False
        if self.hash_name not in HASH_MAKERS:
            warn_caller(
                f"this rank's part of {self.path} is saved in full, as the next will be: rank 0 "
                f"hashes with {self.hash_name!r}, which is not installed here"
            )
            return False
        return True

    def _open_earlier(self, folder: Folder) -> EarlierBlocks | None:
        index = None if self.earlier is None else self.earlier.read_index()
        return None if index is None else EarlierBlocks(*index, folder, self.sharing)

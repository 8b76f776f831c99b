"""Folders of whole tensors, made from folders of shards by the writer or by separate calls.

One process writes all files, or each rank of a group writes its share. The files have temporary
names until one commit makes them the folder's checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from pytest_dcp._engine.coordinate import OperationCall, Subject, team_of
from pytest_dcp._engine.huggingface.consolidate import (
    Shards,
    SlabSource,
    consolidate,
)
from pytest_dcp._engine.huggingface.file_layout import FORMAT, SHOWN, describe_save
from pytest_dcp._engine.huggingface.file_names import (
    SAVE_KEY,
    data_name,
    final_names,
    temporary_name,
)
from pytest_dcp._engine.huggingface.folder import next_number, read_folder
from pytest_dcp._engine.huggingface.folder_commit import (
    exclude_others,
    give_final_names,
    publish_index,
)
from pytest_dcp._engine.huggingface.weight_index import encode_index, read_index
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.storages.folder_metadata import new_id
from pytest_dcp.errors import CheckpointMismatchError
from pytest_dcp.tracebacks import drop_inner_frames, warn_caller

PathLike = str | os.PathLike[str]
FileNumbers = Mapping[str, int]
"""The number of the file, from 1, that each tensor goes to."""


class ConsolidatedFolder:
    """A folder that is being filled with whole tensors."""

    def __init__(
        self,
        folder: Folder,
        files: Mapping[str, Sequence[str]],
        save_id: str,
        *,
        sync: bool,
    ) -> None:
        """files: the tensors of each file, by its name."""
        self.folder, self.save_id, self.sync = folder, save_id, sync
        self.files = {temporary_name(name, save_id): fqns for name, fqns in files.items()}
        """By temporary name."""
        self._finals: dict[str, str] = {}
        """The final names, by temporary name, once files may have them."""

    def write(
        self,
        source: SlabSource,
        names: Iterable[str],
        *,
        number: int,
        threads: int,
        batch_bytes: int | None = None,
        metadata: Mapping[str, str] = FORMAT,
        report: Callable[[str], None] = lambda name: None,
    ) -> int:
        """Write these files; returns the bytes of their tensors.

        number: the save's number, see `next_number`. batch_bytes: the memory of each thread.
        metadata: texts for the headers, besides those that name the save. report: called with the
        name of each tensor that is written, from any thread.
        """
        return consolidate(
            source,
            self.folder,
            {name: self.files[name] for name in names},
            self.name_save(number, metadata),
            threads=threads,
            sync=self.sync,
            batch_bytes=batch_bytes,
            report=report,
        )

    def name_save(self, number: int, metadata: Mapping[str, str] = FORMAT) -> dict[str, str]:
        """The texts for the headers, with the save's own."""
        stated = describe_save({"files": len(self.files), "number": number})
        return {**metadata, SAVE_KEY: self.save_id, **stated}

    def commit(self, nbytes: int) -> None:
        """Make the files the folder's checkpoint. nbytes: of all tensors, for the index."""
        with exclude_others(self.folder):
            self._finals = final_names(list(self.files), self.folder.names())
            finals = give_final_names(self.folder, list(self.files), sync=self.sync)
            where = {fqn: finals[name] for name, fqns in self.files.items() for fqn in fqns}
            index = encode_index(where, nbytes, self.save_id)
            publish_index(self.folder, index, finals.values(), self.save_id, sync=self.sync)

    def remove_unfinished(self) -> None:
        """Remove the files of a save that failed before its index was in place."""
        index = read_index(self.folder) if self._finals else None
        in_force = set() if index is None else set(index.weight_map.values())
        for name in (*self.files, *self._finals.values()):
            if name not in in_force:
                self.folder.remove(name)


def assign_files(fqns: Iterable[str], mapping: FileNumbers | None) -> dict[str, list[str]]:
    """The tensors of each file, by its name; all in one file without a mapping."""
    highest = max(mapping.values(), default=1) if mapping else 1
    files: dict[str, list[str]] = {}
    for fqn in fqns:
        name = data_name(1 if mapping is None else mapping[fqn], highest)
        files.setdefault(name, []).append(fqn)
    return files


@drop_inner_frames
def consolidate_safetensors_files(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
) -> None:
    """Make files of whole tensors from a folder of shards, in this process.

    fqn_to_index_mapping: the number of each tensor's file, from 1; other tensors are left out, with
    a warning. num_threads: each writes one file at a time, and needs 32 MiB.

    Raises CheckpointMismatchError for tensors that the folder lacks, CheckpointCorruptError if its
    shards do not make a tensor whole. A failure leaves the output folder as it was.
    """
    _consolidate_on_ranks(
        input_dir, output_dir, fqn_to_index_mapping, num_threads, None, use_dist=False
    )


@drop_inner_frames
def consolidate_safetensors_files_on_every_rank(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Like `consolidate_safetensors_files`, with the files shared out among the ranks. Collective.

    A failure on any rank is raised on all, as a CheckpointException.
    """
    _consolidate_on_ranks(
        input_dir,
        output_dir,
        fqn_to_index_mapping,
        num_threads,
        process_group,
        use_dist=process_group is not None or dist.is_initialized(),
    )


def _consolidate_on_ranks(
    source: PathLike,
    target: PathLike,
    mapping: FileNumbers,
    threads: int,
    group: dist.ProcessGroup | None,
    *,
    use_dist: bool,
) -> None:
    subject = Subject(os.path.abspath(target), os.path.realpath(target))
    team = team_of(
        group,
        OperationCall("save consolidated", subject),
        use_dist=use_dist,
        coordinator_rank=0,
    )
    disk = LocalDisk()
    shards_in, output = Folder(disk, Path(source)), Folder(disk, Path(target))
    with team.wait_for_turn():
        save_id, number = team.broadcast("prepare", lambda: _prepare_output(output, source, target))

        def open_shards() -> tuple[Shards, ConsolidatedFolder]:
            catalog = read_folder(shards_in)
            _check_mapping(catalog.index.fqns, mapping, source)
            mapped_fqns = [fqn for fqn in catalog.index.fqns if fqn in mapping]
            if team.is_coordinator:
                _warn_of_left_out(catalog.index.fqns, mapping, source)
            files = assign_files(mapped_fqns, mapping)
            folder = ConsolidatedFolder(output, files, save_id, sync=True)
            return Shards(shards_in, catalog), folder

        shards, folder = team.agree("open", open_shards)
        try:
            mine = list(folder.files)[team.rank :: team.size]

            def write() -> int:
                return folder.write(shards, mine, number=number, threads=threads)

            nbytes: int = team.all_reduce("write", write, lambda sizes: sum(sizes))
        except BaseException:
            folder.remove_unfinished()
            raise
        team.broadcast("commit", lambda: folder.commit(nbytes))


def _prepare_output(output: Folder, source: PathLike, target: PathLike) -> tuple[str, int]:
    """Make the folder, if it does not exist; returns the save's id and number."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise ValueError(f"{os.fspath(target)} is the shards' folder: give another one")
    for above in output.make():
        output.disk.sync_folder(above)
    return new_id()[:12], next_number(output)


def _check_mapping(fqns: Sequence[str], mapping: FileNumbers, source: PathLike) -> None:
    there = set(fqns)
    if lacking := tuple(fqn for fqn in mapping if fqn not in there):
        raise CheckpointMismatchError(
            f"{os.fspath(source)} lacks tensors that fqn_to_index_mapping names: "
            f"{list(lacking[:SHOWN])}",
            missing=lacking,
        )
    if wrong := [fqn for fqn, number in mapping.items() if type(number) is not int or number < 1]:
        raise CheckpointMismatchError(
            "expected the number of a file, from 1, for each tensor; got others for "
            f"{wrong[:SHOWN]}",
            mismatched=tuple(wrong),
        )


def _warn_of_left_out(fqns: Sequence[str], mapping: FileNumbers, source: PathLike) -> None:
    if left_out := [fqn for fqn in fqns if fqn not in mapping]:
        warn_caller(
            f"{len(left_out)} tensors of {os.fspath(source)} are left out, since "
            f"fqn_to_index_mapping does not name them: {left_out[:SHOWN]}",
        )

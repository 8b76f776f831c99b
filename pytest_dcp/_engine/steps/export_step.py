"""A copy of one step with the bytes that it consists of, and no others.

The data files of an incremental step may hold blocks of other steps, too. The copy has one data
file for each of them, with the step's entries alone, in the same order; its index is the step's
with the new places. So it is the same checkpoint: the same chunks, checksums and attributes.

The copy appears with its index, as in any save (`io.commit`). A crash before that leaves data files
that no index names, which the next export to that place removes. The checksum of each block is
compared while it is copied, so a damaged step is not passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.block_hashes import ATTRIBUTE, BlockHashes
from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces, index_key
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.io.commit import METADATA, data_name, publish, remove_unnamed
from pytest_dcp._engine.io.disk import In, Out
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.registering_disk import CreatedFiles, RegisteringDisk
from pytest_dcp._engine.steps.open_run import OpenRun
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.storages.folder_metadata import files_named, new_id, read_catalog
from pytest_dcp.errors import CheckpointCorruptError, CheckpointExistsError

COPY_BYTES = 1 << 22
"""Read and written at a time."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of an export."""

    files: int
    """Data files that were written."""
    nbytes: int
    """Their bytes."""
    left_out_bytes: int
    """Bytes of the step's data files that are no part of the step."""


def export_step(run: OpenRun, step: int, target: RunPlace) -> ExportReport:
    """Copy a step to another place; rank 0 does it. Collective."""

    def export() -> ExportReport:
        steps = run.steps
        found = steps.look_at(step, None)
        if not found.is_whole:
            raise ValueError(f"step {step} in {run} is not whole: {found.problem}")
        place = target.open_folders()
        return export_checkpoint(steps.folders.folder(step), place.root, str(place))

    return run.ask_coordinator(f"export step {step}", export)


def export_checkpoint(source: Folder, target: Folder, checkpoint_id: str) -> ExportReport:
    """Copy the checkpoint of one folder to another. checkpoint_id: the target's name.

    Raises CheckpointExistsError if the target is a checkpoint, FileNotFoundError if the source is
    none, CheckpointCorruptError if it is damaged, and errors of the disks; then the target is as it
    was, but for an empty folder.
    """
    if target.exists(METADATA):
        raise CheckpointExistsError(f"{target} is a checkpoint already: export to another place")
    catalog = read_catalog(source, METADATA)
    above = target.make()
    with target.locked():
        remove_unnamed(target, lambda name: files_named(target, name))
    created: CreatedFiles = {}
    folder = Folder(RegisteringDisk(target.disk, created), target.path)
    save = new_id()[:12]
    try:
        places, source_bytes = _copy_files(source, folder, catalog, save)
        for path in above:
            target.disk.sync_folder(path)
        copied = _with_places(catalog, places, checkpoint_id)
        with target.locked():
            publish(folder, METADATA, metadata_file.encode(copied), save, sync=True)
    except BaseException:
        if not target.exists(METADATA):
            for _, name in list(created):
                target.remove(name)
        raise
    nbytes = int(places.length[places.file >= 0].sum())
    return ExportReport(len(places.files), nbytes, source_bytes - nbytes)


def _with_places(catalog: Catalog, places: EntryPlaces, checkpoint_id: str) -> Catalog:
    meta, further = catalog.storage_meta, dict(catalog.further)
    hashes = BlockHashes.of_catalog(catalog)
    if hashes is not None:
        further[ATTRIBUTE] = replace(hashes, since_full=0).to_attribute()
    moved = None if meta is None else replace(meta, checkpoint_id=checkpoint_id)
    return replace(catalog, places=places, storage_meta=moved, further=further)


def _copy_files(
    source: Folder, target: Folder, catalog: Catalog, save: str
) -> tuple[EntryPlaces, int]:
    """Write the data files; returns the places in them, and the bytes of the source's files."""
    old = catalog.places
    start, data_start, file = old.start.copy(), old.data_start.copy(), old.file.copy()
    files: list[str] = []
    source_bytes = 0
    for number, name in enumerate(old.files):
        rows = np.flatnonzero(old.file == number)
        if not len(rows):
            continue
        rows = rows[np.argsort(old.start[rows], kind="stable")]
        new_name = data_name("__0_", len(files), save)
        with source.open(name) as reader, target.create(new_name) as out:
            source_bytes += reader.size
            starts = _copy_entries(reader, out, catalog, rows.tolist(), name)
            out.sync()
        moved = np.array(starts, dtype=np.int64) - old.start[rows]
        start[rows] += moved
        data_start[rows] = np.where(data_start[rows] >= 0, data_start[rows] + moved, -1)
        file[rows] = len(files)
        files.append(new_name)
    places = replace(old, files=tuple(files), file=file, start=start, data_start=data_start)
    return places, source_bytes


def _copy_entries(
    reader: In, out: Out, catalog: Catalog, rows: Sequence[int], name: str
) -> list[int]:
    """Append the entries of these rows; returns where each starts. Shared entries come once."""
    places, position = catalog.places, 0
    starts: list[int] = []
    found: dict[tuple[int, int], int] = {}
    for row in rows:
        entry = int(places.start[row]), int(places.length[row])
        if entry not in found:
            found[entry] = position
            crc = _copy_entry(reader, out, places, row, name)
            position += entry[1]
            sums = places.sums[places.first_sum[row] : places.first_sum[row + 1]]
            if len(sums) and int(sums[-1]) != crc:
                raise CheckpointCorruptError(
                    f"expected CRC-32 {int(sums[-1]):#010x} of its data, got {crc:#010x}: the "
                    "file is damaged, and the step is not exported",
                    entry=index_key(catalog.index, row).fqn,
                    file=name,
                    offset=entry[0],
                )
        starts.append(found[entry])
    return starts


def _copy_entry(reader: In, out: Out, places: EntryPlaces, row: int, name: str) -> int:
    """Append one entry; returns the checksum of its data."""
    at, end = int(places.start[row]), int(places.start[row] + places.length[row])
    first = int(places.data_start[row])
    last = first + int(places.data_nbytes[row])
    crc = 0
    while at < end:
        piece = memoryview(bytearray(min(COPY_BYTES, end - at)))
        if reader.read_into(at, piece) < len(piece):
            raise CheckpointCorruptError(f"the file ends within {end} bytes", file=name, offset=at)
        crc = crc32(piece[max(first - at, 0) : max(last - at, 0)], crc)
        out.write([piece])
        out.begin_sync()
        at += len(piece)
    return crc

"""How a save becomes the checkpoint of its folder, at one instant.

Data files have names of their own save, so that nothing of the old checkpoint is touched while
they are written. Once every rank's files are whole and synced:

1. the folder is synced, so that their names last;
2. the metadata goes to a temporary name and is synced;
3. one rename replaces the old one, once its readers have opened their files, or have
   had their time (see `lease`);
4. the folder is synced again: from here on the new checkpoint survives a power cut;
5. files that no committed metadata names are removed, those of dead saves among them.

A reader finds the old checkpoint or the new one, whole, at every instant up to 5, and the new one
after it. Where a save dies, the next one's step 5 cleans up.

An object store has no rename, but puts a file whole or not at all: there 2 and 3 are one put of the
metadata. It may also list what was there a while ago: what is committed is asked for by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from pytest_dcp._engine.io.disk import Buffer, Disk
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

METADATA = ".metadata"
SUFFIX = ".distcp"
TEMPORARY = ".tmp"

OURS = re.compile(r"__(?P<rank>\d+)_\d+(-[0-9a-f]+)?\.distcp")
"""Names of data files: torch's, and ours with the save's own part. Nothing else is removed."""
RANK_METADATA = re.compile(r"__(?P<rank>\d+)\.metadata")
LEFT_OVER = re.compile(r"(__(?P<rank>\d+))?\.metadata(-[0-9a-f]+)?\.tmp")


def metadata_name(rank: int | None = None) -> str:
    """The metadata of the whole checkpoint, or of one rank that saved on its own."""
    return METADATA if rank is None else f"__{rank}{METADATA}"


def data_name(prefix: str, number: int, save: str) -> str:
    """The n-th data file of a rank's save. `save` tells it from those of any other save."""
    return f"{prefix}{number}-{save}{SUFFIX}"


def publish(
    disk: Disk,
    folder: Any,
    name: str,
    content: Sequence[Buffer],
    save: str,
    *,
    sync: bool,
    waits: bool = True,
) -> None:
    """Steps 1 to 4: make `content` the metadata of this name.

    waits: for readers; not where the caller has waited for them.

    Without `sync` the steps are the same but nothing is waited for: a power cut may lose the save.
    """
    temporary = f"{name}-{save}{TEMPORARY}" if disk.renames else name
    if sync:
        disk.sync_folder(folder)
    try:
        with disk.create(folder, temporary) as out:
            out.write(content)
            if sync:
                out.sync()
        if disk.renames:
            with disk.between_leases(folder, name) if waits else nullcontext():
                disk.replace(folder, temporary, name)
    except BaseException as error:
        if not disk.renames:
            raise
        # A failed save leaves nothing behind that it can remove.
        try:
            disk.remove(folder, temporary)
        except OSError as more:
            error.add_note(f"{temporary} is still there: {more!r}")
        raise
    if sync:
        try:
            disk.sync_folder(folder)
        except OSError as error:
            raise CheckpointError(
                f"the new checkpoint is in place, but its folder {folder} could not be synced: "
                f"until it is, a power cut may bring back the old one ({error})"
            ) from error


def sweep(
    disk: Disk, folder: Any, named: Callable[[str], Iterable[str]], *, rank: int | None
) -> list[str]:
    """Step 5: the names of the files removed.

    named: the data files that a metadata file names. rank: None after a commit of the whole
    checkpoint, which also replaces what ranks had saved on their own; or the rank that committed
    its own part, whose files alone are looked at.
    """
    committed = (METADATA,) if rank is None else (METADATA, metadata_name(rank))
    return _remove(disk, folder, named, committed.__contains__, lambda name: _is_stale(name, rank))


def remove_unnamed(disk: Disk, folder: Any, named: Callable[[str], Iterable[str]]) -> list[str]:
    """The names of the data files removed that no metadata of the folder names: of dead saves."""
    return _remove(disk, folder, named, _is_metadata, is_leftover)


def _remove(
    disk: Disk,
    folder: Any,
    named: Callable[[str], Iterable[str]],
    counts: Callable[[str], bool],
    is_stale: Callable[[str], bool],
) -> list[str]:
    """Remove the stale files that no metadata that counts names; their names."""
    present = disk.names(folder)
    asked = {METADATA, *filter(counts, present)}
    keep = _all_named(named, asked)
    stale = [name for name in present if name not in keep and is_stale(name)]
    # The metadata that names one of these may be there without being listed.
    keep |= _all_named(named, set(filter(counts, map(_metadata_of, stale))) - asked)
    removed = [name for name in stale if name not in keep]
    for name in removed:
        disk.remove(folder, name)
    return removed


def _metadata_of(name: str) -> str:
    """The metadata that would name this file if its rank had saved on its own."""
    data = OURS.fullmatch(name)
    return METADATA if data is None else metadata_name(int(data["rank"]))


def _is_metadata(name: str) -> bool:
    return name == METADATA or RANK_METADATA.fullmatch(name) is not None


def is_leftover(name: str) -> bool:
    """Whether a file is a save's, and a leftover unless some metadata names it."""
    return bool(OURS.fullmatch(name) or LEFT_OVER.fullmatch(name))


def _is_stale(name: str, rank: int | None) -> bool:
    """Whether a file that no metadata names is a checkpoint's, and this commit's to remove."""
    if rank is None:
        kinds = (OURS, RANK_METADATA, LEFT_OVER)
        return any(kind.fullmatch(name) for kind in kinds)
    own = OURS.fullmatch(name) or LEFT_OVER.fullmatch(name)
    return own is not None and own["rank"] == str(rank)


def _all_named(named: Callable[[str], Iterable[str]], metadata: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in metadata:
        try:
            found.update(named(name))
        except FileNotFoundError:
            continue
        except CheckpointCorruptError as error:
            # What it names cannot be known: nothing may be removed.
            raise error.at(file=name) from error
    return found
